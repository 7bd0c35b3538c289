"""Text from outside (names of runs, files, parameters, classes), escaped for each medium that shows it."""

import csv
import io
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

INVISIBLE = "\N{ZERO WIDTH SPACE}"
TURNING = set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # they reverse the text that follows


def printable(text: str, keep: str = "") -> str:
    r"""Text for a terminal, a page or a picture: control characters and what is no text as backslash escapes.

    Args:
        keep: Control characters that stay, such as the line breaks of a table.

    Example:
        >>> printable("a\x1b[31m\nb")
        'a\\x1b[31m\\nb'
    """

    def shown(character: str) -> str:
        hidden = unicodedata.category(character) in ("Cc", "Cs") or character in TURNING
        if character in keep or not hidden:
            return character
        return character.encode("unicode_escape").decode("ascii")

    return "".join(map(shown, text))


def first_line(error: BaseException, line: int = 0) -> str:
    """One line of what an error says, or the error's kind if it says nothing.

    Args:
        line: Which line: the first, or -1 for the last.

    Example:
        >>> first_line(ValueError("too long\\nby 3")), first_line(KeyError())
        ('too long', 'KeyError')
    """
    return str(error).strip().splitlines()[line] if str(error).strip() else type(error).__name__


def in_figure(text: str) -> str:
    """Text for a Matplotlib title, axis or tick, which would read mathematics between dollar signs.

    Example:
        >>> in_figure("price $a$")
        'price \\\\$a\\\\$'
    """
    return printable(text).replace("$", r"\$")


def in_legend(text: str) -> str:
    """Text for a Matplotlib legend, which would leave out a name that begins with an underscore."""
    return INVISIBLE * text.startswith("_") + in_figure(text)


def in_markdown(text: str) -> str:
    """Text for a cell of a Markdown table, without line breaks, columns, markup or mathematics of its own.

    An underscore within a word is none of these.

    Example:
        >>> in_markdown("latent_dim | *2*")
        'latent_dim \\\\| \\\\*2\\\\*'
    """
    return re.sub(r"[\\`*\[\]<>|$~&]|(?<!\w)_|_(?!\w)", lambda found: "\\" + found[0], printable(text))


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV, with a line of names.

    A text that a spreadsheet would run as a formula gets an apostrophe in front; a number stays as it is.
    """
    file = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(map(_in_cell, names))
    writer.writerows([_in_cell(row.get(name)) for name in names] for row in rows)
    return file.getvalue()


def _in_cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = printable(value, keep="\n\t")
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t")) and not _is_number(text) else text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True

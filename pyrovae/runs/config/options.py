"""Fields of `Config` as options of the command line: their help, flags and parsers."""

import dataclasses
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import Field
from pathlib import Path
from typing import Any, Literal

from pyrovae.runtime.errors import FieldError
from pyrovae.runtime.schemas import check, reason


def parse_integers(text: str) -> tuple[int, ...]:
    """Reads whole numbers with commas between them; an empty text has none."""
    return tuple(int(part) for part in text.split(",")) if text else ()


def parse_directory(text: str) -> str:
    """Reads a directory, as an absolute path."""
    return str(Path(text).expanduser().resolve())


def parse_limit(text: str) -> tuple[int, int | None]:
    """Reads how many training images, and after a slash how many validation images, to use at most."""
    train, _, validation = text.partition("/")
    return int(train), int(validation) if validation else None


def parse_variance(text: str) -> float | Literal["learned"]:
    """Reads a variance, or `learned`."""
    return "learned" if text == "learned" else float(text)


def option(
    default: Any,
    help: str,
    *,
    short: str = "",
    choices: Mapping | None = None,
    parse: Callable | None = None,
    **shown: str,
):
    """A field of Config with what the command line needs: its help, short flag, choices, and parser.

    Further keywords, for the help only: `metavar`, and `shown` for a default that depends on others.
    """
    metadata = {"help": help, "short": short, "choices": choices, "parse": parse or type(default), **shown}
    return dataclasses.field(default=default, metadata=metadata)


def flag(name: str) -> str:
    """The option of the command line that sets a field."""
    return "--" + name.replace("_", "-")


def spelled(field: Field, value: Any) -> str:
    """A field's value as it is typed on the command line."""
    if isinstance(value, tuple):
        return ("/" if field.metadata["parse"] is parse_limit else ",").join(
            str(n) for n in value if n is not None
        )
    return str(value)


def check_type(field: Field, value: Any) -> None:
    """Checks that a value read from a file has its field's type."""
    try:
        check(value, field.type)
    except ValueError as error:
        said = reason(error)
        if said.startswith("expected "):
            raise FieldError(
                f"expected {field.name} as {said.removeprefix('expected ')}", field=field.name
            ) from None
        raise ValueError(f"expected another {field.name}, got {reprlib.repr(value)}: {said}") from None

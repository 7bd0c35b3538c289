"""The elements of the page: sections with facts, tables and pictures, which the template shows."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

DPI = 100


@dataclass(frozen=True)
class Fact:
    """A name, its value as text, and a remark: for a number, its unit."""

    name: str
    value: str
    remark: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of text, the head first; each column holds numbers, except for the columns in `words`."""

    caption: str
    rows: list[list[str]]
    words: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Picture:
    """A PNG in base64, its size in pixels, its caption, and a text for those who do not see it."""

    png: str
    width: int
    height: int
    caption: str
    alt: str

    @classmethod
    def of(cls, figure: Figure, caption: str, alt: str) -> "Picture":
        """Draws a figure, as fine as on a screen."""
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=DPI)
        width, height = (round(DPI * inches) for inches in figure.get_size_inches())
        return cls(base64.b64encode(file.getvalue()).decode(), width, height, caption, alt)


@dataclass(frozen=True, kw_only=True)
class Section:
    """Everything that the page shows under one heading, in this order.

    Attributes:
        name: Its anchor.
        headlines: Numbers to see first.
        command: The words to type, quoted for a shell.
    """

    name: str
    title: str
    warnings: Sequence[str] = ()
    headlines: Sequence[Fact] = ()
    facts: Sequence[Fact] = ()
    text: str = ""
    command: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()

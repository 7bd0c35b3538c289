"""The file that a picture is written to."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from matplotlib.figure import Figure

from pyrovae.runtime.errors import FieldError
from pyrovae.runtime.whole_files import WriteError, save_figure, write_errors

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".svg", ".pdf", ".eps")
VECTORS = (".svg", ".pdf", ".eps")  # the suffixes of pictures that are not made of pixels
MOST_PIXELS = 100_000_000


def path_for(run: str | Path, name: str, out: str | Path | None = None) -> Path:
    """The path that a picture is written to: `out`, or `figures/<name>.png` in the run.

    Raises:
        ValueError: `out` is not named as a picture.
    """
    path = Path(run) / "figures" / f"{name}.png" if out is None else Path(out)
    if path.suffix.lower() not in SUFFIXES:
        raise FieldError(
            f"expected out with a picture's suffix ({', '.join(SUFFIXES)}), got {path}", field="out"
        )
    return path


def save(figure: Figure, path: Path, dpi: int = 100) -> None:
    """Writes a picture, in place of any that is there, and makes the folders that it needs.

    Raises:
        ValueError: It cannot be written there, or has more than MOST_PIXELS.
    """
    width, height = figure.get_size_inches()
    if path.suffix.lower() not in VECTORS and width * height * dpi**2 > MOST_PIXELS:
        raise FieldError(
            f"expected dpi for a picture of at most {MOST_PIXELS:,} pixels, got {dpi}, which makes "
            f"{width * dpi:,.0f} x {height * dpi:,.0f}: lower it, or save as .pdf or .svg",
            field="dpi",
        )
    with writing(path):
        save_figure(figure, path, dpi)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Makes the folders that a file needs.

    Raises:
        ValueError: It cannot be written there.
        WriteError: The storage is full or fails.
    """
    try:
        with write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield
    except WriteError as error:
        if not error.of_place:
            raise
        raise FieldError(
            f"expected out where a file can be written, got {path}: {error.reason}", field="out"
        ) from None

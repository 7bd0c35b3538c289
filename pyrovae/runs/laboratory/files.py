"""The directory in which a measurement leaves its results."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pyrovae import figures
from pyrovae.runs.directories import RunError, new_directory, read_config
from pyrovae.runs.laboratory.tables import title
from pyrovae.runtime.schemas import OfModel, check, refused
from pyrovae.runtime.whole_files import save_figure, write_atomically
from pyrovae.variance.results import Comparison


def write(directory: Path, found: Comparison | dict[int, Comparison]) -> None:
    """Writes `variance.json`, `variance.csv` and `variance.png`, and with epochs a figure over training."""
    by_epoch = found if isinstance(found, dict) else {None: found}
    contents = {e: c.to_json() for e, c in by_epoch.items()} if isinstance(found, dict) else found.to_json()
    write_atomically(directory / "variance.json", json.dumps(contents, indent=2) + "\n")
    texts = [comparison.to_csv() for comparison in by_epoch.values()]
    rest = [text.split("\n", 1)[1] for text in texts[1:]]
    write_atomically(directory / "variance.csv", "".join([texts[0], *rest]))
    for epoch, comparison in by_epoch.items():
        name = "variance" if epoch is None else f"variance-{epoch:04}"
        figure = figures.variance(comparison.rows, comparison.slopes, title(comparison))
        save_figure(figure, directory / f"{name}.png")
    if isinstance(found, dict):
        rows = {epoch: comparison.rows for epoch, comparison in found.items()}
        first = next(iter(found.values()))
        figure = figures.variance_over_training(rows, title(first, over_training=True))
        save_figure(figure, directory / "variance-over-training.png")


def read(directory: Path) -> Comparison | dict[int, Comparison]:
    """The numbers that `write` left in a directory.

    Raises:
        RunError: They are damaged, or of another version.
    """
    path = directory / "variance.json"
    with refused(RunError, f"what variance writes in {path}", "; measure again"):
        contents = json.loads(path.read_bytes())
        check(contents, dict[str, Any])
        if "rows" in contents or not contents:
            return _titled(contents)
        return {int(epoch): _titled(one) for epoch, one in contents.items()}


def _titled(contents: dict[str, Any]) -> Comparison:
    found = Comparison.from_json(contents)
    if not found.settings.get("testbed"):
        check(found.settings, OfModel)
    return found


def directory_for(run: str | Path | None, out: str | Path | None) -> Path:
    """The directory that results are written to: `out`, or else a new directory in the run or under runs/.

    Raises:
        RunError: There is no such place.
    """
    return new_directory(Path(run or "runs") / "variance", out)


@contextlib.contextmanager
def results_directory(run: str | Path | None, out: str | Path | None) -> Iterator[Path]:
    """Makes the directory of `directory_for` before anything is measured, and removes it if it stays empty."""
    if run is not None:
        read_config(Path(run))  # no directory is made in what is no run
    place = Path(out if out is not None else run or "runs")
    made = [path for path in (place, *place.parents) if not path.exists()]
    directory = directory_for(run, out)
    try:
        yield directory
    finally:
        if not any(directory.iterdir()):
            for path in made if out is not None else (directory, *made):
                with contextlib.suppress(OSError):  # someone else's by now
                    path.rmdir()

"""A run as one HTML page: all that is known of it, with nothing to fetch.

Its pictures show the run's best parameters, and validation images, never test images. Its numbers are those
that `train`, `evaluate` and `variance` left in the run. The same run gives the same page.
"""

from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from pyrovae.report.images import latent, reconstructions, samples
from pyrovae.report.results import curves, evaluation, variance, variance_over_training
from pyrovae.report.subjects import read
from pyrovae.report.summary import configuration, reproduction, summary
from pyrovae.report.words import lead
from pyrovae.runs import pictures
from pyrovae.runtime.errors import FieldError
from pyrovae.runtime.texts import printable
from pyrovae.runtime.whole_files import write_atomically

SUFFIXES = (".html", ".htm")
SECTIONS = (
    summary,
    configuration,
    reproduction,
    curves,
    reconstructions,
    samples,
    latent,
    evaluation,
    variance,
    variance_over_training,
)


def report(
    run: str | Path, *, data_dir: str | Path | None = None, device: str = "cpu", trust: bool = False
) -> str:
    """Writes the page, as HTML.

    Args:
        data_dir: Where downloaded datasets lie; the run's own place if None.
        device: Where the VAE works.
        trust: Whether to import foreign code that the run names. Without it, the page of such a run lacks what
            needs its VAE: images and codes.

    Warns:
        TrustWarning: The page lacks something for that reason.

    Raises:
        RunError: The directory is no run, has no whole epoch yet, or a file in it is damaged.
        CheckpointError: The checkpoint is missing, damaged or of another run.
        ValueError: The run's data are not there.

    Example:
        >>> from pyrovae import Config, train
        >>> run, _ = train(Config(epochs=1, limit=(64, 32)), out="runs/reported")
        >>> report(run).splitlines()[0]
        '<!DOCTYPE html>'
    """
    subject = read(Path(run), data_dir, device, trust)
    environment = Environment(
        autoescape=True,
        finalize=lambda value: printable(value) if isinstance(value, str) else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.from_string((files("pyrovae.report") / "page.html").read_text(encoding="utf-8"))
    sections = [section for make in SECTIONS if (section := make(subject))]
    return template.render(name=subject.run.resolve().name, lead=lead(subject.config), sections=sections)


def path_for(run: str | Path, out: str | Path | None = None) -> Path:
    """The path that the page is written to: `out`, or `report.html` in the run.

    Raises:
        ValueError: `out` is not named as a page.
    """
    path = Path(run) / "report.html" if out is None else Path(out)
    if path.suffix.lower() not in SUFFIXES:
        raise FieldError(f"expected out with a page's suffix ({', '.join(SUFFIXES)}), got {path}", field="out")
    return path


def save(page: str, path: Path) -> None:
    """Writes a page, in place of any that is there, and makes the folders that it needs.

    Raises:
        ValueError: It cannot be written there.
    """
    with pictures.writing(path):
        write_atomically(path, page)

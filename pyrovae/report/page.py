"""A run as one HTML page: all that is known of it, with nothing to fetch.

Its pictures show the run's best parameters, and validation images, never test. Its numbers are those that
`train`, `evaluate` and `variance` left in the run. The same run gives the same page.
"""

import base64
import io
import math
import shlex
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure

from pyrovae.data import DATASETS
from pyrovae.figures import figures
from pyrovae.runs import assessment, laboratory, pictures
from pyrovae.runs import training as runs
from pyrovae.runs.assessment import Assessment, Average
from pyrovae.runs.config import Config, flag, spelled
from pyrovae.runs.directories import read_settings
from pyrovae.runtime.parts import TrustError, TrustWarning, is_foreign
from pyrovae.runtime.schemas import Best, Row
from pyrovae.runtime.texts import printable
from pyrovae.runtime.whole_files import write_atomically
from pyrovae.training.checkpoints import load_checkpoint
from pyrovae.vae import VAE
from pyrovae.variance.results import Comparison

SUFFIXES = (".html", ".htm")
DPI = 100
NONE = "\N{EN DASH}"  # in place of a number that there is not
TIMES = " \N{MULTIPLICATION SIGN} "


@dataclass(frozen=True)
class Fact:
    """A name, what there is to say, and what that is: of a number, its unit."""

    name: str
    value: str
    remark: str = ""


@dataclass(frozen=True)
class Table:
    """Cells of text, a head first; all columns are numbers but those of words."""

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
        """Of a figure, as fine as on a screen."""
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=DPI)
        width, height = (round(DPI * inches) for inches in figure.get_size_inches())
        return cls(base64.b64encode(file.getvalue()).decode(), width, height, caption, alt)


@dataclass(frozen=True, kw_only=True)
class Section:
    """What the page has under one heading, in this order.

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


@dataclass(frozen=True)
class Subject:
    """A run, and what its files say.

    Attributes:
        best: The metrics of the epoch whose parameters the VAE has.
        vae: None if it needs foreign code that is not trusted.
        untold: What the page lacks for that reason, and why, in a sentence; empty if it lacks nothing.
        variance: The last measurement of gradients at such parameters; None if there is none.
        along: The last one along training, by epoch.
    """

    run: Path
    config: Config
    data: dict[str, Any]
    versions: dict[str, str]
    history: list[Row]
    best: Row
    vae: VAE | None
    untold: str
    evaluation: Assessment | None
    variance: Comparison | None
    along: dict[int, Comparison] | None
    data_dir: str | Path | None
    device: str
    trust: bool


def report(
    run: str | Path, *, data_dir: str | Path | None = None, device: str = "cpu", trust: bool = False
) -> str:
    """The page, as HTML.

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
    subject = _read(Path(run), data_dir, device, trust)
    environment = Environment(
        autoescape=True,
        finalize=lambda value: printable(value) if isinstance(value, str) else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.from_string((files("pyrovae.report") / "page.html").read_text(encoding="utf-8"))
    sections = [section for make in SECTIONS if (section := make(subject))]
    return template.render(name=subject.run.resolve().name, lead=_lead(subject.config), sections=sections)


def path_for(run: str | Path, out: str | Path | None = None) -> Path:
    """Where the page goes: `out`, or `report.html` in the run.

    Raises:
        ValueError: `out` is not named as a page.
    """
    path = Path(run) / "report.html" if out is None else Path(out)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"expected out with a page's suffix ({', '.join(SUFFIXES)}), got {path}")
    return path


def save(page: str, path: Path) -> None:
    """Writes a page, in place of any that is there, and makes the folders that it needs.

    Raises:
        ValueError: It cannot be written there.
    """
    with pictures.writing(path):
        write_atomically(path, page)


def _read(run: Path, data_dir: str | Path | None, device: str, trust: bool) -> Subject:
    config, data = runs.read_config(run)
    history = pictures.history(run)
    vae, untold = None, ""
    try:
        vae = runs.load(run, device=device, trust=trust)
    except TrustError as error:
        untold = f"no reconstructions, samples and latent space, which take {error.found}"
        warnings.warn(f"{run}: {untold}", TrustWarning, stacklevel=3)
    epoch = load_checkpoint(run / "best.pt", "cpu", holds=Best)["epoch"]
    best = next((row for row in history if row["epoch"] == epoch), None)
    if best is None:
        raise runs.RunError(f"expected the metrics of epoch {epoch} in {run / 'metrics.jsonl'}, got none")
    versions = read_settings(run).get("versions", {})
    evaluation, (variance, along) = assessment.read(run), _measurements(run)
    return Subject(
        run,
        config,
        data,
        versions,
        history,
        best,
        vae,
        untold,
        evaluation,
        variance,
        along,
        data_dir,
        device,
        trust,
    )


def _measurements(run: Path) -> tuple[Comparison | None, dict[int, Comparison] | None]:
    """The newest that `variance` left in the run, of one state and along training."""
    paths = sorted(run.glob("*/variance.json"), key=lambda path: (path.stat().st_mtime_ns, path))
    found = {type(one): one for one in (laboratory.read(path.parent) for path in paths)}
    return found.get(Comparison), found.get(dict)


def _lead(config: Config) -> str:
    dimensions = "one latent dimension" if config.latent_dim == 1 else f"{config.latent_dim} latent dimensions"
    return f"{_dataset(config)}, {config.likelihood}, {config.network}, {config.guide}, {dimensions}"


def _dataset(config: Config) -> str:
    return config.dataset if config.dataset in DATASETS else Path(config.dataset).name


def _shape(data: dict[str, Any]) -> str:
    return TIMES.join(map(str, data["shape"]))


def _number(value: float | None) -> str:
    return NONE if value is None or not math.isfinite(value) else f"{value:,.2f}"


def _to_do(s: Subject, what: str, command: str) -> dict[str, Any]:
    """A section's text where there is nothing to show yet, and the command for it."""
    if _has_no_density(s):
        return {"text": f"Not {what}: an autoencoder gives an image no probability."}
    words = [command, str(s.run), *(["--trust"] if s.trust and is_foreign(s.config.guide) else [])]
    return {"text": f"Not {what} yet. To do it:", "command": _typed(*words)}


def _has_no_density(s: Subject) -> bool:
    """Whether the run is an autoencoder, in whose metrics there is no ELBO."""
    return s.best["validation_elbo"] is None


def _typed(*words: str) -> list[str]:
    return [shlex.quote(word) for word in ("python", "cli.py", *words)]


# Sections, in the order of the page


def _summary(s: Subject) -> Section:
    config, data = s.config, s.data
    model = _lead(config).partition(", ")[2]
    if s.vae:
        model += f"; {sum(parameter.numel() for parameter in s.vae.parameters()):,} parameters"
    trained = f"{config.estimator}, K = {config.particles}"
    if config.beta != 1:
        trained += f", beta = {config.beta:g}"
    if config.kl_warmup:
        trained += f", the KL's weight rising over {config.kl_warmup} epochs"
    return Section(
        name="summary",
        title="Summary",
        warnings=[*([s.untold] if s.untold else []), *_warnings(s)],
        headlines=[*_of_validation(s.best), *_of_test(s.evaluation)],
        facts=[
            Fact(
                "data",
                f"{_dataset(config)}: {data['train']:,} images to train on, {data['validation']:,} to choose "
                f"the best epoch by, {data['test']:,} to test on; {_shape(data)} pixels",
            ),
            Fact("model", model),
            Fact("objective", trained),
            Fact(
                "epochs",
                f"{s.history[-1]['epoch']:,} of at most {config.epochs:,}; validation was best at epoch "
                f"{s.best['epoch']:,}, whose parameters the pictures show",
            ),
        ],
    )


def _warnings(s: Subject) -> list[str]:
    if _has_no_density(s):
        return ["an autoencoder: q(z|x) has no density, so that there is no KL and no ELBO"]
    if s.evaluation is None and not s.config.make_likelihood(s.data["levels"]).normalised:
        return ["a pseudo-likelihood, which is not normalised: its ELBO bounds nothing"]
    return [*s.evaluation.notes, *_outdated(s, s.evaluation.settings)] if s.evaluation else []


def _of_validation(best: Row) -> list[Fact]:
    names = {"elbo": "ELBO", "reconstruction": "reconstruction", "kl": "KL"}
    values = {name: best[f"validation_{term}"] for term, name in names.items()}
    return [
        Fact(f"validation {name}", _number(value), "nats per image")
        for name, value in values.items()
        if value is not None
    ]


def _of_test(found: Assessment | None) -> list[Fact]:
    if found is None:
        return []
    evidence, latents = found.importance_weighted.log_evidence, found.latents
    facts = [
        Fact("test ELBO", _number(found.elbo.mean), _unit(found.elbo)),
        Fact("test log p(x)", _number(evidence.mean), _unit(evidence)),
    ]
    if found.bits_per_dim is not None:
        facts.append(Fact("test bits per dimension", f"{found.bits_per_dim:.4f}", "at most"))
    if latents.active is not None:
        facts.append(Fact("active units", str(latents.active), f"of {len(latents.variance_of_means)}"))
    return facts


def _unit(average: Average) -> str:
    error = average.standard_error
    return "nats per image" + ("" if error is None else f", standard error {_number(error)}")


def _configuration(s: Subject) -> Section:
    sizes = ", ".join(f"{s.data[split]:,} {split}" for split in ("train", "validation", "test"))
    values = {field: getattr(s.config, field.name) for field in fields(Config)}
    return Section(
        name="configuration",
        title="Configuration",
        facts=[
            Fact("images", _shape(s.data), f"channels, height, width; {s.data['levels']:,} grey levels"),
            Fact("sizes", sizes),
            Fact("checksum", str(s.data["checksum"]), "CRC-32 of training and validation pixels"),
            Fact("versions", ", ".join(f"{name} {version}" for name, version in s.versions.items())),
            *(
                Fact(flag(field.name), NONE if value is None else spelled(field, value), field.metadata["help"])
                for field, value in values.items()
            ),
        ],
    )


def _reproduction(s: Subject) -> Section:
    return Section(
        name="reproduction",
        title="Reproduction",
        text="From a checkout; an installed package has pyrovae in place of python cli.py. On the same data, "
        "versions and machine, with as many threads, a CPU gives the same run bit for bit.",
        command=_typed("train", *s.config.arguments(s.data["levels"])),
    )


def _curves(s: Subject) -> Section:
    epochs = {row["epoch"]: row for row in (s.best, s.history[-1])}
    columns = {
        f"{split}, epoch {epoch}": (row, prefix)
        for epoch, row in epochs.items()
        for split, prefix in {"training": "", "validation": "validation_"}.items()
    }
    rows = {
        title: [_number(row[prefix + term]) for row, prefix in columns.values()]
        for term, title in ({"bound": "bound, as it is trained"} | figures.TERMS).items()
    }
    if rows["bound, as it is trained"] == rows[figures.TERMS["elbo"]]:
        del rows["bound, as it is trained"]
    return Section(
        name="curves",
        title="Curves",
        pictures=[
            Picture.of(
                pictures.curves(s.run),
                "Training is averaged over an epoch, as the parameters move; validation is at its end.",
                f"Line charts of the bound's terms over {len(s.history)} epochs, training beside validation.",
            )
        ],
        tables=[
            Table(
                "At the best epoch, and at the last",
                [["nats per image", *columns], *([title, *cells] for title, cells in rows.items())],
            )
        ],
    )


def _reconstructions(s: Subject) -> Section | None:
    if s.vae is None:
        return None
    point = "at the most probable code" if s.vae.posterior.discrete else "at the mean of q(z|x)"
    return Section(
        name="reconstructions",
        title="Reconstructions",
        pictures=[
            Picture.of(
                pictures.reconstruct(s.run, data_dir=s.data_dir, device=s.device),
                f"Validation images, and below each its reconstruction: E[x|z] {point}.",
                "Pairs of rows of small images, each image above its reconstruction.",
            )
        ],
    )


def _samples(s: Subject) -> Section | None:
    if s.vae is None:
        return None
    return Section(
        name="samples",
        title="Samples",
        pictures=[
            Picture.of(
                pictures.sample(s.run, device=s.device),
                "The expected images E[x|z] of draws of z from the prior.",
                "A grid of small images that the decoder made, of a conditional VAE a row for each class.",
            )
        ],
    )


def _latent(s: Subject) -> Section | None:
    if s.vae is None:
        return None
    where = {"data_dir": s.data_dir, "device": s.device}
    section = {"name": "latent", "title": "Latent space"}
    codes = Picture.of(
        pictures.latent(s.run, **where),
        "Where q(z|x) has its mean for each validation image, in its class's colour if it has one.",
        f"{'A histogram' if s.vae.latent_dim == 1 else 'A cloud of points'}: the images' latent codes.",
    )
    if s.vae.posterior.discrete:
        return Section(
            **section, text="The codes are bits, with nothing between them to decode.", pictures=[codes]
        )
    decoded = Picture.of(
        pictures.manifold(s.run, **where),
        "Decoded points of the plane, evenly spaced in the prior's quantiles."
        if s.vae.latent_dim == 2
        else "In each row one latent dimension moves along the prior's quantiles, the others stay at zero; "
        "the dimensions that vary most with the image come first.",
        "A grid of decoded images that change along the latent dimensions.",
    )
    return Section(**section, pictures=[codes, decoded])


def _evaluation(s: Subject) -> Section:
    found = s.evaluation
    if found is None:
        return Section(name="evaluation", title="Evaluation", **_to_do(s, "evaluated", "evaluate"))
    return Section(
        name="evaluation",
        title="Evaluation",
        warnings=[*found.notes, *_outdated(s, found.settings)],
        text=assessment.title(found),
        tables=[
            Table(
                "Standard errors are over images. ESS is the effective sample size, and k-hat tells how heavy "
                "the tail of the weights is.",
                assessment.rows(found),
            )
        ],
        notes=assessment.remarks(found),
    )


def _outdated(s: Subject, settings: dict[str, Any]) -> list[str]:
    """What to say of numbers that are of another epoch than the pictures."""
    epoch, best = settings.get("epoch"), s.best["epoch"]
    return [] if epoch in (None, best) else [f"of the parameters of epoch {epoch}, not of the best, {best}"]


def _variance(s: Subject) -> Section:
    section = {"name": "variance", "title": "Gradient variance"}
    found = s.variance
    if found is None:
        return Section(**section, **_to_do(s, "measured", "variance"))
    return Section(
        **section,
        warnings=_outdated(s, found.settings),
        pictures=[
            Picture.of(
                figures.variance(found.rows, found.slopes, laboratory.title(found)),
                "The noise of gradient estimators at these parameters, on one batch of validation images.",
                "Charts of variance, signal-to-noise ratio and cost by estimator and K, and a map by layer.",
            )
        ],
        tables=[_estimators(found)],
        notes=laboratory.notes(found),
    )


def _variance_over_training(s: Subject) -> Section | None:
    found = s.along
    if found is None:
        return None
    last = found[max(found)]
    rows = {epoch: comparison.rows for epoch, comparison in found.items()}
    return Section(
        name="variance-over-training",
        title="Gradient variance over training",
        pictures=[
            Picture.of(
                figures.variance_over_training(rows, laboratory.title(last, over_training=True)),
                "The noise of gradient estimators at epochs of a training run with these settings.",
                "Line charts of variance over epochs by estimator, a panel for each K.",
            )
        ],
        tables=[_estimators(last)],
        notes=laboratory.notes(last),
    )


def _estimators(found: Comparison) -> Table:
    cells = [[NONE if cell.startswith("nan") else cell for cell in row] for row in laboratory.rows(found)]
    return Table(laboratory.title(found), cells, words=(0, 2))


SECTIONS = (
    _summary,
    _configuration,
    _reproduction,
    _curves,
    _reconstructions,
    _samples,
    _latent,
    _evaluation,
    _variance,
    _variance_over_training,
)

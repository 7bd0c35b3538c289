"""Words and numbers that several sections have."""

import math
import shlex
from pathlib import Path
from typing import Any

from pyrovae.data.sources import DATASETS
from pyrovae.report.subjects import Subject
from pyrovae.runs.config import Config
from pyrovae.runtime.parts import is_foreign

NONE = "\N{EN DASH}"  # stands in place of a number that does not exist
TIMES = " \N{MULTIPLICATION SIGN} "


def lead(config: Config) -> str:
    """The run in one line: its data, parts and latent dimensions."""
    dimensions = "one latent dimension" if config.latent_dim == 1 else f"{config.latent_dim} latent dimensions"
    return f"{dataset_name(config)}, {config.likelihood}, {config.network}, {config.guide}, {dimensions}"


def dataset_name(config: Config) -> str:
    """The dataset's name, or that of its file or folder."""
    return config.dataset if config.dataset in DATASETS else Path(config.dataset).name


def shape_of(data: dict[str, Any]) -> str:
    """The images' shape: channels, height and width."""
    return TIMES.join(map(str, data["shape"]))


def number(value: float | None) -> str:
    """A number with two decimals; a dash for None and for what is not finite."""
    return NONE if value is None or not math.isfinite(value) else f"{value:,.2f}"


def to_do(s: Subject, what: str, command: str) -> dict[str, Any]:
    """A section's text where there is nothing to show yet, and the command for it."""
    if has_no_density(s):
        return {"text": f"Not {what}: an autoencoder gives an image no probability."}
    words = [command, str(s.run), *(["--trust"] if s.trust and is_foreign(s.config.guide) else [])]
    return {"text": f"Not {what} yet. To do it:", "command": typed(*words)}


def has_no_density(s: Subject) -> bool:
    """Whether the run is an autoencoder, in whose metrics there is no ELBO."""
    return s.best["validation_elbo"] is None


def typed(*words: str) -> list[str]:
    """The words of a command, quoted for a shell."""
    return [shlex.quote(word) for word in ("python", "cli.py", *words)]


def outdated(s: Subject, settings: dict[str, Any]) -> list[str]:
    """Warns of numbers that belong to another epoch than the pictures do."""
    epoch, best = settings.get("epoch"), s.best["epoch"]
    return [] if epoch in (None, best) else [f"of the parameters of epoch {epoch}, not of the best, {best}"]

"""The run that a page describes, as its files have it."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyrovae import runs
from pyrovae.runs import assessment, laboratory, pictures
from pyrovae.runs.assessment import Assessment
from pyrovae.runs.config import Config
from pyrovae.runs.directories import read_settings
from pyrovae.runtime.parts import TrustError, TrustWarning
from pyrovae.runtime.schemas import Best, Row
from pyrovae.training.checkpoints import load_checkpoint
from pyrovae.vae import VAE
from pyrovae.variance.results import Comparison


@dataclass(frozen=True)
class Subject:
    """A run, with the contents of its files.

    Attributes:
        best: The metrics of the epoch whose parameters the VAE has.
        vae: None if it needs foreign code that is not trusted.
        untold: A sentence on what the page lacks for that reason; empty if it lacks nothing.
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


def read(run: Path, data_dir: str | Path | None, device: str, trust: bool) -> Subject:
    """Reads all files of a run that the page describes; `report` says what it warns of and raises."""
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
    variance, along = _measurements(run)
    return Subject(
        run,
        config,
        data,
        versions,
        history,
        best,
        vae,
        untold,
        assessment.read(run),
        variance,
        along,
        data_dir,
        device,
        trust,
    )


def _measurements(run: Path) -> tuple[Comparison | None, dict[int, Comparison] | None]:
    """The newest results of `variance` in the run: at one state, and along training."""
    paths = sorted(run.glob("*/variance.json"), key=lambda path: (path.stat().st_mtime_ns, path))
    found = {type(one): one for one in (laboratory.read(path.parent) for path in paths)}
    return found.get(Comparison), found.get(dict)

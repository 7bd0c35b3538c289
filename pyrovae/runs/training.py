"""A run directory: made, trained into, and continued.

config.json     the settings, the data's shape and checksum, and versions: enough to rebuild
metrics.jsonl   one line per epoch
checkpoint.pt   the state to continue from
best.pt         the parameters with the best validation objective
figures/        pictures
.lock           held by the process that writes to the run (see `locks`)
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pyrovae import figures
from pyrovae.data import Dataset
from pyrovae.runs.config import LONG, Config
from pyrovae.runs.directories import (
    LEFT,
    RunError,
    admit,
    check_new,
    describe,
    new_directory,
    read_config,
    record,
    same_data,
)
from pyrovae.runs.drawing import PICTURED, draw_figures
from pyrovae.runs.loading import load_best
from pyrovae.runtime import distributed
from pyrovae.runtime.schemas import State
from pyrovae.runtime.signals import DeferredSignals
from pyrovae.runtime.whole_files import clear_temporary, is_new, save_figure, write_atomically, write_errors
from pyrovae.training.checkpoints import explained, load_checkpoint, load_model, read_history
from pyrovae.training.fitting import check_trainable, fit
from pyrovae.training.loop import batch_sizes
from pyrovae.training.progress import Fit
from pyrovae.vae import VAE

# The settings that may differ on resuming; the data may only have moved.
MAY_CHANGE = ("epochs", "patience", "cuda", "compile", "dataset", "data_dir")


class StoppedError(OSError):
    """A failure of the system has stopped a run, which can go on from its last checkpoint afterwards.

    Attributes:
        run: Its directory.
    """

    run: Path


def train(
    config: Config, *, out: str | Path | None = None, quiet: bool = True, trust: bool = False
) -> tuple[Path, Fit]:
    """Trains a new run and leaves its directory.

    Args:
        out: The directory, which must not exist or be empty; `runs/<dataset>-<likelihood>-<n>` if None.
        quiet: No progress bar.
        trust: Whether to import foreign code that only a file names: of settings read from a recipe, say.

    Returns:
        The directory, and how training went.

    Raises:
        TrustError: There is such code, and `trust` is False.
        ValueError: The data or settings do not do; nothing was written.
        LockedError: Another process is writing to the directory.
        DivergedError: Training met a value that is not finite.
        WriteError: The run could not be begun: there is no space, say.
        StoppedError: Training was stopped by the system, and can go on by `resume`.

    Example:
        >>> from pyrovae import load
        >>> run, result = train(Config(epochs=1, limit=(64, 32)), out="runs/first")
        >>> load(run).sample(3).shape
        torch.Size([3, 1, 8, 8])
    """
    config.admit(trust=trust)
    with distributed.together():
        device = distributed.own_device(config.device())
    dataset = distributed.in_turn(config.make_dataset)
    if distributed.world() > 1 and len(set(distributed.gathered(json.dumps(describe(dataset))))) > 1:
        raise RunError(f"expected the same data for every process, got different ones of {config.dataset}")
    steps = config.epochs * len(batch_sizes(len(dataset.train), config.batch_size))
    chosen, config = config.compile, config.resolved(dataset.levels)
    if chosen == "auto":  # decided once: a resumed run goes on in the same mode
        config = replace(config, compile="on" if steps >= LONG else "off")
    vae = config.make_vae_for(dataset)
    check_trainable(vae, dataset.train, config.make_estimator(), config.batch_size)

    settings = record(config, dataset)  # first, so that no directory is left where it fails
    stem = Path("runs") / f"{Path(config.dataset).stem}-{config.likelihood}"
    directory = distributed.from_first(lambda: new_directory(stem, out, LEFT))

    def begin() -> None:
        check_new(directory, LEFT)  # by now another process may have come and gone
        write_atomically(directory / "config.json", settings)

    with distributed.locked(directory):
        distributed.from_first(begin)
        if chosen == "auto" and not quiet and distributed.rank() == 0:
            tqdm.write(f"compile {config.compile}, for {steps:,} steps", file=sys.stderr)
        return directory, _fit(directory, config, dataset.to(device), vae.to(device), resume=False, quiet=quiet)


def resume(
    run: str | Path, *, changes: dict[str, Any] | None = None, quiet: bool = True, trust: bool = False
) -> tuple[Path, Fit]:
    """Continues a run to its end, as if it had never been interrupted.

    Args:
        changes: New values of settings in MAY_CHANGE; others must be as the run has them.
        quiet: No progress bar.
        trust: Whether to import foreign code that the run names.

    Returns:
        The directory, and how training went; a run that was over is left as it is.

    Raises:
        RunError: The directory is no run, its data have changed, a change is not allowed, or it names foreign
            code and `trust` is False.
        CheckpointError: The checkpoint is missing, damaged or of another run.
        LockedError: Another process is writing to the run.
        StoppedError: Training was stopped by the system, and can go on by `resume`.
    """
    directory = Path(run)
    distributed.from_first(lambda: read_config(directory))  # no lock is left in what is no run
    with distributed.locked(directory):
        return directory, _resume(directory, changes or {}, quiet, trust)


def _resume(directory: Path, changes: dict[str, Any], quiet: bool, trust: bool) -> Fit:
    saved, described = distributed.from_first(lambda: read_config(directory))
    config = _changed(saved, changes)
    admit(directory, config, trust=trust)
    with distributed.together():
        device = distributed.own_device(config.device())
    dataset = distributed.in_turn(config.make_dataset)
    with distributed.together():
        if not same_data(described, dataset, config):
            raise RunError(
                f"expected the data that {directory} was trained on, got others from {config.dataset}"
            )
    vae = config.make_vae(dataset.shape, dataset.levels, dataset.classes).to(device)

    def begin() -> bool:
        trained = not is_new(directory, LEFT)
        if trained:
            # Damaged files must not cost the run its settings: they are read before those are written.
            if (directory / "best.pt").exists():
                load_best(directory, vae)
            state = load_checkpoint(directory / "checkpoint.pt", device, holds=State)
            with explained(directory / "checkpoint.pt"):
                load_model(vae, state["model"])
                done = state["progress"]["epoch"]
            read_history(directory, done)
            if config.epochs < done:
                raise RunError(
                    f"expected epochs >= {done}, which the run has done, got {config.epochs}", field="epochs"
                )
        if config != saved:
            write_atomically(directory / "config.json", record(config, dataset))
        return trained

    trained = distributed.from_first(begin)
    return _fit(directory, config, dataset.to(device), vae, resume=trained, quiet=quiet)


def _changed(config: Config, changes: dict[str, Any]) -> Config:
    if changes.get("compile") == "auto":
        changes = {name: value for name, value in changes.items() if name != "compile"}
    merged = config.to_json() | changes
    for name, value in merged.items():
        if name not in MAY_CHANGE and value != getattr(config, name):
            raise RunError(
                f"expected {name} as the run has it, {getattr(config, name)}, got {value}: "
                f"only {', '.join(MAY_CHANGE)} may change on resuming",
                field=name,
            )
    return Config.from_json(merged)


def _fit(directory: Path, config: Config, dataset: Dataset, vae: VAE, *, resume: bool, quiet: bool) -> Fit:
    """Trains in a directory that is locked, and draws the figures."""
    pictured = dataset.validation[:PICTURED]

    def picture(epoch: int) -> None:
        path = directory / "figures" / f"reconstructions-{epoch:04}.png"
        if distributed.rank() == 0 and epoch in config.figure_epochs and not path.exists():
            reconstructed = vae.reconstruct(pictured.pixels, pictured.labels)
            save_figure(figures.reconstructions(pictured.pixels, reconstructed, f"epoch {epoch}"), path)

    try:
        with DeferredSignals():  # from where all processes meet to where they part, so that none leaves early
            distributed.from_first(lambda: _prepare(directory))
            result = fit(
                vae,
                dataset.train,
                dataset.validation,
                estimator=config.make_estimator(),
                epochs=config.epochs,
                batch_size=config.batch_size,
                lr=config.lr,
                kl_warmup=config.kl_warmup,
                compile=config.compile == "on",
                bf16=config.bf16,
                patience=config.patience,
                seed=config.seed,
                directory=directory,
                resume=resume,
                on_epoch=picture,
                quiet=quiet,
            )
            if result.progress.finished:
                distributed.from_first(lambda: draw_figures(directory, dataset, vae))
    except distributed.LostProcess:
        raise
    except OSError as error:
        stopped = StoppedError(str(error))
        stopped.run = directory
        raise stopped from error
    return result


def _prepare(directory: Path) -> None:
    """Makes the folder of figures, and clears away what an ended process has left."""
    place = directory / "figures"
    with write_errors(place):
        place.mkdir(exist_ok=True)
    for part in (directory, place):
        clear_temporary(part)

"""Grids of training runs: one run directory for each cell, continued after a kill, summed up in a table.

sweep.json      the cells: what each sets, beside what they share
cells/          each cell's settings as a recipe, and what its process printed
<cell>/         its run directory
.lock           held by the process that runs the sweep (see `locks`)
results.csv     the table: mean and spread over seeds; results.md the same for reading
curves.png      validation ELBO of all runs over epochs
"""

import itertools
import json
import math
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from pyrovae.runs.config import Config
from pyrovae.runs.training import is_complete
from pyrovae.runtime import distributed, locks, schemas
from pyrovae.runtime.parts import TrustError, is_foreign
from pyrovae.runtime.processes import Processes
from pyrovae.runtime.schemas import check, refused
from pyrovae.runtime.signals import DeferredSignals, Interrupted
from pyrovae.runtime.texts import in_markdown
from pyrovae.runtime.whole_files import WriteError, clear_temporary, is_new, write_atomically, write_errors
from pyrovae.training.checkpoints import CheckpointError, read_metrics

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MOST_CELLS = 10_000
ORPHANED = 60.0  # seconds for a cell whose sweep was killed to save its state and end
Settings = dict[str, Any]
METRICS = {
    "loss_without_constant": "final training loss, SSE/(2c) + KL",
    "elbo": "final training ELBO",
    "validation_elbo": "best validation ELBO",
    "validation_reconstruction": "best validation reconstruction",  # of an autoencoder, which has no ELBO
}  # columns of the table, in nats per image


class SweepError(ValueError):
    """A recipe or a sweep's directory is not what it should be."""


@dataclass(frozen=True)
class Recipe:
    """An experiment: settings that its cells share, and those of each cell.

    Attributes:
        cells: For each cell, what it sets beyond `shared`.
        shared: Settings of all cells.
        description: What the experiment is.

    Raises:
        SweepError: A cell's settings are no Config.
    """

    cells: tuple[Settings, ...]
    shared: Settings
    description: str = ""

    def __post_init__(self):
        for cell in self.cells:
            try:
                self.config(cell)
            except ValueError as error:
                raise SweepError(f"{error}{_in(cell)}") from None

    def admit(self, *, trust: bool) -> bool:
        """Imports what the cells name of one's own, if trusted, so that no cell starts with a wrong name.

        Returns:
            Whether there is foreign code, which the cells must be told to trust.

        Raises:
            TrustError: A cell names foreign code that is not trusted.
            SweepError: A cell names foreign code that is not there.
        """
        configs = [self.config(cell) for cell in self.cells]
        for cell, config in zip(self.cells, configs, strict=True):
            try:
                config.admit(trust=trust)
            except TrustError:
                raise
            except ValueError as error:
                raise SweepError(f"{error}{_in(cell)}") from None
        return any(is_foreign(config.guide) for config in configs)

    def config(self, cell: Settings) -> Config:
        """A cell's settings as a whole."""
        return Config.from_json(_typed(self.shared | cell))


def grid(over: Mapping[str, Sequence[Any]], variants: Sequence[Settings] = ({},)) -> tuple[Settings, ...]:
    """Every combination of values, for each variant.

    Raises:
        SweepError: They are more than MOST_CELLS.
    """
    number = len(variants) * math.prod(map(len, over.values()))
    if number > MOST_CELLS:
        raise SweepError(f"expected at most {MOST_CELLS:,} runs, got {number:,}")
    products = itertools.product(*over.values())
    combinations = [dict(zip(over, values, strict=True)) for values in products]
    return tuple(variant | combination for variant in variants for combination in combinations)


def without_repeats(cells: Sequence[Settings], settings: Settings) -> tuple[Settings, ...]:
    """The cells without these settings, each once."""
    left = [{name: value for name, value in cell.items() if name not in settings} for cell in cells]
    return tuple(cell for i, cell in enumerate(left) if cell not in left[:i])


def read_recipe(name: str) -> Recipe:
    """A recipe by its name in pyrovae/recipes, or by the path of a TOML file.

    `[train]` has the settings that all runs share; `[over]` lists of values, every combination of
    which is a cell; each `[[variants]]` further settings of a set of cells.

    Raises:
        SweepError: There is no such recipe, or it is not one.
    """
    path = Path(name) if name.lower().endswith(".toml") else files("pyrovae.runs.recipes") / f"{name}.toml"
    try:
        text = path.read_bytes()
    except OSError:
        raise SweepError(f"expected recipe in {', '.join(recipes())} or a .toml file, got {name!r}") from None
    with refused(SweepError, f"recipe in TOML at {name}"):
        contents = tomllib.loads(text.decode())
        check(contents, schemas.Recipe)
    unknown = contents.keys() - schemas.Recipe.__annotations__.keys()
    if unknown:
        raise SweepError(
            f"expected recipe with description, train, over and variants, got {sorted(unknown)[0]}"
        )
    cells = grid(contents.get("over", {}), contents.get("variants", [{}]))
    return Recipe(cells, contents.get("train", {}), contents.get("description", ""))


def recipes() -> list[str]:
    """The names of the recipes that come with the package."""
    return sorted(p.name.removesuffix(".toml") for p in files("pyrovae.runs.recipes").iterdir())


def name_of(cell: Settings) -> str:
    """A cell's directory: what it sets, or "run" for the only cell, which sets nothing."""
    text = "_".join(f"{name}-{_text(value)}" for name, value in cell.items())
    return "".join(c if c.isalnum() or c in "-_.+" else "-" for c in text) or "run"


def _in(cell: Settings) -> str:
    """Names the cell at the end of an error, where there are several."""
    return f" in the cell {name_of(cell)}" if cell else ""


@dataclass(frozen=True)
class Sweep:
    """A directory in which the cells of a recipe are run.

    Attributes:
        trust: Whether the cells may import foreign code that the recipe names.

    Raises:
        SweepError: The directory has other files, or another sweep.
    """

    directory: Path
    recipe: Recipe
    trust: bool = False

    def __post_init__(self):
        self._check_place()  # no lock is left in what is no sweep
        try:
            with write_errors(self.directory):
                self._begin()
        except WriteError as error:
            if not error.of_place:
                raise
            raise SweepError(
                f"expected out where a sweep can be written, got {self.directory}: {error.reason}"
            ) from None

    def _begin(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        with distributed.locked(self.directory):
            self._check_place()
            path = self.directory / "sweep.json"
            contents = {"shared": self.recipe.shared, "cells": list(self.recipe.cells)}
            if not path.exists():
                (self.directory / "cells").mkdir(exist_ok=True)
                write_atomically(path, json.dumps(contents, indent=2) + "\n")
                return
            with refused(SweepError, f"the cells of a sweep in {path}"):
                found = json.loads(path.read_bytes())
                check(found, schemas.Sweep)
            if found != json.loads(json.dumps(contents)):
                raise SweepError(
                    f"expected out to be new or of the same sweep, got {self.directory} of another"
                )

    def _check_place(self) -> None:
        place = self.directory
        if place.exists() and not (place / "sweep.json").exists() and not is_new(place, ("cells",)):
            raise SweepError(f"expected out to be a new or empty directory, got {place}, which has files")

    def run(
        self, jobs: int = 1, report: Callable[[str, str], Any] = lambda cell, outcome: None
    ) -> dict[str, str]:
        """Runs, continues or skips each cell, in so many processes; one that fails does not stop the rest.

        SIGINT and SIGTERM are passed on to the cells that are running, and are acted on when these have ended.

        Args:
            report: Called with a cell's name and "finished", "skipped" or why it failed.

        Returns:
            Why cells failed, by name.

        Raises:
            LockedError: Another process runs this sweep.
            WriteError: The directory cannot be written to.
            Interrupted: A signal stopped it.
        """
        failed, processes = {}, Processes()
        with (
            distributed.locked(self.directory),
            DeferredSignals(processes.stop) as signals,
            ThreadPoolExecutor(jobs) as pool,
        ):
            clear_temporary(self.directory / "cells")
            running = {
                name_of(cell): pool.submit(self._run_cell, cell, processes) for cell in self.recipe.cells
            }
            for name, future in running.items():
                outcome = future.result()
                if signals.received is not None:
                    continue
                report(name, outcome)
                if outcome not in ("finished", "skipped"):
                    failed[name] = outcome
        if signals.received is not None:
            raise Interrupted(signals.received)
        return failed

    def _run_cell(self, cell: Settings, processes: Processes) -> str:
        try:
            return self._outcome(cell, processes)
        except OSError as error:
            return str(error)

    def _outcome(self, cell: Settings, processes: Processes) -> str:
        name = name_of(cell)
        run, recipe = self.directory / name, self.directory / "cells" / f"{name}.toml"
        other = _other_writer(run, processes)
        if other:
            return str(locks.LockedError.of(run, other))
        if processes.stopped is not None:
            return "stopped"
        state = _state(run)
        if state == "finished":
            return "skipped"
        if state == "unfinished":
            arguments = ["--resume", str(run)]
        elif state:
            return state
        else:
            write_atomically(recipe, _toml(self.recipe.shared | cell))
            arguments = ["--recipe", str(recipe), "--out", str(run)]
        printed = self.directory / "cells" / f"{name}.log"
        with open(printed, "a") as log:
            before = log.tell()  # what it printed when it was started before
            command = [sys.executable, "-m", "pyrovae.cli.cell", "train", *arguments, "--quiet"]
            command += ["--trust"] if self.trust else []
            code = processes.run(command, log, distributed.without_launcher(os.environ))
        return _ending(code, printed.read_bytes()[before:].decode(errors="replace"))

    def table(self) -> list[dict[str, Any]]:
        """A row for each cell but for its seed: its settings, the number of seeds, mean and spread of metrics.

        Only finished cells count. The spread is the standard deviation, None for one seed.
        """
        groups: dict[str, tuple[Settings, list[Settings]]] = {}
        for cell in self.recipe.cells:
            run = self.directory / name_of(cell)
            if _state(run) == "finished":
                settings = {name: value for name, value in cell.items() if name != "seed"}
                groups.setdefault(name_of(settings), (settings, []))[1].append(_metrics(run))
        rows = []
        for settings, found in groups.values():
            row = {name: _text(value) for name, value in settings.items()} | {"seeds": len(found)}
            for metric in METRICS:
                values = [one[metric] for one in found if one[metric] is not None]
                row[metric] = statistics.mean(values) if values else None
                row[f"{metric}_spread"] = statistics.stdev(values) if len(values) > 1 else None
            rows.append(row)
        return rows

    def histories(self) -> dict[str, list[dict]]:
        """The metrics of every run that has any, by cell."""
        found = {name_of(cell): read_metrics(self.directory / name_of(cell)) for cell in self.recipe.cells}
        return {name: rows for name, rows in found.items() if rows}


def to_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table for reading: mean, and the spread over seeds behind it, in nats per image."""
    shown = [metric for metric in METRICS if any(row[metric] is not None for row in rows)]
    plain = [
        n for n in dict.fromkeys(n for row in rows for n in row) if n.removesuffix("_spread") not in METRICS
    ]
    lines = [[*plain, *(METRICS[metric] for metric in shown)]]
    for row in rows:
        cells = [in_markdown(str(row.get(name, ""))) for name in plain]
        for metric in shown:
            mean, spread = row[metric], row[f"{metric}_spread"]
            cells.append(
                "" if mean is None else f"{mean:.2f}" if spread is None else f"{mean:.2f} ± {spread:.2f}"
            )
        lines.append(cells)
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _ending(code: int, printed: str) -> str:
    """How a process ended: "finished", the signal that ended it, or what it printed last.

    Args:
        code: 0; minus the number of the signal that killed it; 128 and the number of the signal at which it
            stopped by itself; or the exit code of a failure.
    """
    signals = {number.value: number.name for number in signal.Signals}
    if code == 0:
        return "finished"
    if code < 0:
        return f"killed by {signals.get(-code, f'signal {-code}')}"
    if code - 128 in signals:
        return f"stopped by {signals[code - 128]}"
    lines = printed.strip().splitlines() or [f"exit code {code} without a word"]
    return lines[-1].removeprefix("Error: ")


def _state(run: Path) -> str:
    """ "finished", "unfinished", "" where there is nothing to continue, or what is wrong with it."""
    if not (run / "checkpoint.pt").exists():
        return ""
    try:
        return "finished" if is_complete(run) else "unfinished"
    except CheckpointError as error:
        return str(error)


def _other_writer(run: Path, processes: Processes) -> str:
    """Who is still writing to a run after ORPHANED seconds, in words; "" if nobody is."""
    deadline = time.monotonic() + ORPHANED
    while (other := locks.holder(run)) and time.monotonic() < deadline and processes.stopped is None:
        time.sleep(0.1)
    return other


def _metrics(run: Path) -> Settings:
    rows = read_metrics(run)
    best, last = max(rows, key=lambda row: row["validation_bound"]), rows[-1]
    objective = last["reconstruction"] if last["elbo"] is None else last["elbo"]
    loss = last["loss_without_constant"]
    return {
        "loss_without_constant": None if loss == -objective else loss,  # None: nothing was left out
        "elbo": last["elbo"],
        "validation_elbo": best["validation_elbo"],
        "validation_reconstruction": best["validation_reconstruction"] if last["elbo"] is None else None,
    }


def _typed(settings: Settings) -> Settings:
    """TOML's integers where a field takes any number."""
    floats = {field.name for field in fields(Config) if field.metadata["parse"] is float}
    return {n: float(v) if n in floats and isinstance(v, int) else v for n, v in settings.items()}


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _toml(settings: Settings) -> str:
    """A recipe of one run; JSON's strings, numbers, booleans and arrays are TOML's."""
    lines = [f"{name} = {json.dumps(value)}\n" for name, value in settings.items() if value is not None]
    return "".join(["[train]\n", *lines])

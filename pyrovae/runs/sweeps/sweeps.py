"""The directory in which the cells of a recipe are run, each by a process of its own."""

import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyrovae.runs.drawing import is_complete
from pyrovae.runs.sweeps.cells import Recipe, Settings, SweepError, name_of, text_of
from pyrovae.runs.sweeps.tables import METRICS, metrics_of
from pyrovae.runtime import distributed, locks, schemas
from pyrovae.runtime.processes import Processes
from pyrovae.runtime.schemas import check, refused
from pyrovae.runtime.signals import DeferredSignals, Interrupted
from pyrovae.runtime.whole_files import WriteError, clear_temporary, is_new, write_atomically, write_errors
from pyrovae.training.checkpoints import CheckpointError, read_metrics

ORPHANED = 60.0  # seconds for a cell whose sweep was killed to save its state and end


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
                f"expected out where a sweep can be written, got {self.directory}: {error.reason}", field="out"
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
                    f"expected out to be new or of the same sweep, got {self.directory} of another", field="out"
                )

    def _check_place(self) -> None:
        place = self.directory
        if place.exists() and not (place / "sweep.json").exists() and not is_new(place, ("cells",)):
            raise SweepError(
                f"expected out to be a new or empty directory, got {place}, which has files", field="out"
            )

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
                groups.setdefault(name_of(settings), (settings, []))[1].append(metrics_of(run))
        rows = []
        for settings, found in groups.values():
            row = {name: text_of(value) for name, value in settings.items()} | {"seeds": len(found)}
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


def _ending(code: int, printed: str) -> str:
    """Names the end of a process: "finished", the signal that ended it, or what it printed last.

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
    """Names the process that still writes to a run after ORPHANED seconds; "" if there is none."""
    deadline = time.monotonic() + ORPHANED
    while (other := locks.holder(run)) and time.monotonic() < deadline and processes.stopped is None:
        time.sleep(0.1)
    return other


def _toml(settings: Settings) -> str:
    """A recipe of one run; JSON's strings, numbers, booleans and arrays are TOML's."""
    lines = [f"{name} = {json.dumps(value)}\n" for name, value in settings.items() if value is not None]
    return "".join(["[train]\n", *lines])

"""The files of a run, as training writes and reads them: `checkpoint.pt`, `best.pt` and `metrics.jsonl`.

What a run needs to continue is in one `checkpoint.pt`: the model, the optimizer, the position in the
epoch, its sums, the early-stopping counters and every random state. The order of the data is a
function of (seed, epoch), and the KL warm-up one of the step, so neither needs state.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pyrovae.runtime import distributed, locks
from pyrovae.runtime.schemas import Row, State
from pyrovae.runtime.whole_files import append_line, write_atomically, write_errors
from pyrovae.training.checkpoints import FORMAT, load_checkpoint, read_history, save_atomically


@dataclass(frozen=True)
class RunFiles:
    """The files in a run's directory, which the first process writes for all."""

    directory: Path

    @property
    def checkpoint(self) -> Path:
        """Where the state to continue from lies."""
        return self.directory / "checkpoint.pt"

    def save(self, state: dict[str, Any], own: dict[str, Any], row: Row | None, *, best: bool) -> None:
        """Writes best.pt, metrics.jsonl and checkpoint.pt, in this order, each as a whole or not at all.

        Args:
            state: The part that all processes share.
            own: The part that each process has for itself.
            row: The metrics of the epoch that has just ended, if one has.
            best: Whether that epoch is the best so far.

        Raises:
            WriteError: The first process cannot; raised by all.
        """
        first, *others = distributed.gathered(own)
        with distributed.together():
            if distributed.rank() == 0:
                self._write({"format": FORMAT, **state, **first, "others": others}, row, best)

    def _write(self, state: dict[str, Any], row: Row | None, best: bool) -> None:
        with write_errors(self.directory):
            locks.check(self.directory)
        if row is not None:
            if best:
                saved = {"format": FORMAT, "epoch": row["epoch"], "model": state["model"]}
                save_atomically(saved, self.directory / "best.pt")
            append_line(self.directory / "metrics.jsonl", json.dumps(row))
        save_atomically(state, self.checkpoint)

    def read(self, device: torch.device) -> dict[str, Any]:
        """The checkpoint, which the first process alone may have at hand."""
        if distributed.world() == 1:
            return load_checkpoint(self.checkpoint, device, holds=State)
        distributed.from_first(lambda: load_checkpoint(self.checkpoint, "cpu", holds=State) and None)
        contents = distributed.from_first(self.checkpoint.read_bytes)
        return load_checkpoint(self.checkpoint, device, contents, holds=State)

    def history(self, epochs: int) -> list[Row]:
        """The metrics of these many epochs; those of epochs after the checkpoint are dropped from the file."""
        rows = distributed.from_first(lambda: read_history(self.directory, epochs))
        text = "".join(json.dumps(row) + "\n" for row in rows)
        distributed.from_first(lambda: write_atomically(self.directory / "metrics.jsonl", text))
        return rows

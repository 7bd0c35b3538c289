"""Where a training run stands, what it returns, and one epoch in a few words."""

import signal
from dataclasses import dataclass, field

from pyrovae.runtime.schemas import Row


class DivergedError(ArithmeticError):
    """Training met a value that is not finite; what was saved before is untouched."""


@dataclass
class Progress:
    """Where a training run stands.

    Attributes:
        epoch: Epochs completed.
        batch: Batches completed of the next epoch.
        best: The highest validation objective so far, in nats per image; None before the first.
        best_epoch: Its epoch, from 1.
        stale: Epochs since then.
        finished: Why the run is over ("epochs" or "patience"), or "" if it is not.
    """

    epoch: int = 0
    batch: int = 0
    best: float | None = None
    best_epoch: int = 0
    stale: int = 0
    finished: str = ""

    def check(self, batches: int) -> None:
        """Checks that training can stand here, with these many batches in an epoch.

        Raises:
            ValueError: It cannot.
        """
        if self.batch >= batches:
            raise ValueError(f"{self.batch} batches done of an epoch of {batches}")
        if not (self.best_epoch <= self.epoch and (self.best is None) == (self.best_epoch == 0)):
            raise ValueError(f"epoch {self.best_epoch} as the best of {self.epoch}, with {self.best}")

    def finish_epoch(self, objective: float) -> None:
        """Counts an epoch, and whether its validation objective is the best so far."""
        self.epoch, self.batch = self.epoch + 1, 0
        if self.best is None or objective > self.best:
            self.best, self.best_epoch, self.stale = objective, self.epoch, 0
        else:
            self.stale += 1


@dataclass
class Fit:
    """The result of `fit`: one row of metrics per epoch, where it stands, and the signal that stopped it."""

    history: list[Row] = field(default_factory=list)
    progress: Progress = field(default_factory=Progress)
    stopped_by: signal.Signals | None = None


def describe(row: Row) -> str:
    """One epoch in a few words: ELBO, reconstruction and KL, the validation ELBO, and a tighter bound."""
    if row["elbo"] is None:
        return f"rec {row['reconstruction']:.2f}, validation {row['validation_reconstruction']:.2f}"
    text = (
        f"ELBO {row['elbo']:.2f} = rec {row['reconstruction']:.2f} - KL {row['kl']:.2f}, "
        f"validation {row['validation_elbo']:.2f}"
    )
    of_weights = row["validation_bound"] != row["validation_reconstruction"]  # which bounds nothing
    tighter = row["beta"] == 1 and of_weights and row["validation_bound"] - row["validation_elbo"] > 1e-3
    return f"{text} (bound {row['validation_bound']:.2f})" if tighter else text

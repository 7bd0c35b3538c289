"""Training: the loop, the kinds of step, the files that a run can go on from, and how many processes share one.

`fit` is the whole of it; `Trainer.run_epoch` is one epoch by itself.
"""

from pyrovae.training.fitting import check_trainable, fit
from pyrovae.training.loop import Settings, Trainer, batch_sizes
from pyrovae.training.precision import Bfloat16Layers
from pyrovae.training.progress import DivergedError, Fit, Progress, describe

__all__ = [
    "Bfloat16Layers",
    "DivergedError",
    "Fit",
    "Progress",
    "Settings",
    "Trainer",
    "batch_sizes",
    "check_trainable",
    "describe",
    "fit",
]

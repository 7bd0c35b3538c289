"""The training loop, its checkpoints, and what it leaves."""

from pyrovae.training.loop import (
    Bfloat16Layers,
    DivergedError,
    Fit,
    Progress,
    batch_sizes,
    check_trainable,
    describe,
    fit,
)

__all__ = [
    "Bfloat16Layers",
    "DivergedError",
    "Fit",
    "Progress",
    "batch_sizes",
    "check_trainable",
    "describe",
    "fit",
]

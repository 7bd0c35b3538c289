"""Denormal numbers, which a CPU handles tens of times more slowly than others unless they count as zero."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def flushed_denormals() -> Iterator[None]:
    """While entered, numbers below the smallest normal one count as zero in this thread, on a CPU.

    Such numbers come up in Adam's moments of weights that seldom have a gradient, and in the normalised
    weights of many particles. Threads that PyTorch starts meanwhile flush them too, and go on doing so.
    """
    flushed = flushes_denormals()
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(flushed)


def start_workers() -> None:
    """Starts PyTorch's threads on a CPU, if there are none yet, such that they flush denormals."""
    with flushed_denormals():
        torch.ones(2**20).sum()


def flushes_denormals() -> bool:
    """Whether denormal numbers count as zero in this thread."""
    return bool(torch.full((1,), 2.0**-1022, dtype=torch.float64).div(4) == 0)

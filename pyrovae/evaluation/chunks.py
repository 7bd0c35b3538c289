"""What estimates of log p(x) share: checks, how much is decoded at a time, and evaluation mode."""

import contextlib
import math
from collections.abc import Callable, Iterator

import pyro
from torch import Tensor

from pyrovae.runtime.errors import FieldError
from pyrovae.runtime.random_states import seeded
from pyrovae.vae import VAE

Progress = Callable[[int, int, str], None]  # (done, total, what)
NUMBERS = 2**22  # that the decoder gives at a time, unless a batch size says otherwise


def check(vae: VAE, x: Tensor, **numbers: int | None) -> None:
    """Checks at the door that numbers are positive and that x is what `VAE.observe` gives for this VAE."""
    check_positive(images=len(x), **numbers)
    vae.check_observed(x)


def check_positive(**numbers: int | None) -> None:
    """Checks at the door that numbers are positive where they are given."""
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise FieldError(f"expected {name} >= 1, got {number}", field=name)


def chunk_size(vae: VAE, batch_size: int | None) -> int:
    """The number of decoded images to hold at a time."""
    return batch_size or max(1, NUMBERS // (math.prod(vae.decoder.shape) * vae.likelihood.outputs))


def report(progress: Progress | None, done: int, total: int, what: str) -> None:
    """Tells how much of the work is done, where somebody wants to know."""
    if progress is not None:
        progress(done, total, what)


@contextlib.contextmanager
def evaluating(vae: VAE, seed: int) -> Iterator[None]:
    """Puts the VAE into evaluation mode, with noise from the seed; on leaving, all is as it was."""
    with vae.evaluating(), seeded(seed, vae.zeros.device), pyro.validation_enabled(False):
        yield

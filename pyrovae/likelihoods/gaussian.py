"""Grey pixels under a Gaussian, whose variance is given or learned."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import pyro.distributions as dist
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.distributions import Distribution

from pyrovae.likelihoods.base import Likelihood
from pyrovae.runtime.errors import FieldError
from pyrovae.runtime.inputs import check_floats


@dataclass(frozen=True, kw_only=True)
class Gaussian(Likelihood):
    """Grey pixels under N(sigmoid(eta), c I).

    Args:
        c: The variance of a pixel (not its scale), or "learned": one number for all pixels,
            learned with the networks from 0.05.

    Raises:
        ValueError: c is not positive and finite, nor "learned".
    """

    c: float | Literal["learned"] = 0.05

    def __post_init__(self):
        if self.c != "learned" and not (isinstance(self.c, float | int) and 0 < self.c < math.inf):
            raise FieldError(f"expected c to be a finite variance > 0 or 'learned', got {self.c!r}", field="c")

    @property
    def learned(self) -> Mapping[str, float]:
        return {"log_c": math.log(0.05)} if self.c == "learned" else {}

    def can_observe(self, x: Shaped[Tensor, "*batch D"], **learned: Tensor) -> Bool[Tensor, "*batch"]:
        # The support is all numbers, but a draw is never 10 standard deviations away from every mean.
        far = 10 * (learned["log_c"].exp() if self.c == "learned" else torch.tensor(self.c)).sqrt()
        return ((x >= -far) & (x <= 1 + far)).all(-1)

    def __call__(self, eta: Float[Tensor, "*batch D outputs"], **learned: Tensor) -> Distribution:
        mean = self.mean(eta)
        # A tensor made where the mean lies: a Python number would be copied there, and waited for.
        variance = learned["log_c"].exp() if self.c == "learned" else mean.new_full((), self.c)
        return dist.Normal(mean, variance.sqrt()).to_event(1)

    def observe(
        self, pixels: Float[Tensor, "*batch D"], generator: torch.Generator | None = None
    ) -> Shaped[Tensor, "*batch D"]:
        check_floats(pixels)
        return pixels

    def to_pixels(self, x: Shaped[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        return x

    def mean(self, eta: Float[Tensor, "*batch D outputs"]) -> Float[Tensor, "*batch D"]:
        return eta.squeeze(-1).sigmoid()

    def log_constant(self, num_pixels: int) -> float | None:
        return None if self.c == "learned" else -0.5 * num_pixels * math.log(2 * math.pi * self.c)

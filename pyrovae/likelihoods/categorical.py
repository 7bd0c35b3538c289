"""Pixels as one of several grey levels."""

from dataclasses import dataclass
from typing import ClassVar

import pyro.distributions as dist
import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.distributions import Distribution

from pyrovae.likelihoods.base import Likelihood
from pyrovae.runtime.errors import FieldError
from pyrovae.runtime.inputs import check_floats


@dataclass(frozen=True, kw_only=True)
class Categorical(Likelihood):
    """One of `levels` grey levels per pixel, with probabilities softmax(eta).

    Args:
        levels: The number of grey levels; a pixel in [0, 1] is level round(pixel * (levels - 1)).

    Raises:
        ValueError: Fewer than 2 or more than 256 levels.
    """

    levels: int = 256
    discrete: ClassVar[bool] = True

    def __post_init__(self):
        if not 2 <= self.levels <= 256:
            raise FieldError(f"expected levels from 2 to 256, got {self.levels}", field="levels")

    @property
    def outputs(self) -> int:
        return self.levels

    def __call__(self, eta: Float[Tensor, "*batch D outputs"], **learned: Tensor) -> Distribution:
        return dist.Categorical(logits=eta).to_event(1)

    def observe(
        self, pixels: Float[Tensor, "*batch D"], generator: torch.Generator | None = None
    ) -> Shaped[Tensor, "*batch D"]:
        check_floats(pixels)
        return (pixels * (self.levels - 1)).round().long()

    def to_pixels(self, x: Shaped[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        return x.to(torch.get_default_dtype()) / (self.levels - 1)

    def from_pixels(self, pixels: Float[Tensor, "*batch D"]) -> Shaped[Tensor, "*batch D"]:
        return self.observe(pixels)

    def mean(self, eta: Float[Tensor, "*batch D outputs"]) -> Float[Tensor, "*batch D"]:
        grey = torch.linspace(0, 1, self.levels, dtype=eta.dtype, device=eta.device)
        return (eta.softmax(-1) @ grey).clamp(max=1)  # rounding may lead out of [0, 1]

    def log_constant(self, num_pixels: int) -> float | None:
        return 0.0

"""Binary pixels, and the ways in which grey pixels become binary ones."""

from collections.abc import Callable
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.distributions import Distribution, constraints

from pyrovae.likelihoods.base import Likelihood
from pyrovae.runtime.errors import FieldError
from pyrovae.runtime.inputs import check_floats


class SoftBernoulli(dist.Bernoulli):
    """A Bernoulli scored on grey levels x in [0, 1]: x log p + (1 - x) log(1 - p), a pseudo-likelihood.

    It does not integrate to one over [0, 1] (Loaiza-Ganem & Cunningham, 2019,
    https://arxiv.org/abs/1907.06845), so no bound or bits per dimension follow from it.
    """

    support = constraints.unit_interval


def _soft(pixels: Tensor, generator: torch.Generator | None) -> Tensor:
    return pixels


def _stochastic(pixels: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.bernoulli(pixels, generator=generator)


def _threshold(pixels: Tensor, generator: torch.Generator | None) -> Tensor:
    return (pixels >= 0.5).to(pixels.dtype)


BINARIZATIONS: dict[str, Callable[[Tensor, torch.Generator | None], Tensor]] = {
    "stochastic": _stochastic,
    "threshold": _threshold,
    "soft": _soft,
}


@dataclass(frozen=True, kw_only=True)
class Bernoulli(Likelihood):
    """Binary pixels, p(x=1) = sigmoid(eta).

    Args:
        binarize: How grey pixels become observations: `stochastic`, drawn anew each time they are
            seen with the pixel as probability; `threshold`, at 0.5; `soft`, left grey, which makes
            this a pseudo-likelihood (see SoftBernoulli).

    Raises:
        ValueError: An unknown binarization.
    """

    binarize: str = "stochastic"

    def __post_init__(self):
        if self.binarize not in BINARIZATIONS:
            raise FieldError(
                f"expected binarize in {', '.join(BINARIZATIONS)}, got {self.binarize!r}", field="binarize"
            )

    @property
    def normalised(self) -> bool:
        return self.binarize != "soft"

    @property
    def discrete(self) -> bool:
        return self.normalised

    def __call__(self, eta: Float[Tensor, "*batch D outputs"], **learned: Tensor) -> Distribution:
        family = dist.Bernoulli if self.normalised else SoftBernoulli
        return family(logits=eta.squeeze(-1)).to_event(1)

    def observe(
        self, pixels: Float[Tensor, "*batch D"], generator: torch.Generator | None = None
    ) -> Shaped[Tensor, "*batch D"]:
        check_floats(pixels)
        return BINARIZATIONS[self.binarize](pixels, generator)

    def to_pixels(self, x: Shaped[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        return x

    def from_pixels(self, pixels: Float[Tensor, "*batch D"]) -> Shaped[Tensor, "*batch D"]:
        return self.observe(pixels) if self.binarize == "threshold" else pixels

    def mean(self, eta: Float[Tensor, "*batch D outputs"]) -> Float[Tensor, "*batch D"]:
        return eta.squeeze(-1).sigmoid()

    def log_constant(self, num_pixels: int) -> float | None:
        return 0.0

"""Grey pixels under the continuous Bernoulli, with a distribution that is exact for any logit."""

from dataclasses import dataclass
from typing import ClassVar

import pyro.distributions as dist
import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.distributions import Distribution, constraints

from pyrovae.likelihoods.base import Likelihood
from pyrovae.runtime.inputs import check_floats


class ContinuousBernoulliDistribution(dist.TorchDistribution):
    """The continuous Bernoulli, p(x) = exp(eta x) eta / (exp(eta) - 1) on [0, 1].

    Written in terms of log(sinh(a) / a), a = eta / 2, which is exact for any logit. torch's own
    clamps the probability, which in float32 stops the density and its gradient at |eta| = 16, a
    common value on the black margins of images.

    Args:
        logits: eta, any shape.

    Source: The continuous Bernoulli, Loaiza-Ganem & Cunningham, 2019,
    https://arxiv.org/abs/1907.06845, eq. 5.
    """

    arg_constraints: ClassVar = {"logits": constraints.real}
    support = constraints.unit_interval
    has_rsample = True

    def __init__(self, logits: Float[Tensor, "..."], validate_args: bool | None = None):
        self.logits = logits
        super().__init__(logits.shape, validate_args=validate_args)

    def expand(self, batch_shape, _instance=None):
        return ContinuousBernoulliDistribution(self.logits.expand(batch_shape), validate_args=False)

    @property
    def mean(self) -> Tensor:
        """Gradients are those of the true mean everywhere, 1/12 at eta = 0."""
        a = 0.5 * self.logits
        near, safe = _split(a)
        langevin = torch.where(
            near, a / 3 - a**3 / 45 + 2 * a**5 / 945 - a**7 / 4725, 1 / safe.tanh() - 1 / safe
        )
        return 0.5 + 0.5 * langevin

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return self.logits * (value - 0.5) - _log_sinhc(0.5 * self.logits)

    def rsample(self, sample_shape=()) -> Tensor:
        """By the inverse distribution function, from the side on which it is well conditioned."""
        eta = self.logits.expand(self.shape(torch.Size(sample_shape)))
        u = torch.rand_like(eta)
        down = torch.where(eta > 0, -eta, eta)  # not -abs(eta), whose gradient at 0 is 0
        small = down > -1e-3
        safe = torch.where(small, torch.ones_like(down), down)
        x = torch.where(small, u + 0.5 * down * u * (1 - u), (u * safe.expm1()).log1p() / safe)
        return torch.where(eta > 0, 1 - x, x)


def _split(a: Tensor) -> tuple[Tensor, Tensor]:
    """Where |a| < 0.1, and `a` with a harmless value there, so that unused branches stay finite."""
    near = a.abs() < 0.1
    return near, torch.where(near, torch.ones_like(a), a)


def _log_sinhc(a: Tensor) -> Tensor:
    """log(sinh(a) / a), to machine precision: a Taylor series below 0.1, no overflow above."""
    near, safe = _split(a)
    b = safe.abs()
    square = torch.where(near, a, torch.zeros_like(a)) ** 2
    series = square / 6 - square**2 / 180 + square**3 / 2835 - square**4 / 37800
    return torch.where(near, series, b + torch.log1p(-torch.exp(-2 * b)) - torch.log(2 * b))


@dataclass(frozen=True, kw_only=True)
class ContinuousBernoulli(Likelihood):
    """Grey pixels in [0, 1] under the normalised continuous Bernoulli with logit eta."""

    def __call__(self, eta: Float[Tensor, "*batch D outputs"], **learned: Tensor) -> Distribution:
        return ContinuousBernoulliDistribution(eta.squeeze(-1)).to_event(1)

    def observe(
        self, pixels: Float[Tensor, "*batch D"], generator: torch.Generator | None = None
    ) -> Shaped[Tensor, "*batch D"]:
        check_floats(pixels)
        return pixels

    def to_pixels(self, x: Shaped[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        return x

    def mean(self, eta: Float[Tensor, "*batch D outputs"]) -> Float[Tensor, "*batch D"]:
        return ContinuousBernoulliDistribution(eta.squeeze(-1)).mean

    def log_constant(self, num_pixels: int) -> float | None:
        return 0.0

"""Likelihoods p(x|z): the decoder's numbers to a distribution over an image of D pixels.

Each is a frozen dataclass of settings. It also says how pixels in [0, 1] become observations and
back, since a binarized or categorical likelihood observes something other than grey pixels.
"""

import abc
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import pyro.distributions as dist
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.distributions import Distribution, constraints

from pyrovae.runtime.inputs import check_floats


class Likelihood(abc.ABC):
    """p(x|z), given eta = decoder(z). To add one, subclass, and write a line in LIKELIHOODS.

    Attributes:
        normalised: Whether it is a density or mass function of its observations. If not, what is
            reported with it is no bound on log p(x).
        discrete: Whether observations are discrete, so that bits per dimension mean something.
        outputs: The numbers per pixel that the decoder gives.
        learned: Initial values of scalar parameters that a VAE learns beside its networks; it hands
            their current values to `__call__` by name.
    """

    normalised: bool = True
    discrete: bool = False
    outputs: int = 1
    learned: Mapping[str, float] = {}

    @abc.abstractmethod
    def __call__(self, eta: Float[Tensor, "*batch D outputs"], **learned: Tensor) -> Distribution:
        """p(x|z): batch shape *batch, event shape (D,)."""

    @abc.abstractmethod
    def observe(
        self, pixels: Float[Tensor, "*batch D"], generator: torch.Generator | None = None
    ) -> Shaped[Tensor, "*batch D"]:
        """Pixels in [0, 1] to observations; the generator serves those that are drawn.

        It may stand in a loop, so that it does not look at the values.

        Raises:
            ValueError: The pixels are no floats.
        """

    def can_observe(self, x: Shaped[Tensor, "*batch D"], **learned: Tensor) -> Bool[Tensor, "*batch"]:
        """Whether these are observations, of pixels or drawn from p(x|z): finite, and in its support."""
        eta = x.new_zeros(x.shape[-1], self.outputs, dtype=torch.float32)
        return self(eta, **learned).support.check(x) & x.isfinite().all(-1)

    @abc.abstractmethod
    def to_pixels(self, x: Shaped[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """Observations to [0, 1]: what the encoder and the figures see."""

    def from_pixels(self, pixels: Float[Tensor, "*batch D"]) -> Shaped[Tensor, "*batch D"]:
        """The inverse of `to_pixels`, without chance: pixels that no observation has stay as they are."""
        return pixels

    @abc.abstractmethod
    def mean(self, eta: Float[Tensor, "*batch D outputs"]) -> Float[Tensor, "*batch D"]:
        """The expected image, pixels in [0, 1]."""

    @abc.abstractmethod
    def log_constant(self, num_pixels: int) -> float | None:
        """The part of log p(x|z) that depends on nothing learned, in nats per image; None if it does.

        Losses in the literature often drop it: log p(x|z) = log_constant - SSE/(2c) for a Gaussian.
        """


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
            raise ValueError(f"expected binarize in {', '.join(BINARIZATIONS)}, got {self.binarize!r}")

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
            raise ValueError(f"expected c to be a finite variance > 0 or 'learned', got {self.c!r}")

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
            raise ValueError(f"expected levels from 2 to 256, got {self.levels}")

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


LIKELIHOODS: dict[str, type[Likelihood]] = {
    "bernoulli": Bernoulli,
    "continuous-bernoulli": ContinuousBernoulli,
    "gaussian": Gaussian,
    "categorical": Categorical,
}

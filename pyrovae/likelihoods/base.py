"""The extension point `Likelihood`.

Each likelihood is a frozen dataclass of settings. It also says how pixels in [0, 1] become observations and
back, since a binarized or categorical likelihood observes something other than grey pixels.
"""

import abc
from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.distributions import Distribution


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

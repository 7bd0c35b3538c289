"""One more estimator, guide, likelihood and network, as somebody might add them in a file of their own.

As a plugin (`pytest -p tests.added`) it adds them to the registries before tests are collected.
"""

import math
from dataclasses import dataclass

import pyro.distributions as dist
import pytest
import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.distributions import Distribution

from pyrovae.estimators import ESTIMATORS, Draws, Elbo
from pyrovae.estimators.twins import Gradient, Terms, Twin
from pyrovae.guides import GUIDES, Headed
from pyrovae.likelihoods import LIKELIHOODS, Likelihood
from pyrovae.networks import NETWORKS, Decoder, Encoder, ImageShape, Network


def halfway(terms: Terms, estimator: Elbo) -> Gradient:
    """The exact twin of `Halfway`."""
    return 0.5 * (terms.total + terms.path).mean(1), terms.theta.mean(1)


class Halfway(Elbo):
    """The ELBO with half of its score term."""

    gradients = (True,)
    twin = Twin(halfway)

    def surrogate(self, draws: Draws) -> Float[Tensor, " B"]:
        return (draws.log_joint - 0.5 * (draws.log_guide + draws.log_guide_fixed)).mean(0)


class LaplaceGuide(Headed):
    """Independent Laplace distributions."""

    def __init__(self, encoder: Encoder, latent_dim: int):
        super().__init__(encoder, {"loc": latent_dim, "scale": latent_dim})

    def forward(self, x: Float[Tensor, "*batch D"]) -> Distribution:
        return dist.Laplace(*self.outputs(self.encoder(x))).to_event(1)


@dataclass(frozen=True, kw_only=True)
class ArctanGaussian(Likelihood):
    """Grey pixels under a Gaussian whose mean is an arctangent."""

    def __call__(self, eta: Float[Tensor, "*batch D outputs"], **learned: Tensor) -> Distribution:
        return dist.Normal(self.mean(eta), 0.3).to_event(1)

    def observe(
        self, pixels: Float[Tensor, "*batch D"], generator: torch.Generator | None = None
    ) -> Shaped[Tensor, "*batch D"]:
        return pixels

    def to_pixels(self, x: Shaped[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        return x

    def mean(self, eta: Float[Tensor, "*batch D outputs"]) -> Float[Tensor, "*batch D"]:
        return 0.5 + eta.squeeze(-1).atan() / math.pi

    def log_constant(self, num_pixels: int) -> float | None:
        return -0.5 * num_pixels * math.log(2 * math.pi * 0.3**2)


@dataclass(frozen=True, kw_only=True)
class Linear(Network):
    """One layer in each direction."""

    def encoder(self, shape: ImageShape, classes: int = 0) -> Encoder:
        size = math.prod(shape) + classes
        return Encoder(nn.Linear(size, 5), (size,), 5)

    def decoder(self, latent_dim: int, shape: ImageShape, outputs: int) -> Decoder:
        return Decoder(nn.Linear(latent_dim, math.prod(shape) * outputs), shape, outputs)


ADDED = (
    (ESTIMATORS, Halfway),
    (GUIDES, LaplaceGuide),
    (LIKELIHOODS, ArctanGaussian),
    (NETWORKS, Linear),
)


def pytest_configure(config: pytest.Config) -> None:
    for registry, family in ADDED:
        registry["added"] = family

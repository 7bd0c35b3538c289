"""A guide without a density, which makes a VAE the plain autoencoder."""

from typing import ClassVar

import pyro.distributions as dist
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution

from pyrovae.guides.base import Headed
from pyrovae.networks import Encoder


class PointMass(Headed):
    """A point: the code loc(x) with certainty, which makes a VAE the plain autoencoder.

    It has no density, so no KL and no ELBO: train it with the estimator `reconstruction`. Its prior
    is what decoded draws come from, though nothing draws the codes toward it.

    Args:
        encoder: Pixels (..., D) to features (..., encoder.out_features).
        latent_dim: L.

    Source: Reducing the Dimensionality of Data with Neural Networks, Hinton & Salakhutdinov, 2006,
    https://doi.org/10.1126/science.1127647, without its pretraining.
    """

    density: ClassVar = False

    def __init__(self, encoder: Encoder, latent_dim: int):
        super().__init__(encoder, {"loc": latent_dim})

    def forward(self, x: Float[Tensor, "*batch D"]) -> Distribution:
        (loc,) = self.outputs(self.encoder(x))
        return dist.Delta(loc).to_event(1)

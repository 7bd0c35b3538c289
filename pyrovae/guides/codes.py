"""A guide over codes of bits."""

from typing import ClassVar

import pyro.distributions as dist
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution

from pyrovae.guides.base import Headed
from pyrovae.networks import Encoder


class BernoulliCode(Headed):
    """A code of independent bits, z in {0, 1}^L, whose prior is fair bits.

    One linear layer on the encoder's features gives the bits' logits. There is no reparameterized
    sampler: train it with a score-function estimator.

    Args:
        encoder: Pixels (..., D) to features (..., encoder.out_features).
        latent_dim: L.

    Source: Neural Variational Inference and Learning in Belief Networks, Mnih & Gregor, 2014,
    https://arxiv.org/abs/1402.0030, with one layer.
    """

    discrete: ClassVar = True

    def __init__(self, encoder: Encoder, latent_dim: int):
        super().__init__(encoder, {"logits": latent_dim})

    def forward(self, x: Float[Tensor, "*batch D"]) -> Distribution:
        (logits,) = self.outputs(self.encoder(x))
        return dist.Bernoulli(logits=logits).to_event(1)

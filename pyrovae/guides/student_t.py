"""A guide with heavier tails than a Gaussian."""

import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution

from pyrovae.guides.base import Headed
from pyrovae.networks import Encoder
from pyrovae.runtime.inputs import check_above


class StudentT(Headed):
    """Independent Student's t of given degrees of freedom, of heavier tails than Gaussians.

    The scale head gives t's scale, not its standard deviation, scale * sqrt(df / (df - 2)).

    Args:
        encoder: Pixels (..., D) to features (..., encoder.out_features).
        latent_dim: L.
        df: Degrees of freedom, more than 2: with fewer the KL to the normal prior is infinite.
        scale_head: A name in SCALE_HEADS.

    Raises:
        ValueError: df <= 2.

    Source: Variational Inference with Tail-adaptive f-Divergence, Wang, Liu & Liu, 2018,
    https://arxiv.org/abs/1810.11943, on why a proposal's tails should be heavy.
    """

    def __init__(self, encoder: Encoder, latent_dim: int, *, df: float = 5.0, scale_head: str = "exp"):
        check_above("df", df, 2, ", where the KL to a normal prior is finite")
        super().__init__(encoder, {"loc": latent_dim, "scale": latent_dim}, scale_head)
        self.df = df

    def forward(self, x: Float[Tensor, "*batch D"]) -> Distribution:
        loc, scale = self.outputs(self.encoder(x))
        return dist.StudentT(torch.full_like(loc, self.df), loc, scale).to_event(1)

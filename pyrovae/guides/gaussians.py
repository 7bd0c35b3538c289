"""Gaussian guides: a diagonal, a full and a low-rank covariance."""

import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution

from pyrovae.guides.base import Headed, check_positive
from pyrovae.networks import Encoder


class MeanField(Headed):
    """A Gaussian with diagonal covariance, N(loc(x), diag(scale(x)^2)).

    Args:
        encoder: Pixels (..., D) to features (..., encoder.out_features).
        latent_dim: L.
        scale_head: How a network output becomes a variance; a name in SCALE_HEADS.

    Raises:
        ValueError: An unknown scale head.

    Source: Auto-Encoding Variational Bayes, Kingma & Welling, 2014,
    https://arxiv.org/abs/1312.6114, eq. 9 (there with the `exp` head).
    """

    def __init__(self, encoder: Encoder, latent_dim: int, *, scale_head: str = "exp"):
        super().__init__(encoder, {"loc": latent_dim, "scale": latent_dim}, scale_head)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Distribution:
        loc, scale = self.outputs(self.encoder(x))
        return dist.Normal(loc, scale).to_event(1)


class FullCovariance(Headed):
    """A Gaussian with any covariance, N(loc(x), T(x) T(x)^T), T lower triangular.

    T's diagonal comes from the scale head, as squared numbers; below it stands a head of L (L - 1) / 2.

    Args:
        encoder: Pixels (..., D) to features (..., encoder.out_features).
        latent_dim: L.
        scale_head: A name in SCALE_HEADS.

    Source: Automatic Differentiation Variational Inference, Kucukelbir et al., 2017,
    https://arxiv.org/abs/1603.00788, there without an encoder.
    """

    def __init__(self, encoder: Encoder, latent_dim: int, *, scale_head: str = "exp"):
        below = latent_dim * (latent_dim - 1) // 2
        super().__init__(encoder, {"loc": latent_dim, "scale": latent_dim, "factor": below}, scale_head)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Distribution:
        loc, scale, factor = self.outputs(self.encoder(x))
        rows, columns = torch.tril_indices(loc.shape[-1], loc.shape[-1], -1, device=loc.device)
        tril = scale.diag_embed()
        tril[..., rows, columns] = factor
        return dist.MultivariateNormal(loc, scale_tril=tril)


class LowRank(Headed):
    """A Gaussian whose covariance is diagonal plus of low rank, N(loc(x), F(x) F(x)^T + diag(scale(x)^2)).

    Args:
        encoder: Pixels (..., D) to features (..., encoder.out_features).
        latent_dim: L.
        rank: R, the columns of F (L, R).
        scale_head: A name in SCALE_HEADS.

    Raises:
        ValueError: rank < 1.

    Source: Gaussian Variational Approximation with a Factor Covariance Structure, Ong, Nott & Smith,
    2018, https://arxiv.org/abs/1701.03208, there without an encoder.
    """

    def __init__(self, encoder: Encoder, latent_dim: int, *, rank: int = 2, scale_head: str = "exp"):
        check_positive(rank=rank)
        heads = {"loc": latent_dim, "scale": latent_dim, "factor": latent_dim * rank}
        super().__init__(encoder, heads, scale_head)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Distribution:
        loc, scale, factor = self.outputs(self.encoder(x))
        return dist.LowRankMultivariateNormal(loc, factor.unflatten(-1, (loc.shape[-1], -1)), scale**2)

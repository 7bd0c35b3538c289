"""Guides q(z|x): the extension point, and its families."""

import abc
from collections.abc import Callable

import pyro.distributions as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.functional import softplus

from pyrovae.networks import Encoder

SCALE_HEADS: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": lambda h: (0.5 * h).exp(),
    "softplus": lambda h: (softplus(h) + 1e-8).sqrt(),
}


class Guide(nn.Module, abc.ABC):
    """An approximate posterior q(z|x). To write one, subclass it and give `forward`.

    A guide made by name is constructed as `Family(encoder, latent_dim, **settings)`; one of your own
    may take anything, as long as the VAE is given the finished module.

    Example:
        >>> class Fixed(Guide):  # one Gaussian for all data
        ...     def __init__(self, latent_dim):
        ...         super().__init__()
        ...         self.loc = nn.Parameter(torch.zeros(latent_dim))
        ...
        ...     def forward(self, x):
        ...         return dist.Normal(self.loc.expand(*x.shape[:-1], -1), 1.0).to_event(1)
        >>> Fixed(2)(torch.zeros(5, 64)).batch_shape
        torch.Size([5])
    """

    @abc.abstractmethod
    def forward(self, x: Float[Tensor, "*batch D"]) -> Distribution:
        """q(z|x) for pixels x in [0, 1]: batch shape that of x, event shape (latent_dim,)."""


class MeanField(Guide):
    """A Gaussian with diagonal covariance, N(loc(x), diag(scale(x)^2)).

    One linear layer on the encoder's features gives loc and h, (..., L) each; the scale head makes
    h a variance: `exp`, variance = exp(h), or `softplus`, variance = softplus(h) + 1e-8.

    Args:
        encoder: Pixels (..., D) to features (..., encoder.out_features).
        latent_dim: L.
        scale_head: A name in SCALE_HEADS.

    Raises:
        ValueError: An unknown scale head.

    Source: Auto-Encoding Variational Bayes, Kingma & Welling, 2014,
    https://arxiv.org/abs/1312.6114, eq. 9 (there with the `exp` head).
    """

    def __init__(self, encoder: Encoder, latent_dim: int, *, scale_head: str = "exp"):
        super().__init__()
        if scale_head not in SCALE_HEADS:
            raise ValueError(f"expected scale_head in {', '.join(SCALE_HEADS)}, got {scale_head!r}")
        self.encoder = encoder
        self.head = nn.Linear(encoder.out_features, 2 * latent_dim)
        self.scale_head = scale_head

    def forward(self, x: Float[Tensor, "*batch D"]) -> Distribution:
        loc, h = self.head(self.encoder(x)).chunk(2, dim=-1)
        return dist.Normal(loc, SCALE_HEADS[self.scale_head](h)).to_event(1)


GUIDES: dict[str, type[Guide]] = {
    "mean-field": MeanField,
}

"""Guides q(z|x): the extension point, and its families."""

import abc
from collections.abc import Callable
from typing import ClassVar

import pyro.distributions as dist
import torch
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
    """An approximate posterior q(z|x), and the prior it belongs to. To write one, give `forward`.

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

    discrete: ClassVar[bool] = False  # whether z is a code of zeros and ones

    @abc.abstractmethod
    def forward(self, x: Float[Tensor, "*batch D"]) -> Distribution:
        """q(z|x) for pixels x in [0, 1]: batch shape that of x, event shape (latent_dim,)."""

    def prior(self, zeros: Float[Tensor, " L"]) -> Distribution:
        """p(z), event shape (L,): the standard normal, or fair bits for a discrete guide."""
        family = dist.Bernoulli(logits=zeros) if self.discrete else dist.Normal(zeros, torch.ones_like(zeros))
        return family.to_event(1)

    def point(self, q: Distribution) -> Float[Tensor, "*batch L"]:
        """The one z that stands for q(z|x): its mean, or for a discrete guide its most probable code."""
        return q.mean.round() if self.discrete else q.mean

    def parts(self) -> dict[str, dict[str, slice]]:
        """Its parameters in named groups: for each, the rows of each parameter that belong to it."""
        return {"encoder": dict.fromkeys(dict(self.named_parameters()), slice(None))}


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

    def parts(self) -> dict[str, dict[str, slice]]:
        rows = self.head.out_features // 2
        return {
            "trunk": _trunk(self),
            "loc head": {"head.weight": slice(0, rows), "head.bias": slice(0, rows)},
            "scale head": {"head.weight": slice(rows, None), "head.bias": slice(rows, None)},
        }


class BernoulliCode(Guide):
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
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.out_features, latent_dim)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Distribution:
        return dist.Bernoulli(logits=self.head(self.encoder(x))).to_event(1)

    def parts(self) -> dict[str, dict[str, slice]]:
        every = slice(None)
        return {"trunk": _trunk(self), "logits head": {"head.weight": every, "head.bias": every}}


def _trunk(guide: Guide) -> dict[str, slice]:
    return {f"encoder.{name}": slice(None) for name, _ in guide.encoder.named_parameters()}


GUIDES: dict[str, type[Guide]] = {
    "mean-field": MeanField,
    "bernoulli-code": BernoulliCode,
}

"""The extension point `Guide`, and `Headed`, from which guides with an encoder derive."""

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
from pyrovae.runtime.errors import FieldError
from pyrovae.runtime.inputs import check_above

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
    density: ClassVar[bool] = True  # whether q(z|x) has a density, without which there is no ELBO

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

    def attach(self, log_weight: Callable[[Tensor, Distribution, Tensor], Tensor]) -> None:
        """Told once by the VAE that it becomes part of how well some z explain pixels; most need not know.

        Args:
            log_weight: Of pixels x (..., D), some q(z|x) and M samples z (M, ..., L): log p(x|z) / beta +
                log p(z) - log q(z|x), (M, ...), nats.
        """

    def parts(self) -> dict[str, dict[str, slice]]:
        """Its parameters in named groups: for each, the rows of each parameter that belong to it."""
        return {"encoder": dict.fromkeys(dict(self.named_parameters()), slice(None))}


class Headed(Guide):
    """An encoder, and one linear layer on its features with a head for each parameter of q(z|x).

    A scale head makes its output h a variance: `exp`, variance = exp(h), or `softplus`, variance =
    softplus(h) + 1e-8.

    Args:
        encoder: Pixels (..., D) to features (..., encoder.out_features).
        heads: How many numbers each head gives.
        scale_head: A name in SCALE_HEADS.

    Raises:
        ValueError: An unknown scale head.
    """

    def __init__(self, encoder: Encoder, heads: dict[str, int], scale_head: str = "exp"):
        super().__init__()
        if scale_head not in SCALE_HEADS:
            raise FieldError(
                f"expected scale_head in {', '.join(SCALE_HEADS)}, got {scale_head!r}", field="scale_head"
            )
        self.encoder = encoder
        self.heads = heads
        self.head = nn.Linear(encoder.out_features, sum(heads.values()))
        self.scale_head = scale_head

    def outputs(self, features: Float[Tensor, "*batch H"]) -> tuple[Tensor, ...]:
        """What each head gives, (..., its numbers); of one that is called `scale`, standard deviations."""
        parts = self.head(features).split(list(self.heads.values()), dim=-1)
        to_scale = SCALE_HEADS[self.scale_head]
        return tuple(
            to_scale(part) if name == "scale" else part for name, part in zip(self.heads, parts, strict=True)
        )

    def parts(self) -> dict[str, dict[str, slice]]:
        groups, start = {"trunk": _trunk(self)}, 0
        for name, rows in self.heads.items():
            here = slice(start, start + rows)
            groups[f"{name} head"] = {"head.weight": here, "head.bias": here}
            start += rows
        return groups


def _trunk(guide: Guide) -> dict[str, slice]:
    return {f"encoder.{name}": slice(None) for name, _ in guide.encoder.named_parameters()}


def check_positive(**settings: int | float) -> None:
    """Checks at the door that settings are positive: whole numbers from 1 on, others above 0."""
    for name, value in settings.items():
        if isinstance(value, int) and value < 1:
            raise FieldError(f"expected {name} >= 1, got {value}", field=name)
        check_above(name, value)

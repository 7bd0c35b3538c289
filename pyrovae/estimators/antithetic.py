"""Antithetic samples: pairs of particles whose noise is mirrored."""

import torch
from jaxtyping import Shaped
from pyro.distributions import Delta, MaskedDistribution
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Distribution,
    Independent,
    Laplace,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    StudentT,
    TransformedDistribution,
)


class NoMirrorImage(Exception):
    """A distribution whose noise has no opposite that is known here."""


def antithetic_pairs(fn: Distribution) -> Tensor:
    """A sample of `fn`, (K, ...), whose particles 2j and 2j + 1 have opposite noise.

    Raises:
        NoMirrorImage: It is not known how to mirror the noise of this distribution.
    """
    fn = innermost(fn)
    if isinstance(fn, Delta):
        return fn.rsample()
    if isinstance(fn, TransformedDistribution):
        value = antithetic_pairs(fn.base_dist)
        for transform in fn.transforms:
            value = transform(value)
        return value
    if isinstance(fn, Bernoulli):
        u = torch.rand_like(fn.probs[::2])
        return (_interleave(u, 1 - u) < fn.probs).to(fn.probs.dtype)
    if isinstance(fn, Normal | Laplace | StudentT):
        noise = ((fn.rsample() - fn.loc) / fn.scale)[::2]
        return fn.loc + fn.scale * _interleave(noise, -noise)
    if isinstance(fn, MultivariateNormal):
        noise = torch.randn_like(fn.loc[::2])
        return fn.loc + (fn.scale_tril @ _interleave(noise, -noise).unsqueeze(-1)).squeeze(-1)
    if isinstance(fn, LowRankMultivariateNormal):
        noise = (fn.rsample() - fn.loc)[::2]
        return fn.loc + _interleave(noise, -noise)
    raise NoMirrorImage(f"expected a guide whose noise can be mirrored for antithetic pairs, got {fn}")


def innermost(fn: Distribution) -> Distribution:
    """The distribution below event dimensions and masks, which do not change how it is sampled."""
    return innermost(fn.base_dist) if isinstance(fn, Independent | MaskedDistribution) else fn


def _interleave(even: Shaped[Tensor, "half ..."], odd: Shaped[Tensor, "half ..."]) -> Shaped[Tensor, "K ..."]:
    return torch.stack([even, odd], dim=1).flatten(0, 1)

"""Gradients of the ELBO for guides over codes of bits."""

from typing import ClassVar

import pyro.poutine as poutine
import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Bernoulli

from pyrovae.estimators.antithetic import innermost
from pyrovae.estimators.draws import Draws
from pyrovae.estimators.layout import Site, check_one_plate
from pyrovae.estimators.pathwise import Elbo
from pyrovae.estimators.traces import replaced, sample_sites
from pyrovae.runtime.errors import FieldError


class DisArm(Elbo):
    """The ELBO for a Bernoulli guide, by antithetic pairs of codes and no baseline.

    Each pair's estimator is the score-function one averaged over all pairs of uniforms that give the
    same two codes (DisARM: An Antithetic Gradient Estimator for Binary Latent Variables, Dong et al.,
    2020, https://arxiv.org/abs/2006.10680, eq. 3).

    Raises:
        ValueError: On use, where the guide is not Bernoulli at one site, in one plate over the data.

    Example:
        >>> DisArm().antithetic
        True
    """

    gradients: ClassVar = (False,)
    particles: ClassVar = (2, None)

    def __init__(self, *, antithetic: bool = True, **settings):
        if not antithetic:
            raise FieldError(
                "expected antithetic True for DisArm, which is made of pairs, got False", field="antithetic"
            )
        super().__init__(antithetic=True, **settings)

    def surrogate(self, draws: Draws) -> Float[Tensor, " B"]:
        draws.check_separate("DisArm")
        site, q = bernoulli_site(draws.guide_sites, "DisArm")
        shape = draws.num_particles, draws.batch_size, -1
        first, second = site["value"].reshape(shape).unflatten(0, (-1, 2)).unbind(1)
        logits = q.logits.reshape(shape)[::2]
        f = draws.log_weight.detach().unflatten(0, (-1, 2))
        coefficient = 0.5 * (f[:, 0] - f[:, 1])[..., None] * (first - second) * logits.detach().abs().sigmoid()
        return draws.log_joint.mean(0) + (coefficient * logits).sum(-1).mean(0)


class Enumerate(Elbo):
    """The exact ELBO and gradient for a Bernoulli guide, summed over all codes of at most 10 bits.

    Where the model draws noise of its own (dropout), each code has other noise: both are then unbiased. Batch
    norm in the model takes its statistics over all codes alike.

    Raises:
        ValueError: On use, where the guide is not Bernoulli at one site, in one plate over the data, or has
            more bits.

    Example:
        >>> Enumerate().num_particles
        1
    """

    gradients: ClassVar = (False,)
    particles: ClassVar = (1, 1)
    noiseless: ClassVar = True
    max_bits: ClassVar = 10

    def draws(self, model, guide, *args, **kwargs) -> Draws:
        draws = super().draws(model, guide, *args, **kwargs)
        draws.check_separate("Enumerate")
        return draws

    def _explored(self, guide_trace: poutine.Trace) -> tuple[poutine.Trace, int]:
        sites = sample_sites(guide_trace)
        check_one_plate(sites.values(), "Enumerate")
        site, _ = bernoulli_site(sites, "Enumerate")
        z = site["value"]
        bits = z[0].numel()
        if bits > self.max_bits:
            raise ValueError(f"expected at most {self.max_bits} bits for Enumerate, got {bits}")
        codes = torch.arange(2**bits, device=z.device)[:, None] >> torch.arange(bits, device=z.device) & 1
        every = codes.to(z.dtype).reshape(-1, 1, *z.shape[1:]).expand(-1, *z.shape)
        return replaced(guide_trace, {site["name"]: every}), len(every)

    def bound(self, draws: Draws) -> Float[Tensor, " B"]:
        return self._expectation(draws, draws.log_weight)

    def surrogate(self, draws: Draws) -> Float[Tensor, " B"]:
        return self.bound(draws)

    def reconstruction(self, draws: Draws) -> Float[Tensor, " B"]:
        return self._expectation(draws, draws.log_lik)

    def kl(self, draws: Draws) -> Float[Tensor, " B"]:
        return self._expectation(draws, draws.log_guide - draws.log_prior)

    @staticmethod
    def _expectation(draws: Draws, value: Float[Tensor, "K B"]) -> Float[Tensor, " B"]:
        return (draws.score.exp() * value).sum(0)


def bernoulli_site(guide_sites: dict[str, Site], name: str) -> tuple[Site, Bernoulli]:
    """The one latent site, and its Bernoulli without its event dimensions."""
    families = {site: innermost(guide_sites[site]["fn"]) for site in guide_sites}
    if [isinstance(q, Bernoulli) for q in families.values()] != [True]:
        got = {site: guide_sites[site]["fn"] for site in guide_sites}
        raise ValueError(f"expected a Bernoulli guide at one site for {name}, got {got}")
    return *guide_sites.values(), *families.values()

"""What every ELBO estimator is made of: `Draws`, and the abstract `Estimator`.

Notation, here and in every estimator: K particles per datum, B data in the batch, f = log_weight =
log p(x, z) - log q(z|x), s = log q(z|x) with z held fixed. All values are in nats.
"""

import abc
from functools import cached_property
from typing import Any

import pyro.poutine as poutine
import torch
from jaxtyping import Float
from pyro.distributions.util import scale_and_mask
from pyro.infer import ELBO
from pyro.infer.util import is_validation_enabled
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import kl_divergence

Site = dict[str, Any]  # one entry of a Pyro trace


class Draws:
    """K particles for B data: each attribute a (K, B) tensor in nats, computed when first asked for.

    `poutine.scale` (beta) is applied to every value but `score`; the scale of a subsampled plate is
    not applied to any: it is `subsampling`, and multiplies the sum over the batch once, at the end.

    Args:
        model_trace: A trace of the model, replayed against the guide's.
        guide_trace: A trace of the guide.
        num_particles: K, the size of the outer plate of both traces; 1 where there is none.

    Raises:
        ValueError: While Pyro's validation is on: a sample site stands outside the data plate, or model
            and guide differ in their latent sites.
    """

    def __init__(self, model_trace: poutine.Trace, guide_trace: poutine.Trace, num_particles: int):
        self.num_particles = num_particles
        self.guide_sites = _sample_sites(guide_trace)
        model_sites = _sample_sites(model_trace)
        self.observed_sites = {n: s for n, s in model_sites.items() if s["is_observed"]}
        self.model_sites = {n: s for n, s in model_sites.items() if not s["is_observed"]}
        if is_validation_enabled():
            self._validate()
        plate = _data_plate(next(iter(self.guide_sites.values())))
        self.batch_size = plate.size
        self.subsampling = plate.full_size / plate.size

    def _validate(self) -> None:
        if self.guide_sites.keys() != self.model_sites.keys() or not self.guide_sites:
            raise ValueError(
                f"expected model and guide to sample the same latent sites, got "
                f"{sorted(self.model_sites)} in the model and {sorted(self.guide_sites)} in the guide"
            )
        if not self.observed_sites:
            raise ValueError("expected a model that observes data, got none: pass obs= to a pyro.sample")
        plates = {
            _data_plate(site)
            for sites in (self.guide_sites, self.model_sites, self.observed_sites)
            for site in sites.values()
        }
        if len(plates) > 1:
            raise ValueError(f"expected one data plate, got {sorted(plate.name for plate in plates)}")

    @cached_property
    def log_lik(self) -> Float[Tensor, "K B"]:
        """log p(x|z)."""
        return self._sum(self.observed_sites)

    @cached_property
    def log_prior(self) -> Float[Tensor, "K B"]:
        """log p(z)."""
        return self._sum(self.model_sites)

    @cached_property
    def log_guide(self) -> Float[Tensor, "K B"]:
        """log q(z|x)."""
        return self._sum(self.guide_sites)

    @cached_property
    def log_joint(self) -> Float[Tensor, "K B"]:
        """log p(x, z)."""
        return self.log_lik + self.log_prior

    @cached_property
    def log_weight(self) -> Float[Tensor, "K B"]:
        """f = log p(x, z) - log q(z|x). At beta != 1 this is no importance weight."""
        return self.log_joint - self.log_guide

    @cached_property
    def score(self) -> Float[Tensor, "K B"]:
        """s = log q(z|x) with z held fixed, without beta: its gradient is the score of the guide."""
        sites = {n: s | {"value": s["value"].detach()} for n, s in self.guide_sites.items()}
        return self._sum(sites, scaled=False)

    @cached_property
    def kl(self) -> Float[Tensor, "K B"]:
        """KL(q(z|x) || p(z)) in closed form, given the particle's earlier sites.

        Raises:
            ValueError: No closed form is known for a pair of distributions.
        """
        return torch.stack([self._site_kl(name) for name in self.guide_sites]).sum(0)

    def _site_kl(self, name: str) -> Float[Tensor, "K B"]:
        model_site, guide_site = self.model_sites[name], self.guide_sites[name]
        try:
            kl = kl_divergence(guide_site["fn"], model_site["fn"])
        except NotImplementedError:
            raise ValueError(
                f"expected a closed-form KL(q || p) at site {name!r}, got none for "
                f"{guide_site['fn']} and {model_site['fn']}: use the estimator 'elbo'"
            ) from None
        return self._scaled(kl, model_site)

    def _sum(self, sites: dict[str, Site], scaled: bool = True) -> Float[Tensor, "K B"]:
        terms = [self._log_prob(site, scaled) for site in sites.values()]
        return terms[0] if len(terms) == 1 else torch.stack(terms).sum(0)

    def _log_prob(self, site: Site, scaled: bool) -> Float[Tensor, "K B"]:
        try:
            log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
        except (NotImplementedError, KeyError):
            raise ValueError(
                f"expected a density at any given point at guide site {site['name']!r}, got {site['fn']}, "
                "a transform with no inverse: its samples are scored as drawn only (use_rep=True)"
            ) from None
        return self._scaled(log_prob, site if scaled else site | {"scale": self.subsampling})

    def _scaled(self, value: Tensor, site: Site) -> Float[Tensor, "K B"]:
        scale = site["scale"] if self.subsampling == 1 else site["scale"] / self.subsampling
        return scale_and_mask(value, scale, site["mask"]).expand(self.num_particles, self.batch_size)


class Estimator(ELBO, abc.ABC):
    """An estimator of a lower bound on log p(x) and of its gradient, for any Pyro model and guide.

    To write one, give its two methods as formulas over `Draws`. The result is a Pyro ELBO: pass it
    to `pyro.infer.SVI`, or call `differentiable_loss` and step any torch optimizer. The model and
    the guide need one plate over the data, at dim -1; dimensions to its right belong to events.

    Args:
        num_particles: K, the Monte Carlo samples per datum, drawn in one vectorized pass. They are
            averaged, never summed.
        use_rep: Whether the gradient goes through reparameterized samples (pathwise). If not, it is
            the score-function gradient, which needs no `rsample`.

    Raises:
        ValueError: `num_particles` is less than 1.
    """

    def __init__(self, *, num_particles: int = 1, use_rep: bool = True):
        if num_particles < 1:
            raise ValueError(f"expected num_particles >= 1, got {num_particles}")
        super().__init__(num_particles=num_particles, max_plate_nesting=1, vectorize_particles=True)
        self.use_rep = use_rep

    @abc.abstractmethod
    def bound(self, draws: Draws) -> Float[Tensor, " B"]:
        """The value reported, per datum, in nats."""

    @abc.abstractmethod
    def surrogate(self, draws: Draws) -> Float[Tensor, " B"]:
        """What is differentiated, per datum: its gradient estimates that of the bound's mean."""

    @abc.abstractmethod
    def kl(self, draws: Draws) -> Float[Tensor, " B"]:
        """The part of the bound that is not reconstruction, per datum, beta included, in nats."""

    def draws(self, model, guide, *args, **kwargs) -> Draws:
        """Runs the guide and the model against it, on K particles at once.

        Raises:
            ValueError: `use_rep` is True and the guide has a site without a reparameterized sampler,
                or the pair is not one that `Draws` describes.
        """
        model_trace, guide_trace = self._get_vectorized_trace(model, guide, args, kwargs)
        return Draws(model_trace, guide_trace, self.num_particles)

    def _get_trace(self, model, guide, args, kwargs) -> tuple[poutine.Trace, poutine.Trace]:
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        if self.use_rep:
            _check_reparameterized(guide_trace)
        else:
            guide_trace.detach_()
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
        return model_trace, guide_trace

    def differentiable_loss(self, model, guide, *args, **kwargs) -> Float[Tensor, ""]:
        """Minus the bound, summed over the data; its gradient is minus the surrogate's. In nats."""
        draws = self.draws(model, guide, *args, **kwargs)
        surrogate = self.surrogate(draws)
        bound = surrogate + (self.bound(draws) - surrogate).detach()
        return -bound.sum() * draws.subsampling

    def loss(self, model, guide, *args, **kwargs) -> float:
        """Minus the bound, summed over the data, in nats."""
        with torch.no_grad():
            draws = self.draws(model, guide, *args, **kwargs)
            return -self.bound(draws).sum().item() * draws.subsampling

    def loss_and_grads(self, model, guide, *args, **kwargs) -> float:
        """Adds the loss's gradient to every parameter's `.grad`, and returns the loss, in nats."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return loss.item()


def _sample_sites(trace: poutine.Trace) -> dict[str, Site]:
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site) and not site["infer"].get("_deterministic")
    }


def _data_plate(site: Site) -> CondIndepStackFrame:
    """The one plate around a site, the particles' plate aside."""
    plates = [frame for frame in site["cond_indep_stack"] if frame.name != "num_particles_vectorized"]
    if [plate.dim for plate in plates] != [-1]:
        raise ValueError(
            f"expected sample site {site['name']!r} in one plate, over the data, at dim -1, got plates "
            f"{ {plate.name: plate.dim for plate in plates} }: sample inside "
            "pyro.plate('data', len(x), dim=-1) and declare other dimensions with .to_event()"
        )
    return plates[0]


def _check_reparameterized(guide_trace: poutine.Trace) -> None:
    for name, site in _sample_sites(guide_trace).items():
        if not site["fn"].has_rsample:
            raise ValueError(
                f"expected a reparameterized sampler at guide site {name!r}, got {site['fn']}, which has "
                "no rsample: use the score function (use_rep=False)"
            )

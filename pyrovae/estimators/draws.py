"""`Draws`: the particles of one run of a model and a guide, and the densities that estimators are made of.

Notation, here and in every estimator: K particles per datum, B data in the batch, f = log_weight =
log p(x, z) - log q(z|x), s = log q(z|x) with z held fixed. All values are in nats.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from jaxtyping import Float, Shaped
from pyro.distributions import Delta
from pyro.distributions.util import scale_and_mask, sum_rightmost
from pyro.infer.util import is_validation_enabled
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import kl_divergence

from pyrovae.estimators.antithetic import without_events

Site = dict[str, Any]  # one entry of a Pyro trace
Program = Callable[[], Any]  # a model or a guide with its arguments
PARTICLES = "num_particles_vectorized"  # Pyro's name for the plate over particles


class Draws:
    """K particles for B data: each attribute a (K, B) tensor in nats, computed when first asked for.

    `poutine.scale` (beta) is applied to every value but `score`; the scale of a subsampled plate is
    not applied to any: it is `subsampling`, and multiplies the sum over the batch once, at the end.

    Args:
        model_trace: A trace of the model, replayed against the guide's.
        guide_trace: A trace of the guide.
        num_particles: K, the size of the outer plate of both traces; 1 where there is none.
        model: What made the model's trace, to be run again at other latent values.
        guide: What made the guide's trace.

    Raises:
        ValueError: While Pyro's validation is on: a sample site stands outside the data plate, or model
            and guide differ in their latent sites.
    """

    def __init__(
        self,
        model_trace: poutine.Trace,
        guide_trace: poutine.Trace,
        num_particles: int,
        model: Program,
        guide: Program,
    ):
        self.num_particles = num_particles
        self.model, self.guide = model, guide
        self.guide_trace = guide_trace
        self.sample_weights: Tensor | None = None
        self.guide_sites = sample_sites(guide_trace)
        model_sites = sample_sites(model_trace)
        self.observed_sites = {n: s for n, s in model_sites.items() if s["is_observed"]}
        self.model_sites = {n: s for n, s in model_sites.items() if not s["is_observed"]}
        if is_validation_enabled():
            self._validate()
        plate = _data_plate(next(iter(self.guide_sites.values())))
        self.batch_size = plate.size
        self.subsampling = plate.full_size / plate.size

    @property
    def is_scaled(self) -> bool:
        """Whether a site has a weight (beta) other than 1, so that log_weight is no importance weight."""
        sites = (*self.guide_sites.values(), *self.model_sites.values(), *self.observed_sites.values())
        return any(site["scale"] != self.subsampling for site in sites)

    @property
    def point_masses(self) -> list[str]:
        """The guide's sites that put all their mass on a point, and bring no density of their own."""
        bases = {name: without_events(site["fn"]) for name, site in self.guide_sites.items()}
        return [n for n, q in bases.items() if isinstance(q, Delta) and not q.log_density.requires_grad]

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
    def observations(self) -> Float[Tensor, "B D"]:
        """All observed numbers of each datum in a row."""
        parts = []
        for site in self.observed_sites.values():
            value = site["value"].to(self.log_lik.dtype)
            shape = self.batch_size, *site["fn"].event_shape
            parts.append(value.expand(shape).reshape(self.batch_size, -1))
        return torch.cat(parts, dim=1)

    @cached_property
    def score(self) -> Float[Tensor, "K B"]:
        """s = log q(z|x) with z held fixed, without beta: its gradient is the score of the guide."""
        sites = {n: s | {"value": s["value"].detach()} for n, s in self.guide_sites.items()}
        return self._sum(sites, scaled=False)

    @cached_property
    def log_guide_fixed(self) -> Float[Tensor, "K B"]:
        """log q(z|x) with the guide's parameters held fixed: its gradient goes through z alone."""
        leaves = {name: site["value"].detach().requires_grad_() for name, site in self.guide_sites.items()}
        with torch.enable_grad():
            if len(leaves) == 1:
                sites = {name: site | {"value": leaves[name]} for name, site in self.guide_sites.items()}
            else:  # a site's distribution may depend on the sites before it
                sites = sample_sites(_run(self.guide, self._guide_trace_at(leaves), self.num_particles))
            log_guide = self._sum(sites)
            slopes = torch.autograd.grad(log_guide.sum(), [*leaves.values()], retain_graph=True)
        terms = [log_guide.detach()]
        for site, slope in zip(self.guide_sites.values(), slopes, strict=True):
            moved = (site["value"] - site["value"].detach()) * slope
            terms.append(sum_rightmost(moved, site["fn"].event_dim).expand(self.num_particles, -1))
        return torch.stack(terms).sum(0)

    def weigh_samples(self, weights: Float[Tensor, "K B"]) -> None:
        """Has the gradient that flows into each z multiplied by its particle's weight; no other changes.

        From then on these draws serve this one surrogate; another call puts its weights in their place.
        """
        first, self.sample_weights = self.sample_weights is None, weights
        for site in self.guide_sites.values() if first else ():
            value = site["value"]
            if value.requires_grad:
                batch = value.shape[: value.dim() - site["fn"].event_dim]
                shape = batch + (1,) * site["fn"].event_dim
                value.register_hook(lambda gradient, shape=shape: gradient * self.sample_weights.reshape(shape))

    def at(self, values: Shaped[Tensor, "M ..."]) -> "Draws":
        """The same pair with these M particles in place of those drawn.

        Raises:
            ValueError: The guide has more than one latent site.
        """
        if len(self.guide_sites) != 1:
            raise ValueError(f"expected a guide with one latent site, got {sorted(self.guide_sites)}")
        guide_trace = self._guide_trace_at(dict.fromkeys(self.guide_sites, values))
        model_trace = _run(self.model, guide_trace, len(values))
        return Draws(model_trace, guide_trace, len(values), self.model, self.guide)

    def _guide_trace_at(self, values: dict[str, Tensor]) -> poutine.Trace:
        trace = self.guide_trace.copy()
        for name, value in values.items():
            trace.nodes[name] = trace.nodes[name] | {"value": value}
        return trace

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


def _run(program: Program, guide_trace: poutine.Trace, num_particles: int) -> poutine.Trace:
    """A trace of the program at the guide's values, on so many particles."""
    with poutine.trace() as tracer, poutine.replay(trace=guide_trace):
        if num_particles == 1:
            program()
        else:
            with pyro.plate(PARTICLES, num_particles, dim=-2):
                program()
    return tracer.trace


def is_drawn(site: Site) -> bool:
    """Whether a site of a trace is a latent variable, and not data, a plate's indices or a deterministic value."""
    return (
        site["type"] == "sample"
        and not site["is_observed"]
        and not site_is_subsample(site)
        and not site["infer"].get("_deterministic")
    )


def sample_sites(trace: poutine.Trace) -> dict[str, Site]:
    """The latent and the observed sites of a trace, by name, in the order in which they were sampled."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and (site["is_observed"] or is_drawn(site))
    }


def _data_plate(site: Site) -> CondIndepStackFrame:
    """The one plate around a site, the particles' plate aside."""
    plates = [frame for frame in site["cond_indep_stack"] if frame.name != PARTICLES]
    if [plate.dim for plate in plates] != [-1]:
        raise ValueError(
            f"expected sample site {site['name']!r} in one plate, over the data, at dim -1, got plates "
            f"{ {plate.name: plate.dim for plate in plates} }: sample inside "
            "pyro.plate('data', len(x), dim=-1) and declare other dimensions with .to_event()"
        )
    return plates[0]

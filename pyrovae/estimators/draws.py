"""`Draws`: the particles of one run of a model and a guide, and the densities that estimators are made of.

Notation, here and in every estimator: K particles per datum, B data in the batch, f = log_weight =
log p(x, z) - log q(z|x), s = log q(z|x) with z held fixed. All values are in nats.
"""

from collections.abc import Iterable
from functools import cached_property

import pyro.poutine as poutine
import torch
from jaxtyping import Float, Shaped
from pyro.distributions.util import scale_and_mask, sum_rightmost
from torch import Tensor

from pyrovae.estimators.kl import ClosedForm, SiteKL, closed_forms, sources
from pyrovae.estimators.layout import Layout, Site, check_one_plate, plates_of
from pyrovae.estimators.traces import (
    Gates,
    Program,
    is_auxiliary,
    masked_outside,
    replaced,
    replayed,
    sample_sites,
    unmasked,
)


class Draws:
    """K particles for B data: each attribute a (K, B) tensor in nats, computed when first asked for.

    `poutine.scale` (beta) is applied to every value but `score`; the scale of a subsampled plate is
    not applied to any: it is `subsampling`, and multiplies the sum over the batch once, at the end.
    Each datum has a share of the sites outside the data plates, so that this counts them once: see `Layout`.

    Args:
        model_trace: A trace of the model at the guide's samples, as `replayed` gives it.
        guide_trace: A trace of the guide.
        num_particles: K, the size of the outer plate of both traces; 1 where there is none.
        model: What made the model's trace, to be run again at other latent values.
        gates: The gates between the guide's sites, if gradients go through its samples.
        joint: Whether all data are taken as a single datum (B = 1), as they depend on each other.

    Raises:
        ValueError: Model and guide differ in their latent sites or in the shape of one, a site is enumerated,
            the guide observes data, or a site's plates are not as `Layout` needs them.
    """

    def __init__(
        self,
        model_trace: poutine.Trace,
        guide_trace: poutine.Trace,
        num_particles: int,
        model: Program,
        gates: Gates | None = None,
        *,
        joint: bool = False,
    ):
        self.num_particles = num_particles
        self.model, self.gates = model, Gates() if gates is None else gates
        self.model_trace, self.guide_trace = model_trace, guide_trace
        self._weights_held: list[Tensor] = []  # a list, so that hooks hold nothing of what is computed
        self.guide_sites = sample_sites(guide_trace)
        self.sites_in_model = sample_sites(model_trace)
        self.observed_sites = {n: s for n, s in self.sites_in_model.items() if s["is_observed"]}
        self.model_sites = {n: s for n, s in self.sites_in_model.items() if not s["is_observed"]}
        self._validate()
        self.layout = Layout(self.all_sites(), num_particles, joint=joint)
        self.batch_size, self.subsampling = self.layout.batch_size, self.layout.subsampling

    def all_sites(self) -> list[Site]:
        """The latent sites of the guide, then all of the model."""
        return [*self.guide_sites.values(), *self.sites_in_model.values()]

    def jointly(self) -> "Draws":
        """The same particles with all data taken as a single datum."""
        traces = self.model_trace, self.guide_trace
        return Draws(*traces, self.num_particles, self.model, self.gates, joint=True)

    @cached_property
    def has_latents_outside(self) -> bool:
        """Whether a latent site stands outside the data's plates."""
        return not all(self.layout.is_inside(site) for site in self.guide_sites.values())

    def after_latents(self, sites: dict[str, Site]) -> tuple[list[str], list[str]]:
        """Latent sites inside the data's plates, and sites outside that come after one and may depend on it."""
        inside, after = [], []
        for name, site in sites.items():
            if not self.layout.is_inside(site):
                after += [name] if inside else []
            elif not site["is_observed"]:
                inside.append(name)
        return inside, after

    def _validate(self) -> None:
        for name, site in self.guide_sites.items():
            if site["is_observed"] and not is_auxiliary(site):
                raise ValueError(f"expected a guide that observes nothing, got data at site {name!r}")
        latents = {name for name, site in self.guide_sites.items() if not is_auxiliary(site)}
        if latents != self.model_sites.keys():
            raise ValueError(
                f"expected model and guide to sample the same latent sites, got "
                f"{sorted(self.model_sites)} in the model and {sorted(latents)} in the guide: mark those that "
                "the guide alone needs by infer={'is_auxiliary': True}"
            )
        if not self.sites_in_model:
            raise ValueError("expected a model with sample sites, got none")
        for name, site in self.model_sites.items():
            expected, got = site["fn"].event_shape, self.guide_sites[name]["fn"].event_shape
            if expected != got:
                raise ValueError(
                    f"expected one event shape at site {name!r} in model and guide, got {tuple(expected)} in "
                    f"the model and {tuple(got)} in the guide: declare the same dimensions with .to_event()"
                )

    @cached_property
    def log_lik(self) -> Float[Tensor, "K B"]:
        """log p(x|z)."""
        return self._sum(self.observed_sites.values())

    @cached_property
    def log_lik_outside(self) -> Float[Tensor, "K B"]:
        """The share in log p(x|z) of observed sites outside the data's plates."""
        return self._sum(site for site in self.observed_sites.values() if not self.layout.is_inside(site))

    @cached_property
    def log_prior(self) -> Float[Tensor, "K B"]:
        """log p(z)."""
        return self._sum(self.model_sites.values())

    @cached_property
    def log_guide(self) -> Float[Tensor, "K B"]:
        """log q(z|x)."""
        return self._sum(self.guide_sites.values())

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
        """All observed numbers of each datum in a row; D = 0 where the model observes factors alone.

        A value that is computed for each particle is no observation of a datum.
        """
        parts = [
            self.layout.numbers(site).to(self.log_lik.dtype)
            for site in self.observed_sites.values()
            if self.layout.is_inside(site) and site["value"].numel() and not self.layout.is_for_particles(site)
        ]
        return torch.cat([self.log_lik.new_empty(self.batch_size, 0), *parts], dim=1)

    @cached_property
    def score(self) -> Float[Tensor, "K B"]:
        """s = log q(z|x) with z held fixed, without beta and masks: its gradient is the score of the guide.

        Sites outside the data's plates are left out: `scored` has them.
        """
        return self._score(site for site in self.guide_sites.values() if self.layout.is_inside(site))

    def scored(
        self,
        signal: Float[Tensor, "K B"],
        *,
        later: dict[str, Float[Tensor, "K B"]] | None = None,
        outside: Float[Tensor, "K B"] | None = None,
    ) -> Float[Tensor, "K B"]:
        """The surrogate of score-function gradients: each latent site's score times what the site influences.

        For a site outside the data's plates that is the signal of all data. For one inside it is its datum's
        signal, without the share of sites outside that come before it, and with the whole of observations
        outside that come after it.

        Args:
            signal: What the gradient is to raise, per datum, in nats.
            later: For each latent site, what else it influences.
            outside: The share in the signal of sites outside the data's plates; None for that of log p(x, z)
                - log q(z|x).
        """
        of_guide = [site for site in self.guide_sites.values() if not self.layout.is_inside(site)]
        of_model = [site for site in self.sites_in_model.values() if not self.layout.is_inside(site)]
        if not self.guide_sites or (later is None and not of_guide and not of_model):
            return signal.detach() * self.score
        if outside is None:
            outside = self._sum(of_model) - self._sum(of_guide)
        late = self.batch_size * self._sum(self._late)
        terms = []
        for name, site in self.guide_sites.items():
            influenced = signal if later is None else signal + later[name]
            if self.layout.is_inside(site):
                influenced = influenced - outside + late
            else:
                influenced = self.subsampling * influenced.sum(1, keepdim=True)
            terms.append(influenced.detach() * self._score([site]))
        return torch.stack(terms).sum(0)

    @property
    def _late(self) -> list[Site]:
        """The observed sites outside the data's plates that come after a latent site inside."""
        _, after = self.after_latents(self.sites_in_model)
        return [self.observed_sites[name] for name in after if name in self.observed_sites]

    def _score(self, sites: Iterable[Site]) -> Float[Tensor, "K B"]:
        return self._sum(
            [
                site | {"value": site["value"].detach(), "fn": unmasked(site["fn"]), "mask": None}
                for site in sites
            ],
            scaled=False,
        )

    @cached_property
    def _samples(self) -> dict[str, Tensor]:
        """Views of the latent samples, the ones that the model has seen where it has seen any."""
        drawn = {name: site["value"] for name, site in self.guide_sites.items() if not site["is_observed"]}
        return {
            name: self.model_sites[name]["value"] if name in self.model_sites else value.view_as(value)
            for name, value in drawn.items()
        }

    @cached_property
    def log_guide_fixed(self) -> Float[Tensor, "K B"]:
        """log q(z|x) with the guide's parameters held fixed: its gradient goes through z alone.

        Its value is taken at copies of the samples. A site's sample enters the density of the site itself,
        as the copy, and those of later sites, through the sample's gate; the sum of both derivatives is what
        multiplies the sample's own movement.
        """
        copies = {name: site["value"].detach().requires_grad_() for name, site in self.guide_sites.items()}
        sites = [site | {"value": copies[name]} for name, site in self.guide_sites.items()]
        with torch.enable_grad(), self.gates.closed():
            log_guide = self._sum(sites)
            inputs = [*copies.values(), *self.gates.samples.values()]
            slopes = torch.autograd.grad(log_guide.sum(), inputs, retain_graph=True, materialize_grads=True)
        slope_of = dict(zip(copies, slopes, strict=False))
        for name, slope in zip(self.gates.samples, slopes[len(copies) :], strict=True):
            slope_of[name] = slope_of[name] + slope
        terms = [log_guide.detach()]
        for name, sample in self._samples.items():
            site, moved = self.guide_sites[name], (sample - sample.detach()) * slope_of[name]
            rows = self.layout.rows(sum_rightmost(moved, site["fn"].event_dim), site)
            terms.append(rows if self.layout.is_inside(site) else rows * self.subsampling)
        return torch.stack(terms).sum(0)

    def weigh_samples(self, weights: Float[Tensor, "K B"]) -> None:
        """Has the gradient that flows into each z multiplied by its particle's weight.

        This holds for the gradients from the model and from `log_guide_fixed`. From then on these draws
        serve this one surrogate; another call puts its weights in their place.
        """
        first, held = not self._weights_held, self._weights_held
        held[:] = [weights]
        for name, sample in self._samples.items() if first else ():
            if sample.requires_grad:
                shape = self.layout.as_batch(weights, self.guide_sites[name]).shape
                sample.register_hook(lambda gradient, shape=shape: gradient * held[0].reshape(shape))

    def check_separate(self, name: str) -> None:
        """Checks that each datum stands by itself in one plate at dim -1, as some estimators need it.

        Args:
            name: The estimator.

        Raises:
            ValueError: It does not.
        """
        harmless = self.observed_sites.keys() - {site["name"] for site in self._late}
        sites = [site for site in self.all_sites() if site["name"] not in harmless or plates_of(site)]
        check_one_plate(sites, name)

    def at(self, values: Shaped[Tensor, "M ..."]) -> "Draws":
        """The same pair with these M particles in place of those drawn.

        The model is run again, the guide is not. Random numbers that the model draws itself (dropout, say)
        are drawn anew, for each particle its own, as they are wherever there are several particles.

        Raises:
            ValueError: The guide has more than one latent site.
        """
        if len(self.guide_sites) != 1:
            raise ValueError(f"expected a guide with one latent site, got {sorted(self.guide_sites)}")
        guide_trace = replaced(self.guide_trace, dict.fromkeys(self.guide_sites, values))
        return Draws(replayed(self.model, guide_trace, len(values)), guide_trace, len(values), self.model)

    @cached_property
    def closed_forms(self) -> dict[str, ClosedForm]:
        """For each latent site, its KL in closed form and where it may be used."""
        return closed_forms(self.model_sites, self._guide_densities)

    @cached_property
    def sources(self) -> dict[str, str]:
        """For each latent site that is the very sample of an auxiliary site, which site that is."""
        return sources(self.guide_sites)

    @cached_property
    def _guide_densities(self) -> dict[str, Site]:
        """The sites of the guide, those that are an auxiliary sample with its distribution and in its place."""
        sites, users = self.guide_sites, {source: name for name, source in self.sources.items()}
        ordered = [users.get(name, name) for name in sites if name not in self.sources]
        return {
            name: sites[name] | {"fn": sites[self.sources[name]]["fn"]} if name in self.sources else sites[name]
            for name in ordered
        }

    @cached_property
    def kl(self) -> Float[Tensor, "K B"]:
        """KL(q(z|x) || p(z)), in closed form where that may be used, given the particle's other samples."""
        return sum((kl.value for kl in self.kls.values()), start=torch.zeros_like(self.log_lik))

    @cached_property
    def kls(self) -> dict[str, SiteKL]:
        """What each site of the guide adds to KL(q(z|x) || p(z)), in closed form where it may be used.

        A latent site that is the very sample of an auxiliary site stands for both.
        """
        return {name: self._site_kl(name, site) for name, site in self._guide_densities.items()}

    def _site_kl(self, name: str, guide_site: Site) -> SiteKL:
        if name not in self.model_sites:
            return SiteKL(0.0, self._log_prob(guide_site), 0.0)
        model_site, form = self.model_sites[name], self.closed_forms[name]
        closed = log_guide = log_prior = 0.0
        if form.where is not False:
            closed = self._scaled(form.kl, masked_outside(model_site, form.where))
        if form.where is not True:
            elsewhere = ~form.where if isinstance(form.where, Tensor) else True
            log_guide, log_prior = (
                self._log_prob(masked_outside(site, elsewhere)) for site in (guide_site, model_site)
            )
        return SiteKL(closed, log_guide, log_prior)

    def _sum(self, sites: Iterable[Site], scaled: bool = True) -> Float[Tensor, "K B"]:
        terms = [self._log_prob(site, scaled) for site in sites]
        if not terms:
            some = self._log_prob(self.all_sites()[0])
            return some.new_zeros(self.num_particles, self.batch_size)
        return terms[0] if len(terms) == 1 else torch.stack(terms).sum(0)

    def _log_prob(self, site: Site, scaled: bool = True) -> Float[Tensor, "K B"]:
        try:
            log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
        except (NotImplementedError, KeyError):
            raise ValueError(
                f"expected a density at any given point at guide site {site['name']!r}, got {site['fn']}, "
                "a transform with no inverse: its samples are scored as drawn only (use_rep=True)"
            ) from None
        return self._scaled(log_prob, site, scaled)

    def _scaled(self, value: Tensor, site: Site, scaled: bool = True) -> Float[Tensor, "K B"]:
        scale = site["scale"] if scaled else 1.0
        if scaled and self.subsampling != 1 and self.layout.is_inside(site):
            scale = scale / self.subsampling
        return self.layout.rows(scale_and_mask(value, scale, site["mask"]), site)

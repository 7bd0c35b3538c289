"""What every ELBO estimator is made of: `Draws`, and the abstract `Estimator`.

Notation, here and in every estimator: K particles per datum, B data in the batch, f = log_weight =
log p(x, z) - log q(z|x), s = log q(z|x) with z held fixed. All values are in nats.
"""

import abc
from collections.abc import Callable
from functools import cached_property
from typing import Any, ClassVar

import pyro
import pyro.poutine as poutine
import torch
from jaxtyping import Float, Shaped
from pyro.distributions import Delta
from pyro.distributions.util import scale_and_mask, sum_rightmost
from pyro.infer import ELBO
from pyro.infer.util import is_validation_enabled
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
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
    kl_divergence,
)

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
        self.guide_sites = _sample_sites(guide_trace)
        model_sites = _sample_sites(model_trace)
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
        bases = {name: _base(site["fn"]) for name, site in self.guide_sites.items()}
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
                sites = _sample_sites(_run(self.guide, self._guide_trace_at(leaves), self.num_particles))
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


class Estimator(ELBO, abc.ABC):
    """An estimator of a lower bound on log p(x) and of its gradient, for any Pyro model and guide.

    To write one, give its two methods as formulas over `Draws`. The result is a Pyro ELBO: pass it
    to `pyro.infer.SVI`, or call `differentiable_loss` and step any torch optimizer. The model and
    the guide need one plate over the data, at dim -1; dimensions to its right belong to events.

    Args:
        num_particles: K, the Monte Carlo samples per datum, drawn in one vectorized pass. They are
            averaged, never summed. None for the least that the estimator takes.
        use_rep: Whether the gradient goes through reparameterized samples (pathwise). If not, it is
            the score-function gradient, which needs no `rsample`. None for the estimator's default.
        antithetic: Whether particles come in pairs that mirror each other's noise.

    Attributes:
        gradients: The values of `use_rep` that there is an estimator for, the default first.
        particles: The least and the largest K (None without a limit).
        importance_weighted: Whether the bound is made of importance weights, which beta != 1 spoils.
        independent: Whether a particle's gradient uses that the other particles are independent of it.
        needs_density: Whether it is a bound on log p(x), to which log q(z|x) belongs.

    Raises:
        ValueError: There is no such estimator.
    """

    gradients: ClassVar[tuple[bool, ...]] = (True, False)
    particles: ClassVar[tuple[int, int | None]] = (1, None)
    importance_weighted: ClassVar[bool] = False
    independent: ClassVar[bool] = False
    needs_density: ClassVar[bool] = True

    def __init__(
        self, *, num_particles: int | None = None, use_rep: bool | None = None, antithetic: bool = False
    ):
        name, (least, largest) = type(self).__name__, self.particles
        if antithetic and (self.independent or largest == 1):
            needs = "needs independent particles" if self.independent else "takes one particle"
            raise ValueError(f"expected antithetic False for {name}, which {needs}, got True")
        least = max(least, 2 if antithetic else 1)
        num_particles = least if num_particles is None else num_particles
        use_rep = self.gradients[0] if use_rep is None else use_rep
        if num_particles < least:
            raise ValueError(f"expected num_particles >= {least} for {name}, got {num_particles}")
        if largest is not None and num_particles > largest:
            raise ValueError(f"expected num_particles <= {largest} for {name}, got {num_particles}")
        if antithetic and num_particles % 2:
            raise ValueError(f"expected num_particles even for antithetic pairs, got {num_particles}")
        if use_rep not in self.gradients:
            kind = "through reparameterized samples" if self.gradients[0] else "of the score function"
            raise ValueError(
                f"expected use_rep {self.gradients[0]} for {name}, a gradient {kind}, got {use_rep}"
            )
        super().__init__(num_particles=num_particles, max_plate_nesting=1, vectorize_particles=True)
        self.use_rep = use_rep
        self.antithetic = antithetic

    @abc.abstractmethod
    def bound(self, draws: Draws) -> Float[Tensor, " B"]:
        """The value reported, per datum, in nats."""

    @abc.abstractmethod
    def surrogate(self, draws: Draws) -> Float[Tensor, " B"]:
        """What is differentiated, per datum: its gradient estimates that of the bound's mean."""

    def reconstruction(self, draws: Draws) -> Float[Tensor, " B"]:
        """E_q[log p(x|z)], per datum, in nats."""
        return draws.log_lik.mean(0)

    def kl(self, draws: Draws) -> Float[Tensor, " B"]:
        """KL(q(z|x) || p(z)), per datum, beta included, in nats."""
        return (draws.log_guide - draws.log_prior).mean(0)

    def adapt(self, log_weight: Float[Tensor, "K B"], observations: Float[Tensor, "B D"]) -> None:
        """Learns from the draws of a step what later surrogates use, a baseline say.

        What it learns stands in tensors, which exist from the first surrogate on and are changed in
        place, so that a captured step sees them.

        Args:
            log_weight: f, in nats, without gradient.
            observations: The observed numbers of each datum.
        """

    @property
    def adapts(self) -> bool:
        """Whether it learns anything."""
        return type(self).adapt is not Estimator.adapt

    def state_dict(self) -> dict[str, Any]:
        """What `adapt` has learned, for a checkpoint: the tensors, which processes average in place."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""

    def draws(self, model, guide, *args, **kwargs) -> Draws:
        """Runs the guide and the model against it, on K particles at once.

        Raises:
            ValueError: `use_rep` is True and the guide has a site without a reparameterized sampler,
                the bound has importance weights and a site is scaled (beta != 1), the guide puts all
                its mass on a point, or the pair is not one that `Draws` describes.
        """

        def bound_model():
            return model(*args, **kwargs)

        def bound_guide():
            return guide(*args, **kwargs)

        model_trace, guide_trace = self._get_vectorized_trace(bound_model, bound_guide, (), {})
        draws = Draws(model_trace, guide_trace, self.num_particles, bound_model, bound_guide)
        if self.needs_density and draws.point_masses:
            raise ValueError(
                f"expected a guide with a density for {type(self).__name__}, got a point mass at site "
                f"{draws.point_masses[0]!r}, which has no ELBO: use the estimator 'reconstruction'"
            )
        if self.importance_weighted and draws.is_scaled:
            raise ValueError(
                f"expected beta = 1 for {type(self).__name__}: another makes its weights no importance weights"
            )
        return draws

    def _get_trace(self, model, guide, args, kwargs) -> tuple[poutine.Trace, poutine.Trace]:
        try:
            with _Sampling(self.antithetic, detach=not self.use_rep):
                guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        except NoMirrorImage as error:  # a ValueError there would have Pyro append the trace's shapes
            raise ValueError(str(error)) from None
        if self.use_rep:
            _check_reparameterized(guide_trace)
            sites = _sample_sites(guide_trace)
            for site in sites.values() if len(sites) > 1 else ():
                # What the model sees, apart from what the guide's later sites see: see weigh_samples.
                site["value"] = site["value"].view_as(site["value"])
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
        return model_trace, guide_trace

    def differentiable_loss(self, model, guide, *args, **kwargs) -> Float[Tensor, ""]:
        """Minus the bound, summed over the data; its gradient is minus the surrogate's. In nats."""
        draws = self.draws(model, guide, *args, **kwargs)
        surrogate = self.surrogate(draws)
        bound = surrogate + (self.bound(draws) - surrogate).detach()
        if self.adapts:
            self.adapt(draws.log_weight.detach(), draws.observations)
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


class NoMirrorImage(Exception):
    """A distribution whose noise has no opposite that is known here."""


class _Sampling(Messenger):
    """How a guide's latent sites are drawn: in antithetic pairs, cut from the graph, or as ever."""

    def __init__(self, antithetic: bool, detach: bool):
        super().__init__()
        self.antithetic, self.detach = antithetic, detach

    def _pyro_sample(self, msg: Site) -> None:
        if self.antithetic and _is_drawn(msg):
            msg["value"] = antithetic_pairs(msg["fn"])

    def _pyro_post_sample(self, msg: Site) -> None:
        if self.detach and _is_drawn(msg):
            msg["value"] = msg["value"].detach()


def antithetic_pairs(fn: Distribution) -> Tensor:
    """A sample of `fn`, (K, ...), whose particles 2j and 2j + 1 have opposite noise.

    Raises:
        NoMirrorImage: It is not known how to mirror the noise of this distribution.
    """
    fn = _base(fn)
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


def _base(fn: Distribution) -> Distribution:
    """What stands below its event dimensions."""
    return _base(fn.base_dist) if isinstance(fn, Independent) else fn


def _interleave(even: Shaped[Tensor, "half ..."], odd: Shaped[Tensor, "half ..."]) -> Shaped[Tensor, "K ..."]:
    return torch.stack([even, odd], dim=1).flatten(0, 1)


def _run(program: Program, guide_trace: poutine.Trace, num_particles: int) -> poutine.Trace:
    """A trace of the program at the guide's values, on so many particles."""
    with poutine.trace() as tracer, poutine.replay(trace=guide_trace):
        if num_particles == 1:
            program()
        else:
            with pyro.plate(PARTICLES, num_particles, dim=-2):
                program()
    return tracer.trace


def _is_drawn(site: Site) -> bool:
    return (
        site["type"] == "sample"
        and not site["is_observed"]
        and not site_is_subsample(site)
        and not site["infer"].get("_deterministic")
    )


def _sample_sites(trace: poutine.Trace) -> dict[str, Site]:
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and (site["is_observed"] or _is_drawn(site))
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


def _check_reparameterized(guide_trace: poutine.Trace) -> None:
    for name, site in _sample_sites(guide_trace).items():
        if not site["fn"].has_rsample:
            raise ValueError(
                f"expected a reparameterized sampler at guide site {name!r}, got {site['fn']}, which has "
                "no rsample: use the score function (use_rep=False)"
            )

"""The abstract `Estimator`, from which every estimator derives."""

import abc
import math
from typing import Any, ClassVar

import pyro.poutine as poutine
import torch
from jaxtyping import Float
from pyro.infer import ELBO
from pyro.poutine.messenger import Messenger, unwrap
from torch import Tensor

from pyrovae.estimators.dependence import depends
from pyrovae.estimators.draws import Draws
from pyrovae.estimators.references import Named
from pyrovae.estimators.sampling import Sampling, check_reparameterized, explained
from pyrovae.estimators.traces import Gates, Program, point_masses, replayed, traced
from pyrovae.estimators.twins import Twin
from pyrovae.estimators.weights import check_weights
from pyrovae.runtime.errors import FieldError


class Estimator(ELBO, abc.ABC):
    """An estimator of a lower bound on log p(x) and of its gradient, for any Pyro model and guide.

    To write one, give its two methods as formulas over `Draws`. The result is a Pyro ELBO: pass it
    to `pyro.infer.SVI`, or call `differentiable_loss` and step any torch optimizer.

    The data stand in a plate, usually at dim -1, and dimensions to its right are declared as events. Where
    plates are nested, a datum is one cell of those that all sites in plates share. Where there is no such
    plate, all data together are one datum, for importance weights and for the score function too.

    A latent or observed site outside the data plate (a global latent variable, say, or a penalty by
    `pyro.factor`) is counted once, whatever the batch. Its score is multiplied by the signal of all data.
    Importance weights of single data do not exist then, so an importance-weighted bound is made of the joint
    weights of all data: it is valid, but looser the more data there are, and subsampling is refused.

    The guide may be one of Pyro's autoguides, and may have sites of its own, marked by
    `infer={"is_auxiliary": True}`. These estimators refuse guides that put their mass on a point (`AutoDelta`),
    guides that run the model themselves (`AutoNormalMessenger`), sites that are to be enumerated, and model
    sites that the guide does not sample.

    Args:
        num_particles: K, the Monte Carlo samples per datum, drawn in one vectorized pass. They are
            averaged, never summed. None for the least that the estimator takes.
        use_rep: Whether the gradient goes through reparameterized samples (pathwise). If not, it is
            the score-function gradient, which needs no `rsample`. None for the estimator's default.
        antithetic: Whether particles come in pairs that mirror each other's noise.
        max_plate_nesting: How many dimensions the pair's plates take, counted from the right. The plate over
            several particles stands to the left of them.

    Attributes:
        gradients: The values of `use_rep` that there is an estimator for, the default first.
        particles: The least and the largest K (None without a limit).
        importance_weighted: Whether the bound is made of importance weights, which beta != 1 spoils.
        independent: Whether a particle's gradient uses that the other particles are independent of it.
        needs_density: Whether it is a bound on log p(x), to which log q(z|x) belongs.
        follows_bound: Whether the gradient in the guide's parameters estimates that of the bound.
        noiseless: Whether the gradient is exact, whatever is drawn.
        twin: Its exact gradient for one linear-Gaussian datum (see `twins`), None where it has none. A subclass
            gives another gradient, so it does not inherit a twin.

    Raises:
        ValueError: There is no such estimator, or `max_plate_nesting` is below 1.
    """

    gradients: ClassVar[tuple[bool, ...]] = (True, False)
    particles: ClassVar[tuple[int, int | None]] = (1, None)
    importance_weighted: ClassVar[bool] = False
    independent: ClassVar[bool] = False
    needs_density: ClassVar[bool] = True
    follows_bound: ClassVar[bool] = True
    noiseless: ClassVar[bool] = False
    twin: ClassVar[Twin | None] = None

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        cls.twin = vars(cls).get("twin")

    def __init__(
        self,
        *,
        num_particles: int | None = None,
        use_rep: bool | None = None,
        antithetic: bool = False,
        max_plate_nesting: int = 1,
    ):
        name, (least, largest) = type(self).__name__, self.particles
        if antithetic and (self.independent or largest == 1):
            needs = "needs independent particles" if self.independent else "takes one particle"
            raise FieldError(
                f"expected antithetic False for {name}, which {needs}, got True", field="antithetic"
            )
        least = max(least, 2 if antithetic else 1)
        num_particles = least if num_particles is None else num_particles
        use_rep = self.gradients[0] if use_rep is None else use_rep
        if num_particles < least:
            raise FieldError(
                f"expected num_particles >= {least} for {name}, got {num_particles}", field="num_particles"
            )
        if largest is not None and num_particles > largest:
            raise FieldError(
                f"expected num_particles <= {largest} for {name}, got {num_particles}", field="num_particles"
            )
        if antithetic and num_particles % 2:
            raise FieldError(
                f"expected num_particles even for antithetic pairs, got {num_particles}", field="num_particles"
            )
        if use_rep not in self.gradients:
            kind = "through reparameterized samples" if self.gradients[0] else "of the score function"
            raise FieldError(
                f"expected use_rep {self.gradients[0]} for {name}, a gradient {kind}, got {use_rep}",
                field="use_rep",
            )
        if not 1 <= max_plate_nesting < math.inf:
            raise ValueError(
                f"expected max_plate_nesting >= 1, the number of dimensions of plates, got {max_plate_nesting}"
            )
        super().__init__(
            num_particles=num_particles, max_plate_nesting=max_plate_nesting, vectorize_particles=True
        )
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

    def plain(self, use_rep: bool) -> Named | None:
        """The plain estimator of the same bound, by its name in ESTIMATORS and K; None where it names none.

        A comparison gives the variance of this estimator as a part of that one's.

        Args:
            use_rep: Whether the guide has a reparameterized sampler.
        """
        return None

    def references(self, use_rep: bool) -> tuple[Named, ...]:
        """Estimators whose mean gradient this one's should have, the best first; empty where it names none.

        A comparison draws the first that takes the pair many times, and tests this estimator for bias by it.

        Args:
            use_rep: Whether the guide has a reparameterized sampler.
        """
        return ()

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
                the bound has importance weights and a site is scaled (beta != 1) or a datum subsampled, the
                guide puts all its mass on a point, a plate stands left of the particles, or the pair is not
                one that `Draws` describes.
        """

        if isinstance(program := unwrap(guide), Messenger):
            raise ValueError(
                f"expected a guide that samples by itself, got {type(program).__name__}, which runs the model: "
                "use an AutoGuide, or Pyro's Trace_ELBO"
            )

        def bound_model():
            return model(*args, **kwargs)

        def bound_guide():
            return guide(*args, **kwargs)

        guide_trace, gates = self._sampled(bound_guide)
        masses = point_masses(guide_trace, gates)
        if self.needs_density and masses:
            raise ValueError(
                f"expected a guide with a density for {type(self).__name__}, got a point mass at site "
                f"{masses[0]!r}, which has no ELBO: use the estimator 'reconstruction', or for the mode of the "
                "posterior Pyro's Trace_ELBO"
            )
        values, num_particles = self._explored(guide_trace)
        with explained():
            model_trace = replayed(bound_model, values, num_particles, min(-self.max_plate_nesting, -2))
        draws = Draws(model_trace, values, num_particles, bound_model, gates)
        if draws.layout.plates and self._ties_data(draws, bound_guide):
            draws = draws.jointly()
        if self.importance_weighted:
            check_weights(draws, type(self).__name__)
        return draws

    def _ties_data(self, draws: Draws, guide: Program) -> bool:
        """Whether data depend on each other by a site outside their plates, in what this gradient is made of.

        Importance weights do by any latent site there, and all that depends on latent sites inside; the score
        function by latent sites there that depend on those inside.
        """
        if self.importance_weighted and draws.has_latents_outside:
            return True
        if self.use_rep and not self.importance_weighted:
            return False
        particles = self.num_particles, -self.max_plate_nesting
        inside, after = draws.after_latents(draws.guide_sites)
        if after and depends(guide, draws.guide_trace, *particles, on=inside, of=after):
            return True
        inside, after = draws.after_latents(draws.sites_in_model)
        after = [name for name in after if self.importance_weighted or name in draws.model_sites]
        return bool(after) and depends(draws.model, draws.model_trace, *particles, on=inside, of=after)

    def _sampled(self, guide: Program) -> tuple[poutine.Trace, Gates]:
        """A trace of the guide, and the gates between its sites."""
        gates = Gates()

        def gated() -> None:
            with gates:
                guide()

        with explained(), Sampling(self.antithetic, detach=not self.use_rep):
            guide_trace = traced(gated, self.num_particles, -self.max_plate_nesting)
        if self.use_rep:
            check_reparameterized(guide_trace)
        return guide_trace, gates

    def _explored(self, guide_trace: poutine.Trace) -> tuple[poutine.Trace, int]:
        """A trace of the guide with the values that the model is run at, and their number of particles."""
        return guide_trace, self.num_particles

    def _get_trace(self, model, guide, args, kwargs):  # abstract in Pyro's ELBO
        raise NotImplementedError("these estimators are made of draws(), not of pairs of traces")

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

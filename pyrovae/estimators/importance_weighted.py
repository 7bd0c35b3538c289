"""Importance-weighted bounds on log p(x), and estimators of their gradients."""

import math
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from pyrovae.estimators import twins
from pyrovae.estimators.base import Estimator
from pyrovae.estimators.baselines import leave_one_out_mean
from pyrovae.estimators.draws import Draws
from pyrovae.estimators.references import Named, of_elbo, plain
from pyrovae.estimators.twins import Twin
from pyrovae.runtime.errors import FieldError


class Iwae(Estimator):
    """The importance-weighted bound, log of the mean weight.

    With `use_rep`, its total derivative (Importance Weighted Autoencoders, Burda et al., 2016,
    https://arxiv.org/abs/1509.00519, eq. 8). Without, its score-function gradient, with no baseline
    (Variational Inference for Monte Carlo Objectives, Mnih & Rezende, 2016,
    https://arxiv.org/abs/1602.06725, eq. 5).

    Example:
        >>> Iwae(num_particles=50).importance_weighted
        True
    """

    importance_weighted: ClassVar = True
    independent: ClassVar = True
    twin: ClassVar = Twin(twins.iwae)
    alpha: float = 0.0

    def bound(self, draws: Draws) -> Float[Tensor, " B"]:
        tempered = (1 - self.alpha) * draws.log_weight
        return (tempered.logsumexp(0) - math.log(draws.num_particles)) / (1 - self.alpha)

    def surrogate(self, draws: Draws) -> Float[Tensor, " B"]:
        if self.use_rep:
            return self.bound(draws)
        signal = self.bound(draws).detach() - self.weights(draws)
        return (self.weights(draws) * draws.log_joint + signal * draws.score).sum(0)

    def plain(self, use_rep: bool) -> Named | None:
        return plain("iwae", self.num_particles, use_rep)

    def references(self, use_rep: bool) -> tuple[Named, ...]:
        if self.num_particles == 1:  # the bound is the ELBO
            return of_elbo(use_rep)
        return (("iwae" if use_rep else "vimco", self.num_particles),)

    def weights(self, draws: Draws) -> Float[Tensor, "K B"]:
        """The normalised weights, which sum to 1 over the particles, without gradient."""
        return ((1 - self.alpha) * draws.log_weight.detach()).softmax(0)


class Renyi(Iwae):
    """The variational Renyi bound with importance weights, (log mean w^(1 - alpha)) / (1 - alpha).

    From the importance-weighted bound at alpha = 0 down to the ELBO as alpha rises to 1 (Renyi
    Divergence Variational Inference, Li & Turner, 2016, https://arxiv.org/abs/1602.02311, eq. 14;
    VR-IWAE, Daudel et al., 2023, https://arxiv.org/abs/2210.06226).

    Args:
        alpha: In [0, 1).

    Example:
        >>> Renyi(alpha=1.0)
        Traceback (most recent call last):
        pyrovae.runtime.errors.FieldError: expected alpha from 0 to below 1, got 1.0
    """

    twin: ClassVar = Twin(twins.iwae)

    def __init__(self, *, alpha: float = 0.5, **settings):
        super().__init__(**settings)
        if not 0 <= alpha < 1:
            raise FieldError(f"expected alpha from 0 to below 1, got {alpha}", field="alpha")
        self.alpha = alpha

    def plain(self, use_rep: bool) -> Named | None:
        return plain("renyi", self.num_particles, use_rep)

    def references(self, use_rep: bool) -> tuple[Named, ...]:
        if self.num_particles == 1:
            return of_elbo(use_rep)
        return (plain("renyi", self.num_particles, use_rep),)


class Vimco(Iwae):
    """The importance-weighted bound by the score function, with a baseline from the other particles.

    A particle's learning signal is the bound less what it would be with the particle's weight
    replaced by the geometric mean of the others (Variational Inference for Monte Carlo Objectives,
    Mnih & Rezende, 2016, https://arxiv.org/abs/1602.06725, eq. 10).

    Example:
        >>> Vimco().num_particles
        2
    """

    twin: ClassVar = Twin(twins.vimco)
    gradients: ClassVar = (False,)
    particles: ClassVar = (2, None)

    def surrogate(self, draws: Draws) -> Float[Tensor, " B"]:
        f, weights = draws.log_weight.detach(), self.weights(draws)
        without = _leave_one_out_logsumexp(f).logaddexp(leave_one_out_mean(f)) - math.log(draws.num_particles)
        signal = self.bound(draws).detach() - without - weights
        return (weights * draws.log_joint + signal * draws.score).sum(0)


class StlIwae(Iwae):
    """The importance-weighted bound without its score terms: biased for more than one particle.

    Sticking the landing put into the importance-weighted bound (Sticking the Landing, Roeder et al.,
    2017, https://arxiv.org/abs/1703.09194). Its bias is that of Doubly Reparameterized Gradient
    Estimators, Tucker et al., 2019, https://arxiv.org/abs/1810.04152, section 3; it is here so that
    a test for bias has something to find.

    Example:
        >>> StlIwae().use_rep
        True
    """

    twin: ClassVar = Twin(twins.stl_iwae)
    gradients: ClassVar = (True,)

    def surrogate(self, draws: Draws) -> Float[Tensor, " B"]:
        return (self.weights(draws) * (draws.log_joint - draws.log_guide_fixed)).sum(0)


class Dreg(StlIwae):
    """The importance-weighted bound, with doubly reparameterized gradients in phi.

    sum_k w_k^2 (df_k/dz_k) (dz_k/dphi) with normalised weights w and, in theta, sum_k w_k df_k/dtheta
    (Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives, Tucker et al., 2019,
    https://arxiv.org/abs/1810.04152, eq. 7).

    Example:
        >>> Dreg(num_particles=8).use_rep
        True
    """

    twin: ClassVar = Twin(twins.dreg)

    def surrogate(self, draws: Draws) -> Float[Tensor, " B"]:
        draws.weigh_samples(self.weights(draws))
        return super().surrogate(draws)


class Rws(StlIwae):
    """Reweighted wake-sleep with the wake-phase update of phi; in theta, the importance-weighted bound.

    In phi it follows -KL(p(z|x) || q(z|x)), self-normalised, not the bound: sum_k w_k grad log q(z_k|x)
    (Reweighted Wake-Sleep, Bornschein & Bengio, 2015, https://arxiv.org/abs/1406.2751, eq. 13), or
    with `use_rep` its doubly reparameterized form, sum_k (w_k - w_k^2) (df_k/dz_k) (dz_k/dphi) (Tucker
    et al., 2019, https://arxiv.org/abs/1810.04152, eq. 12).

    Example:
        >>> Rws().use_rep
        False
    """

    twin: ClassVar = Twin(twins.rws)
    follows_bound: ClassVar = False
    gradients: ClassVar = (False, True)
    particles: ClassVar = (2, None)

    def surrogate(self, draws: Draws) -> Float[Tensor, " B"]:
        weights = self.weights(draws)
        if not self.use_rep:
            return (weights * (draws.log_joint + draws.score)).sum(0)
        draws.weigh_samples(1 - weights)
        return super().surrogate(draws)


def _leave_one_out_logsumexp(f: Float[Tensor, "K B"]) -> Float[Tensor, "K B"]:
    """For each particle, the logsumexp of the others, from both sides so that nothing cancels."""
    nothing = torch.full_like(f[:1], -math.inf)
    before = torch.cat([nothing, f[:-1].logcumsumexp(0)])
    after = torch.cat([f[1:].flip(0).logcumsumexp(0).flip(0), nothing])
    return before.logaddexp(after)

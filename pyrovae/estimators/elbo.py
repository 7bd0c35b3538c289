"""Estimators of the evidence lower bound (ELBO), pathwise or by the score function."""

from jaxtyping import Float
from torch import Tensor

from pyrovae.estimators.base import Draws, Estimator


class Elbo(Estimator):
    """The ELBO by Monte Carlo: the mean of log p(x, z) - log q(z|x).

    With `use_rep`, the total derivative through z (Auto-Encoding Variational Bayes, Kingma & Welling,
    2014, https://arxiv.org/abs/1312.6114, eq. 6). Without, the score-function gradient
    E[grad log p(x, z) + f grad log q(z|x)] with no baseline (Black Box Variational Inference,
    Ranganath et al., 2014, https://arxiv.org/abs/1401.0118, eq. 3).

    Example:
        >>> Elbo(num_particles=5, use_rep=False).num_particles
        5
    """

    def bound(self, draws: Draws) -> Float[Tensor, " B"]:
        return draws.log_weight.mean(0)

    def surrogate(self, draws: Draws) -> Float[Tensor, " B"]:
        if self.use_rep:
            return draws.log_weight.mean(0)
        return (draws.log_joint + draws.log_weight.detach() * draws.score).mean(0)

    def kl(self, draws: Draws) -> Float[Tensor, " B"]:
        return (draws.log_guide - draws.log_prior).mean(0)


class AnalyticKL(Estimator):
    """The ELBO with its KL in closed form: the mean of log p(x|z), less KL(q(z|x) || p(z)).

    Auto-Encoding Variational Bayes, Kingma & Welling, 2014, https://arxiv.org/abs/1312.6114, eq. 7
    (eq. 10 for the Gaussian case). Without `use_rep`, the reconstruction's gradient is estimated by
    the score function and the KL's stays exact.

    Example:
        >>> AnalyticKL().use_rep
        True
    """

    def bound(self, draws: Draws) -> Float[Tensor, " B"]:
        return draws.log_lik.mean(0) - self.kl(draws)

    def surrogate(self, draws: Draws) -> Float[Tensor, " B"]:
        if self.use_rep:
            return self.bound(draws)
        return (draws.log_lik + draws.log_lik.detach() * draws.score).mean(0) - self.kl(draws)

    def kl(self, draws: Draws) -> Float[Tensor, " B"]:
        return draws.kl.mean(0)

"""The linear-Gaussian VAE in one dimension: a Pyro pair, and its gradients' exact means and variances.

p(z) = N(0, 1), p(x|z) = N(w z + b, t2), q = N(mu, s^2), rho = log s. Every estimator's gradient in
(mu, rho) is a polynomial in the noise eps of z = mu + s eps, so Gauss-Hermite quadrature over eps gives
its moments without sampling error.
"""

import math
from dataclasses import dataclass

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

NODES, WEIGHTS = (torch.tensor(a) for a in np.polynomial.hermite_e.hermegauss(24))
WEIGHTS = WEIGHTS / WEIGHTS.sum()


class QuadratureNormal(dist.Normal):
    """A normal whose "samples" are the quadrature's nodes, one per datum."""

    def rsample(self, sample_shape=()):
        return self.loc + self.scale * NODES


@dataclass(frozen=True)
class LinearGaussian:
    x: float
    w: float
    b: float
    t2: float
    mu: float
    s: float

    def parameters(self, n: int) -> tuple[Tensor, Tensor]:
        """(mu, rho), (n,) each: one copy per datum, so that each datum's gradient is a draw of its own."""
        return tuple(
            torch.full((n,), v, dtype=torch.float64, requires_grad=True) for v in (self.mu, math.log(self.s))
        )

    def pair(self, mu: Tensor, rho: Tensor, family=dist.Normal):
        """(model, guide) over n copies of the datum x."""

        def model():
            with pyro.plate("data", len(mu)):
                z = pyro.sample("z", dist.Normal(mu.new_zeros(()), 1.0))
                pyro.sample(
                    "x", dist.Normal(self.w * z + self.b, math.sqrt(self.t2)), obs=mu.new_tensor(self.x)
                )

        def guide():
            with pyro.plate("data", len(mu)):
                pyro.sample("z", family(mu, rho.exp()))

        return model, guide

    def moments(self, estimator) -> tuple[Tensor, Tensor]:
        """The mean and the variance of an estimator's gradient in (mu, rho), exact for one particle."""
        parameters = self.parameters(len(NODES))
        loss = estimator.differentiable_loss(*self.pair(*parameters, QuadratureNormal))
        gradients = -torch.stack(torch.autograd.grad(loss, parameters))
        mean = gradients @ WEIGHTS
        return mean, (gradients - mean[:, None]) ** 2 @ WEIGHTS

    @property
    def posterior(self) -> tuple[float, float]:
        """Mean and variance of p(z|x)."""
        variance = 1 / (1 + self.w**2 / self.t2)
        return variance * self.w * (self.x - self.b) / self.t2, variance

    @property
    def log_evidence(self) -> float:
        """log p(x), in nats."""
        variance = self.w**2 + self.t2
        return -0.5 * (math.log(2 * math.pi * variance) + (self.x - self.b) ** 2 / variance)

    @property
    def log_weight(self) -> tuple[float, float, float]:
        """(A, B, C) of f = A + B eps + C eps^2."""
        m, variance = self.posterior
        d, r2 = self.mu - m, self.s**2 / variance
        a = self.log_evidence + math.log(r2) / 2 - d**2 / (2 * variance)
        return a, -self.s * d / variance, (1 - r2) / 2

    @property
    def log_lik(self) -> tuple[float, float, float]:
        """(A, B, C) of log p(x|z) = A + B eps + C eps^2."""
        e = self.x - self.b - self.w * self.mu
        a = -0.5 * math.log(2 * math.pi * self.t2) - e**2 / (2 * self.t2)
        return a, self.w * self.s * e / self.t2, -((self.w * self.s) ** 2) / (2 * self.t2)

    @property
    def elbo(self) -> float:
        a, _, c = self.log_weight
        return a + c

    @property
    def gradient(self) -> tuple[float, float]:
        """Of the ELBO in (mu, rho)."""
        m, variance = self.posterior
        return -(self.mu - m) / variance, 1 - self.s**2 / variance

    @property
    def pathwise_variance(self) -> tuple[float, float]:
        m, variance = self.posterior
        d, r2 = self.mu - m, self.s**2 / variance
        return self.s**2 / variance**2, self.s**2 * d**2 / variance**2 + 2 * r2**2

    @property
    def analytic_kl_variance(self) -> tuple[float, float]:
        e = self.x - self.b - self.w * self.mu
        ratio = self.w**2 * self.s**2 / self.t2**2
        return self.w**2 * ratio, ratio * e**2 + 2 * self.w**2 * self.s**2 * ratio

    def score_variance(self, coefficients: tuple[float, float, float]) -> tuple[float, float]:
        """Of (A + B eps + C eps^2) times the score, which is eps / s in mu and eps^2 - 1 in rho."""
        a, b, c = coefficients
        in_mu = (a**2 + 2 * b**2 + 15 * c**2 + 6 * a * c) / self.s**2
        return in_mu, 2 * a**2 + 10 * b**2 + 20 * a * c + 74 * c**2


def random_case(seed: int) -> LinearGaussian:
    generator = np.random.default_rng(seed)
    x, w, b, mu = generator.normal(0, 1.5, 4)
    t2, s = generator.uniform(0.1, 2, 2)
    return LinearGaussian(x, w, b, t2, mu, s)


TABLED = {
    "off": LinearGaussian(1, 1, 0, 1, 0.3, math.sqrt(2 / 3)),
    "sharp": LinearGaussian(1.5, 2, 0.25, 0.5, 0.7, 0.2),
    "posterior": LinearGaussian(1, 1, 0, 1, 0.5, math.sqrt(1 / 2)),
}
CASES = TABLED | {f"random-{seed}": random_case(seed) for seed in range(20)}

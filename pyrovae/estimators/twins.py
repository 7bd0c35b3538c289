"""Exact twins: gradients of estimators, written out for one datum of a linear-Gaussian model.

A twin says in numpy what its estimator gives for given noise, and shares no code with it. The test-bed (see
`pyrovae.LinearGaussian`) integrates twins over the noise, which gives the exact mean and variance of a draw.

The model is p(z) = N(0, 1), p(x|z) = N(w z + b, t2), with the guide q(z) = N(mu, s^2), rho = log s and
z = mu + s eps. K particles have N points of their joint noise.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

Grid = Float[np.ndarray, "K N"]
Both = Float[np.ndarray, "2 K N"]  # derivatives in mu and rho, or in w and b
Gradient = tuple[Float[np.ndarray, "2 N"], Float[np.ndarray, "2 N"]]  # in (mu, rho), and in (w, b)


@dataclass(frozen=True)
class Terms:
    """The terms of which gradients are made, for each particle at each point of the noise.

    Attributes:
        f: The log-weight, log p(x, z) - log q(z), in nats.
        log_lik: log p(x|z), in nats.
        score: Derivatives of log q(z) at fixed z, in mu and rho.
        total: Derivatives of f in mu and rho, also through z.
        path: Derivatives of f through z alone, in mu and rho.
        log_lik_path: Derivatives of log p(x|z) through z, in mu and rho.
        kl: (2, 1, 1) Derivatives of KL(q || p) in closed form, in mu and rho.
        theta: Derivatives of f in w and b.
        baseline: An estimator's baseline as it is now, in nats, by the estimator.
    """

    f: Grid
    log_lik: Grid
    score: Both
    total: Both
    path: Both
    log_lik_path: Both
    kl: Float[np.ndarray, "2 1 1"]
    theta: Both
    baseline: Callable[[Any], float]


@dataclass(frozen=True)
class Twin:
    """The exact twin of an estimator: at least one of two ways to its moments.

    Attributes:
        gradient: The gradient that the estimator gives, from the terms and the estimator's settings.
        variance: The variance of its gradient in mu and rho in closed form, where f = a + b eps + c eps^2, from
            (b, c, s, K). It counts where there is no `gradient`, or where K is too large for a grid.
    """

    gradient: Callable[[Terms, Any], Gradient] | None = None
    variance: Callable[[float, float, float, int], tuple[float, float]] | None = None


def _averaged(phi: Both, terms: Terms) -> Gradient:
    return phi.mean(1), terms.theta.mean(1)


def elbo(terms: Terms, estimator: Any) -> Gradient:
    """The total derivative, or the score function without a baseline."""
    return _averaged(terms.total if estimator.use_rep else terms.f * terms.score, terms)


def total(terms: Terms, estimator: Any) -> Gradient:
    """The total derivative."""
    return _averaged(terms.total, terms)


def path(terms: Terms, estimator: Any) -> Gradient:
    """The derivative through z alone."""
    return _averaged(terms.path, terms)


def analytic_kl(terms: Terms, estimator: Any) -> Gradient:
    """The derivative of log p(x|z), less that of the KL in closed form."""
    phi = terms.log_lik_path if estimator.use_rep else terms.log_lik * terms.score
    return _averaged(phi - terms.kl, terms)


def reconstruction(terms: Terms, estimator: Any) -> Gradient:
    """The derivative of log p(x|z)."""
    return _averaged(terms.log_lik_path, terms)


def baselined(terms: Terms, estimator: Any) -> Gradient:
    """The score function with the baseline that the estimator has now."""
    return _averaged((terms.f - terms.baseline(estimator)) * terms.score, terms)


def leave_one_out(terms: Terms, estimator: Any) -> Gradient:
    """The score function, where each particle's baseline is the mean of the others."""
    k = len(terms.f)
    return _averaged((terms.f - terms.f.mean(0)) * terms.score * k / (k - 1), terms)


def leave_one_out_variance(b: float, c: float, s: float, k: int) -> tuple[float, float]:
    """The variance of `leave_one_out` in closed form."""

    def variance(m22: float, m11: float, m20: float, m02: float) -> float:
        return m22 / k - (k - 2) * m11**2 / (k * (k - 1)) + m20 * m02 / (k * (k - 1))

    spread = b**2 + 2 * c**2
    return (
        variance((3 * b**2 + 10 * c**2) / s**2, b / s, spread, 1 / s**2),
        variance(10 * b**2 + 60 * c**2, 2 * c, spread, 2.0),
    )


def measure_valued_variance(b: float, c: float, s: float, k: int) -> tuple[float, float]:
    """The variance of measure-valued derivatives with coupled samples, in closed form."""
    return b**2 * (4 - math.pi) / (math.pi * s**2), b**2 + 4 * c**2


def _weighed(terms: Terms, estimator: Any) -> tuple[Grid, Float[np.ndarray, " N"]]:
    """The normalised weights, and the bound."""
    tempered = (1 - estimator.alpha) * terms.f
    top = tempered.max(0)
    total_weight = np.exp(tempered - top).sum(0)
    bound = (top + np.log(total_weight / len(terms.f))) / (1 - estimator.alpha)
    return np.exp(tempered - top) / total_weight, bound


def _summed(phi: Both, weights: Grid, terms: Terms) -> Gradient:
    return phi.sum(1), (weights * terms.theta).sum(1)


def iwae(terms: Terms, estimator: Any) -> Gradient:
    """The total derivative of the bound, or its score function without a baseline."""
    weights, bound = _weighed(terms, estimator)
    phi = weights * terms.total if estimator.use_rep else (bound - weights) * terms.score
    return _summed(phi, weights, terms)


def vimco(terms: Terms, estimator: Any) -> Gradient:
    """The score function, with the bound without a particle as that particle's baseline."""
    weights, bound = _weighed(terms, estimator)
    return _summed((bound - weights - _bounds_without(terms.f)) * terms.score, weights, terms)


def _bounds_without(f: Grid) -> Grid:
    """The bound with each particle's log-weight replaced by the mean of the others."""
    result = np.empty_like(f)
    for k in range(len(f)):
        replaced = f.copy()
        replaced[k] = np.delete(f, k, axis=0).mean(0)
        result[k] = np.logaddexp.reduce(replaced) - math.log(len(f))
    return result


def stl_iwae(terms: Terms, estimator: Any) -> Gradient:
    """The derivative through z alone, weighted."""
    weights, _ = _weighed(terms, estimator)
    return _summed(weights * terms.path, weights, terms)


def dreg(terms: Terms, estimator: Any) -> Gradient:
    """The derivative through z alone, with squared weights."""
    weights, _ = _weighed(terms, estimator)
    return _summed(weights**2 * terms.path, weights, terms)


def rws(terms: Terms, estimator: Any) -> Gradient:
    """The wake phase: the weighted score, or its doubly reparameterized form."""
    weights, _ = _weighed(terms, estimator)
    phi = (weights - weights**2) * terms.path if estimator.use_rep else weights * terms.score
    return _summed(phi, weights, terms)

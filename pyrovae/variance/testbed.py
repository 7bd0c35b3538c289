"""The linear-Gaussian VAE in one dimension: a Pyro pair whose gradients have known means and variances.

p(z) = N(0, 1), p(x|z) = N(w z + b, t2), q(z) = N(mu, s^2), rho = log s. With z = mu + s eps the
log-weight is A + B eps + C eps^2, so every estimator is an elementary function of the noise: its
moments follow from closed forms, or from Gauss-Hermite quadrature over the noise of up to 4 particles.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyrovae.estimators import (
    ESTIMATORS,
    DisArm,
    Enumerate,
    Estimator,
    LearnedBaseline,
    MeasureValued,
    Rloo,
    RunningMean,
)

Grid = Float[np.ndarray, "K N"]
NODES = {1: 64, 2: 64, 3: 40, 4: 24}  # of the grid, per particle, by the number of particles
MAX_GRID_PARTICLES = max(NODES)


@dataclass(frozen=True)
class Truth:
    """The mean and the variance of one draw of a gradient, by parameter: mu, rho, w and b."""

    mean: dict[str, float]
    variance: dict[str, float]

    def agrees(self, other: "Truth") -> bool:
        """Whether means agree to 1e-4 standard deviations and variances to 1e-4: 10^7 draws show no less."""
        return all(
            abs(self.mean[name] - other.mean[name]) <= 1e-4 * math.sqrt(variance) + 1e-9
            and abs(variance - other.variance[name]) <= 1e-4 * variance + 1e-9
            for name, variance in self.variance.items()
        )


@dataclass(frozen=True)
class LinearGaussian:
    """One datum x, the model's w, b and t2 (a variance), and the guide's mu and s (a scale).

    Example:
        >>> case = LinearGaussian(x=1.0, w=1.0, b=0.0, t2=1.0, mu=0.3, s=(2 / 3) ** 0.5)
        >>> from pyrovae.estimators import Elbo
        >>> round(case.truth(Elbo()).variance["rho"], 5)
        3.66222
    """

    x: float = 1.0
    w: float = 1.0
    b: float = 0.0
    t2: float = 1.0
    mu: float = 0.3
    s: float = math.sqrt(2 / 3)

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
        """(A, B, C) of log p(x, z) - log q(z) = A + B eps + C eps^2."""
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
        """In nats."""
        a, _, c = self.log_weight
        return a + c

    @property
    def gradient(self) -> dict[str, float]:
        """Of the ELBO."""
        m, variance = self.posterior
        e = self.x - self.b - self.w * self.mu
        return {
            "mu": -(self.mu - m) / variance,
            "rho": 1 - self.s**2 / variance,
            "w": (e * self.mu - self.w * self.s**2) / self.t2,
            "b": e / self.t2,
        }

    def pair(self) -> "LinearGaussianPair":
        """A module with `model` and `guide` over a batch of this datum, `(B, 1)`, in double precision."""
        return LinearGaussianPair(self)

    def truth(self, estimator: Estimator) -> Truth | None:
        """The exact moments of one draw of the estimator's gradient of its bound, or of its objective.

        A baseline counts at the value that it has now. None where neither a closed form nor a grid
        is at hand: importance weights of more than MAX_GRID_PARTICLES particles, or ones so uneven that a
        grid of three quarters of its nodes would give other values.

        Raises:
            ValueError: The estimator is not one of ESTIMATORS for a Gaussian guide.
        """
        k, independent = estimator.num_particles, not estimator.independent
        if isinstance(estimator, MeasureValued):
            return self._measure_valued()
        if independent:  # an average over particles, or over pairs
            k = 2 if estimator.antithetic else 1
        if k > MAX_GRID_PARTICLES:
            return self._rloo(k) if isinstance(estimator, Rloo) else None
        truth = self._moments(estimator, k, NODES[k])
        if estimator.importance_weighted and k > 1:  # else a polynomial in the noise, where the grid is exact
            return truth if truth.agrees(self._moments(estimator, k, 3 * NODES[k] // 4)) else None
        return truth

    def _moments(self, estimator: Estimator, k: int, nodes: int) -> Truth:
        noise, weights = _grid(1 if estimator.antithetic else k, nodes)
        noise = np.concatenate([noise, -noise]) if estimator.antithetic else noise
        gradients = self._gradients(estimator, noise)
        mean = {name: float(g @ weights) for name, g in gradients.items()}
        spread = {name: float((g - mean[name]) ** 2 @ weights) for name, g in gradients.items()}
        groups = estimator.num_particles // k
        return Truth(mean, {name: value / groups for name, value in spread.items()})

    def _gradients(self, estimator: Estimator, eps: Grid) -> dict[str, Float[np.ndarray, " N"]]:
        """What the estimator gives for this noise, written out for this model alone."""
        m, variance = self.posterior
        z = self.mu + self.s * eps
        e = self.x - self.b - self.w * z
        a, b, c = self.log_weight
        f = a + b * eps + c * eps**2
        along = np.stack([np.ones_like(eps), self.s * eps])  # dz by mu, rho
        score = np.stack([eps / self.s, eps**2 - 1])
        joint = -(z - m) / variance  # d log p(x, z) / dz
        total = joint * along + np.array([0.0, 1.0])[:, None, None]
        path = (joint + eps / self.s) * along
        theta = np.stack([e * z, e]) / self.t2
        by_name = {cls: name for name, cls in ESTIMATORS.items()}
        if type(estimator) not in by_name or isinstance(estimator, DisArm | Enumerate):
            raise ValueError(f"expected an estimator in ESTIMATORS for a Gaussian guide, got {estimator}")
        name = by_name[type(estimator)]
        if not estimator.importance_weighted:
            phi = self._plain(name, estimator, eps, f, score, total, path)
            return dict(zip(("mu", "rho", "w", "b"), [*phi.mean(1), *theta.mean(1)], strict=True))
        tempered = (1 - estimator.alpha) * f
        top = tempered.max(0)
        total_weight = np.exp(tempered - top).sum(0)
        weights = np.exp(tempered - top) / total_weight
        bound = (top + np.log(total_weight / len(f))) / (1 - estimator.alpha)
        signal = bound - weights - (self._bounds_without(f) if name == "vimco" else 0)
        phi = {
            "iwae": weights * total if estimator.use_rep else signal * score,
            "renyi": weights * total if estimator.use_rep else signal * score,
            "vimco": signal * score,
            "dreg": weights**2 * path,
            "stl-iwae": weights * path,
            "rws": (weights - weights**2) * path if estimator.use_rep else weights * score,
        }[name]
        return dict(zip(("mu", "rho", "w", "b"), [*phi.sum(1), *(weights * theta).sum(1)], strict=True))

    def _plain(self, name, estimator, eps, f, score, total, path) -> Float[np.ndarray, "2 K N"]:
        if name == "stl":
            return path
        if name in ("analytic-kl", "reconstruction"):
            a, b, c = self.log_lik
            lik = a + b * eps + c * eps**2
            slope = (b + 2 * c * eps) / self.s
            of_kl = (name == "analytic-kl") * np.array([self.mu, self.s**2 - 1])[:, None, None]
            along = np.stack([np.ones_like(eps), self.s * eps])
            return (slope * along if estimator.use_rep else lik * score) - of_kl
        if estimator.use_rep:
            return total
        if name == "rloo":
            return (f - f.mean(0)) * score * len(f) / (len(f) - 1)
        return (f - self._baseline(estimator)) * score

    def _baseline(self, estimator: Estimator) -> float:
        if isinstance(estimator, RunningMean) and estimator.mean is not None:
            return estimator.mean.item()
        if isinstance(estimator, LearnedBaseline) and estimator.network is not None:
            pair = self.pair()
            x = torch.tensor([[self.x]], dtype=torch.float64)
            return estimator.baseline(estimator.draws(pair.model, pair.guide, x)).item()
        return 0.0

    @staticmethod
    def _bounds_without(f: Grid) -> Grid:
        """The bound with each particle's log-weight replaced by the mean of the others."""
        result = np.empty_like(f)
        for k in range(len(f)):
            replaced = f.copy()
            replaced[k] = np.delete(f, k, axis=0).mean(0)
            result[k] = np.logaddexp.reduce(replaced) - math.log(len(f))
        return result

    def _theta_variance(self) -> dict[str, float]:
        linear, square = self.s * (self.x - self.b - 2 * self.w * self.mu), -self.w * self.s**2
        return {
            "w": (linear**2 + 2 * square**2) / self.t2**2,
            "b": (self.w * self.s / self.t2) ** 2,
        }

    def _measure_valued(self) -> Truth:
        _, b, c = self.log_weight
        phi = {"mu": b**2 * (4 - math.pi) / (math.pi * self.s**2), "rho": b**2 + 4 * c**2}
        return Truth(self.gradient, phi | self._theta_variance())

    def _rloo(self, k: int) -> Truth:
        _, b, c = self.log_weight

        def variance(m22: float, m11: float, m20: float, m02: float) -> float:
            return m22 / k - (k - 2) * m11**2 / (k * (k - 1)) + m20 * m02 / (k * (k - 1))

        spread = b**2 + 2 * c**2
        phi = {
            "mu": variance((3 * b**2 + 10 * c**2) / self.s**2, b / self.s, spread, 1 / self.s**2),
            "rho": variance(10 * b**2 + 60 * c**2, 2 * c, spread, 2.0),
        }
        theta = {name: value / k for name, value in self._theta_variance().items()}
        return Truth(self.gradient, phi | theta)


class LinearGaussianPair(PyroModule):
    """The model and the guide of a LinearGaussian, with linear layers whose parameters are its numbers.

    The encoder's bias is (mu, rho), the decoder's weight and bias are w and b.
    """

    PARAMETERS: ClassVar[dict[str, tuple[str, int]]] = {
        "mu": ("encoder.bias", 0),
        "rho": ("encoder.bias", 1),
        "w": ("decoder.weight", 0),
        "b": ("decoder.bias", 0),
    }

    def __init__(self, case: LinearGaussian, family: Callable = dist.Normal):
        super().__init__()
        self.encoder = nn.Linear(1, 2, dtype=torch.float64)
        self.decoder = nn.Linear(1, 1, dtype=torch.float64)
        self.encoder.weight.requires_grad_(False)
        with torch.no_grad():
            self.encoder.weight.zero_()
            self.encoder.bias.copy_(torch.tensor([case.mu, math.log(case.s)], dtype=torch.float64))
            self.decoder.weight.fill_(case.w)
            self.decoder.bias.fill_(case.b)
        self.t = math.sqrt(case.t2)
        self.family = family

    def model(self, x: Float[Tensor, "B 1"]) -> None:
        """p(z) p(x|z)."""
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), self.t).to_event(1), obs=x)

    def guide(self, x: Float[Tensor, "B 1"]) -> None:
        """q(z)."""
        with pyro.plate("data", len(x), dim=-1):
            loc, rho = self.encoder(x).chunk(2, dim=-1)
            pyro.sample("z", self.family(loc, rho.exp()).to_event(1))

    def parts(self) -> dict[str, dict[str, slice]]:
        """Its parameters in named groups: of each parameter, these rows."""
        every = slice(None)
        return {
            "loc": {"encoder.bias": slice(0, 1)},
            "scale": {"encoder.bias": slice(1, 2)},
            "decoder": {"decoder.weight": every, "decoder.bias": every},
        }


def _grid(k: int, nodes: int) -> tuple[Grid, Float[np.ndarray, " N"]]:
    """Gauss-Hermite nodes for the noise of k particles, and their weights, which sum to 1."""
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    weights = weights / weights.sum()
    noise = np.stack([axis.ravel() for axis in np.meshgrid(*[points] * k, indexing="ij")])
    joint = np.ones(1)
    for _ in range(k):
        joint = np.outer(joint, weights).ravel()
    return noise, joint

"""The linear-Gaussian VAE in one dimension: a Pyro pair whose gradients have known means and variances.

p(z) = N(0, 1), p(x|z) = N(w z + b, t2), q(z) = N(mu, s^2), rho = log s. With z = mu + s eps the
log-weight is A + B eps + C eps^2, so every estimator is an elementary function of the noise, which its exact
twin says. Its moments follow from closed forms, or from Gauss-Hermite quadrature over the noise of up to 4
particles.
"""

import copy
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

from pyrovae.estimators import Estimator
from pyrovae.estimators.baselines import Baselined
from pyrovae.estimators.twins import Grid, Terms, Twin
from pyrovae.runtime.random_states import seeded

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
            ValueError: The estimator has no exact twin.
        """
        twin, k = estimator.twin, estimator.num_particles
        if twin is None:
            raise ValueError(f"expected an estimator in ESTIMATORS for a Gaussian guide, got {estimator}")
        if not estimator.independent:  # an average over particles, or over pairs
            k = 2 if estimator.antithetic else 1
        if twin.gradient is None or k > MAX_GRID_PARTICLES:
            return self._closed(twin, k)
        truth = self._moments(estimator, k, NODES[k])
        if estimator.importance_weighted and k > 1:  # else a polynomial in the noise, where the grid is exact
            return truth if truth.agrees(self._moments(estimator, k, 3 * NODES[k] // 4)) else None
        return truth

    def _moments(self, estimator: Estimator, k: int, nodes: int) -> Truth:
        noise, weights = _grid(1 if estimator.antithetic else k, nodes)
        noise = np.concatenate([noise, -noise]) if estimator.antithetic else noise
        phi, theta = estimator.twin.gradient(self._terms(noise), estimator)
        gradients = dict(zip(("mu", "rho", "w", "b"), [*phi, *theta], strict=True))
        mean = {name: float(g @ weights) for name, g in gradients.items()}
        spread = {name: float((g - mean[name]) ** 2 @ weights) for name, g in gradients.items()}
        groups = estimator.num_particles // k
        return Truth(mean, {name: value / groups for name, value in spread.items()})

    def _terms(self, eps: Grid) -> Terms:
        """The terms of gradients for this noise, written out for this model alone."""
        m, variance = self.posterior
        z = self.mu + self.s * eps
        e = self.x - self.b - self.w * z
        (a, b, c), (a_lik, b_lik, c_lik) = self.log_weight, self.log_lik
        along = np.stack([np.ones_like(eps), self.s * eps])  # dz by mu, rho
        joint = -(z - m) / variance  # d log p(x, z) / dz
        return Terms(
            f=a + b * eps + c * eps**2,
            log_lik=a_lik + b_lik * eps + c_lik * eps**2,
            score=np.stack([eps / self.s, eps**2 - 1]),
            total=joint * along + np.array([0.0, 1.0])[:, None, None],
            path=(joint + eps / self.s) * along,
            log_lik_path=(b_lik + 2 * c_lik * eps) / self.s * along,
            kl=np.array([self.mu, self.s**2 - 1])[:, None, None],
            theta=np.stack([e * z, e]) / self.t2,
            baseline=self._baseline,
        )

    def _baseline(self, estimator: Baselined) -> float:
        """The value that a baseline has now at this datum."""
        pair, x = self.pair(), torch.tensor([[self.x]], dtype=torch.float64)
        with seeded(0, x.device):
            held = copy.deepcopy(estimator)
            return held.baseline(held.draws(pair.model, pair.guide, x)).item()

    def _closed(self, twin: Twin, k: int) -> Truth | None:
        """The moments by a closed form, where the twin has one."""
        if twin.variance is None:
            return None
        _, b, c = self.log_weight
        linear, square = self.s * (self.x - self.b - 2 * self.w * self.mu), -self.w * self.s**2
        theta = {"w": (linear**2 + 2 * square**2) / self.t2**2, "b": (self.w * self.s / self.t2) ** 2}
        in_mu, in_rho = twin.variance(b, c, self.s, k)
        phi = {"mu": in_mu, "rho": in_rho}
        return Truth(self.gradient, phi | {name: value / k for name, value in theta.items()})


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

    @staticmethod
    def by_parameter(values: dict[str, float]) -> dict[str, Tensor]:
        """Numbers of mu, rho, w and b as tensors of the shapes of the parameters."""
        double = torch.float64
        return {
            "encoder.bias": torch.tensor([values["mu"], values["rho"]], dtype=double),
            "decoder.weight": torch.tensor([[values["w"]]], dtype=double),
            "decoder.bias": torch.tensor([values["b"]], dtype=double),
        }

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

"""The linear-Gaussian pair with its parameters copied for each datum, whose gradient is then a draw of its own.

With quadrature nodes in place of the noise, one grid point per datum, the draws' weighted moments are exact.
"""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyrovae.variance.moments import gradient_moments
from pyrovae.variance.stats import GradientStats, block_size
from pyrovae.variance.testbed import LinearGaussian

NAMES = ("mu", "rho", "w", "b")


class Copies:
    """n copies of a case. `family` is the guide's: a normal, or one with given noise."""

    shift: float = 0.0  # of log p(x, z)

    def __init__(self, case: LinearGaussian, n: int, family=dist.Normal):
        self.case, self.n, self.family = case, n, family
        values = case.mu, math.log(case.s), case.w, case.b
        self.parameters = [torch.full((n,), v, dtype=torch.float64, requires_grad=True) for v in values]
        self.mu, self.rho, self.w, self.b = self.parameters
        self.pair = self.model, self.guide

    def model(self) -> None:
        with pyro.plate("data", self.n):
            z = pyro.sample("z", dist.Normal(self.mu.new_zeros(()), 1.0))
            x = self.mu.new_tensor(self.case.x)
            pyro.sample("x", dist.Normal(self.w * z + self.b, math.sqrt(self.case.t2)), obs=x)
            pyro.factor("shift", x.new_tensor(self.shift))

    def guide(self) -> None:
        with pyro.plate("data", self.n):
            pyro.sample("z", self.family(self.mu, self.rho.exp()))

    def gradients(self, value: Tensor) -> dict[str, Tensor]:
        """By parameter and datum, (n,) each, of the sum of these values."""
        gradients = torch.autograd.grad(value.sum(), self.parameters, allow_unused=True, retain_graph=True)
        return {
            name: torch.zeros(self.n, dtype=torch.float64) if gradient is None else gradient
            for name, gradient in zip(NAMES, gradients, strict=True)
        }

    def draws(self, estimator, seed: int = 0):
        pyro.set_rng_seed(seed)
        return estimator.draws(*self.pair)

    def gradients_of(self, estimator, seed: int = 0) -> dict[str, Tensor]:
        """One draw of the estimator's gradient per datum."""
        return self.gradients(estimator.surrogate(self.draws(estimator, seed)))


def given_noise(noise: Tensor):
    """A family of normals whose "samples" have this noise, (K, n)."""

    class Given(dist.Normal):
        def rsample(self, sample_shape=()):
            return self.loc + self.scale * noise.reshape(self.batch_shape)

    return Given


def grid(particles: int, nodes: int) -> tuple[Tensor, Tensor]:
    """Gauss-Hermite nodes for the noise of so many particles, (K, nodes^K), and their weights."""
    points, weights = (torch.tensor(a) for a in np.polynomial.hermite_e.hermegauss(nodes))
    noise = torch.cartesian_prod(*[points] * particles).reshape(-1, particles).T
    joint = torch.cartesian_prod(*[weights / weights.sum()] * particles).reshape(-1, particles).prod(-1)
    return noise, joint


def random_case(seed: int) -> LinearGaussian:
    generator = np.random.default_rng(seed)
    x, w, b, mu = generator.normal(0, 1.5, 4)
    t2, s = generator.uniform(0.1, 2, 2)
    return LinearGaussian(x=x, w=w, b=b, t2=t2, mu=mu, s=s)


def mild_case(seed: int) -> LinearGaussian:
    """One whose importance weights are even enough for quadrature."""
    generator = np.random.default_rng(seed)
    x, w, b, mu = generator.normal(0, 0.5, 4)
    return LinearGaussian(x=x, w=w, b=b, t2=generator.uniform(1, 2), mu=mu, s=generator.uniform(0.5, 1))


TABLED = {
    "off": LinearGaussian(),
    "sharp": LinearGaussian(x=1.5, w=2.0, b=0.25, t2=0.5, mu=0.7, s=0.2),
    "posterior": LinearGaussian(mu=0.5, s=math.sqrt(1 / 2)),
}
CASES = TABLED | {f"random-{seed}": random_case(seed) for seed in range(20)}
MILD = TABLED | {f"mild-{seed}": mild_case(seed) for seed in range(4)}
OFF = TABLED["off"]


def stats_of(samples: torch.Tensor, seed: int = 0) -> GradientStats:
    """The statistics of these draws of a gradient, (draws, entries), all of one parameter."""
    samples = samples.double()
    n, spread = len(samples), samples.var(0)
    block = block_size(n)
    before = torch.arange(n) // block * block
    centres = samples.cumsum(0)[before - 1] / before.clamp(min=1)[:, None]
    distances = (samples - centres).square().sum(1) * before / (before + 1)
    distances[:block] = (samples[:block:2] - samples[1:block:2]).square().sum(1).repeat_interleave(2) / 2
    return GradientStats(
        draws=n,
        seed=seed,
        mean={"p": samples.mean(0)},
        variance={"p": spread},
        tr_cov_of={"p": spread.sum().item()},
        parts={"encoder": {"p": slice(None)}},
        looped="",
        block_sums={"p": torch.stack([part.sum(0) for part in samples.split(block)])},
        traces={"encoder": spread.sum().item()},
        distances={"encoder": distances.numpy()},
    )


def runs(estimator, draws: int, number: int, case: LinearGaussian = OFF, seed: int = 0) -> list[GradientStats]:
    """So many independent measurements, all drawn in one pass."""
    gradients = Copies(case, draws * number).gradients_of(estimator, seed)
    samples = torch.stack(list(gradients.values()), dim=1).detach()
    return [stats_of(part, seed=i) for i, part in enumerate(samples.split(draws))]


def measured(case: LinearGaussian, estimator, draws: int = 2048, seed: int = 0, **settings) -> GradientStats:
    pair = case.pair()
    x = torch.full((1, 1), case.x, dtype=torch.float64)
    settings = {"parts": pair.parts()} | settings
    return gradient_moments(pair.model, pair.guide, estimator, x, draws=draws, seed=seed, **settings)


def by_parameter(values: dict[str, float]) -> dict[str, torch.Tensor]:
    """Numbers of mu, rho, w and b as tensors of the pair's parameters."""
    mu, rho, w, b = (torch.tensor(values[name], dtype=torch.float64) for name in ("mu", "rho", "w", "b"))
    return {
        "encoder.bias": torch.stack([mu, rho]),
        "decoder.weight": w.reshape(1, 1),
        "decoder.bias": b.reshape(1),
    }

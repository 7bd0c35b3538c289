"""Estimates of log p(x), the evidence of a VAE: importance sampling, prior samples, annealing.

Each takes observations as `VAE.observe` gives them, so that all estimates are of the same x,
and leaves the VAE and the random states as they were. Each estimates p(x) without bias, so that its
logarithm is too small on average.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import pyro
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from pyrovae.vae import VAE

Progress = Callable[[int, int, str], None]  # (done, total, what)
NUMBERS = 2**22  # that the decoder gives at a time, unless a batch size says otherwise
TARGET_ACCEPTANCE, GAIN, FIRST_STEP_SIZE = 0.65, 0.2, 0.5
PILOT_CHAINS = 4


@dataclass(frozen=True)
class Evidence:
    """What K weighted particles say of log p(x), for each of N images, on the CPU.

    Attributes:
        log_evidence: (N,) log of the mean weight, in nats.
        effective_sample_size: (N,) (sum w)^2 / sum w^2, from 1 to K.
        bound: (N,) the mean log weight, in nats: the ELBO for importance sampling.
        log_lik: (N,) the mean of log p(x|z) over the particles, unweighted, in nats.
        particles: K.
    """

    log_evidence: Float[Tensor, " N"]
    effective_sample_size: Float[Tensor, " N"]
    bound: Float[Tensor, " N"]
    log_lik: Float[Tensor, " N"]
    particles: int

    @property
    def error(self) -> Float[Tensor, " N"]:
        """The standard error of each log_evidence by the delta method, in nats: too small if K is too small."""
        return (1 / self.effective_sample_size - 1 / self.particles).clamp(min=0).sqrt()


class _Tally:
    """Sums over particles that come a few at a time, in float64."""

    def __init__(self, x: Shaped[Tensor, "N E"]):
        zeros = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        self.log_sum, self.log_squares = zeros - math.inf, zeros - math.inf
        self.sum_log, self.sum_lik = zeros.clone(), zeros.clone()

    def add(
        self, rows: slice | Tensor, log_weight: Float[Tensor, "K B"], log_lik: Float[Tensor, "K B"]
    ) -> None:
        log_weight = log_weight.double()
        self.log_sum[rows] = torch.logaddexp(self.log_sum[rows], log_weight.logsumexp(0))
        self.log_squares[rows] = torch.logaddexp(self.log_squares[rows], (2 * log_weight).logsumexp(0))
        self.sum_log[rows] += log_weight.sum(0)
        self.sum_lik[rows] += log_lik.double().sum(0)

    def result(self, particles: int) -> Evidence:
        effective = (2 * self.log_sum - self.log_squares).exp()
        means = (
            self.log_sum - math.log(particles),
            effective,
            self.sum_log / particles,
            self.sum_lik / particles,
        )
        return Evidence(*(each.cpu() for each in means), particles)


def importance_weighted(
    vae: VAE,
    x: Shaped[Tensor, "N E"],
    *,
    particles: int = 1000,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Evidence:
    """log of the mean of p(x, z_k) / q(z_k|x), z_k ~ q(z|x).

    An image's noise depends on the seed and its place only: not on the other images, nor on the
    batch size, which changes nothing but rounding.

    Args:
        particles: K.
        batch_size: Particles decoded at a time; what keeps memory small if None.

    Source: Importance Weighted Autoencoders, Burda, Grosse & Salakhutdinov, 2016,
    https://arxiv.org/abs/1509.00519, eq. 8.
    """
    if not vae.posterior.density:
        raise ValueError("expected a guide with a density, got an autoencoder's point mass: see naive")
    chunk, tally = _chunk(vae, x, particles, batch_size), _Tally(x)
    with _evaluating(vae, seed):
        prior = vae.posterior.prior(vae.zeros)
        for i in range(len(x)):
            q = vae.posterior_of(x[i : i + 1])
            for z in q.sample((particles,)).split(chunk):
                log_lik = vae.log_lik(z, x[i])
                tally.add(slice(i, i + 1), log_lik + prior.log_prob(z) - q.log_prob(z), log_lik)
            _report(progress, i + 1, len(x), "importance sampling")
    return tally.result(particles)


def naive(
    vae: VAE,
    x: Shaped[Tensor, "N E"],
    *,
    particles: int = 1000,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Evidence:
    """log of the mean of p(x|z_k), z_k ~ p(z), the same K prior samples for all images.

    Few of them explain a given image, so that it falls short by far in more than a few dimensions.
    Sharing the samples makes the errors of different images dependent.

    Args:
        particles: K.
        batch_size: Pairs of a particle and an image at a time; what keeps memory small if None.
    """
    chunk, tally = _chunk(vae, x, particles, batch_size), _Tally(x)
    images = min(len(x), math.isqrt(chunk))
    with _evaluating(vae, seed):
        samples = vae.posterior.prior(vae.zeros).sample((particles,))
        done = 0
        for z in samples.split(chunk // images):
            for of_class in _by_class(vae, x):
                observed, y = vae.split(x[of_class])
                p = vae.likelihood_of(z.unsqueeze(1), None if y is None else y[0])
                for part, rows in zip(observed.split(images), of_class.split(images), strict=True):
                    log_lik = p.log_prob(part)
                    tally.add(rows, log_lik, log_lik)
            done += len(z)
            _report(progress, done, particles, "prior samples")
    return tally.result(particles)


def annealed(
    vae: VAE,
    x: Shaped[Tensor, "N E"],
    *,
    steps: int = 1000,
    chains: int = 16,
    leapfrog: int = 10,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Evidence:
    """Annealed importance sampling from p(z) to p(x, z) by way of p(z) p(x|z)^b, 0 <= b <= 1.

    Each step is a Hamiltonian Monte Carlo transition at its b. A pilot of a few chains adapts the step
    size of each image and step toward an acceptance of 0.65; then the chains that count run with those
    sizes, times a random number from 0.5 to 1.5, since weights of chains that adapt are biased. (Wu et
    al. adapt while they measure.)

    Args:
        steps: Values of b after 0, on Wu et al.'s sigmoid schedule.
        chains: Per image; the particles of the result.
        leapfrog: Leapfrog steps of a transition.
        batch_size: Chains at a time, at least those of one image; affects memory, and which noise an
            image gets, only.

    Raises:
        ValueError: z is discrete, or a number is out of range.

    Sources: Annealed importance sampling, Neal, 2001, https://arxiv.org/abs/physics/9803008, eq. 8;
    On the quantitative analysis of decoder-based generative models, Wu, Burda, Salakhutdinov & Grosse,
    2017, https://arxiv.org/abs/1611.04273, section 3.1.
    """
    if vae.posterior.discrete:
        raise ValueError(
            f"expected ais with a continuous z only, got the discrete guide {type(vae.posterior).__name__}"
        )
    for name, value in {"ais_steps": steps, "leapfrog": leapfrog}.items():
        if value < 1:
            raise ValueError(f"expected {name} >= 1, got {value}")
    chunk, tally = _chunk(vae, x, chains, batch_size, name="ais_chains"), _Tally(x)
    temperatures = _schedule(steps)
    images = max(1, chunk // chains)
    passes = 2 * math.ceil(len(x) / images)

    def annealing(number: int, part: Tensor, count: int, step_sizes: Tensor | None = None):
        z = vae.posterior.prior(vae.zeros).sample((count, len(part)))
        return _anneal(
            lambda z: _point(vae, z, part),
            z,
            temperatures,
            leapfrog,
            step_sizes,
            lambda step: _report(progress, number * steps + step, passes * steps, "annealing"),
        )

    with _evaluating(vae, seed):
        for number, start in enumerate(range(0, len(x), images)):
            rows = slice(start, start + images)
            *_, step_sizes = annealing(2 * number, x[rows], PILOT_CHAINS)
            log_weight, log_lik, _ = annealing(2 * number + 1, x[rows], chains, step_sizes)
            tally.add(rows, log_weight, log_lik)
    return tally.result(chains)


def _schedule(steps: int) -> list[float]:
    """From 0 to 1 by the sigmoid of evenly spaced numbers from -4 to 4, close together at the ends."""
    values = torch.linspace(-4, 4, steps + 1, dtype=torch.float64).sigmoid()
    return ((values - values[0]) / (values[-1] - values[0])).tolist()


@dataclass(frozen=True)
class _Point:
    """Chains' places, log densities and their gradients in z."""

    z: Float[Tensor, "K B L"]
    log_prior: Float[Tensor, "K B"]
    log_lik: Float[Tensor, "K B"]
    prior_gradient: Float[Tensor, "K B L"]
    lik_gradient: Float[Tensor, "K B L"]

    def log_density(self, b: float) -> Float[Tensor, "K B"]:
        return self.log_prior + b * self.log_lik

    def gradient(self, b: float) -> Float[Tensor, "K B L"]:
        return self.prior_gradient + b * self.lik_gradient

    def or_else(self, other: "_Point", here: Bool[Tensor, "K B"]) -> "_Point":
        """This point where `here`, else the other."""
        wide = here.unsqueeze(-1)
        return _Point(
            torch.where(wide, self.z, other.z),
            torch.where(here, self.log_prior, other.log_prior),
            torch.where(here, self.log_lik, other.log_lik),
            torch.where(wide, self.prior_gradient, other.prior_gradient),
            torch.where(wide, self.lik_gradient, other.lik_gradient),
        )


def _point(vae: VAE, z: Float[Tensor, "K B L"], x: Shaped[Tensor, "B E"]) -> _Point:
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        log_prior, log_lik = vae.posterior.prior(vae.zeros).log_prob(z), vae.log_lik(z, x)
        gradients = (torch.autograd.grad(term.sum(), z)[0] for term in (log_prior, log_lik))
        return _Point(z.detach(), log_prior.detach(), log_lik.detach(), *gradients)


def _anneal(
    at: Callable[[Tensor], _Point],
    z: Float[Tensor, "K B L"],
    temperatures: list[float],
    leapfrog: int,
    step_sizes: Float[Tensor, "steps B"] | None,
    progress: Callable[[int], None],
) -> tuple[Float[Tensor, "K B"], Float[Tensor, "K B"], Float[Tensor, "steps B"]]:
    """Log weights and last log p(x|z) of chains from z, and their step sizes, which adapt if None are given."""
    point, log_weight, used = at(z), torch.zeros(z.shape[:2], dtype=torch.float64, device=z.device), []
    step_size = z.new_full(z.shape[1:2], FIRST_STEP_SIZE)
    for step, (before, b) in enumerate(pairwise(temperatures)):
        log_weight += (b - before) * point.log_lik.double()
        if step_sizes is not None:
            step_size = step_sizes[step]
        used.append(step_size)
        point, acceptance = _transition(at, point, b, step_size.unsqueeze(-1), leapfrog)
        step_size = step_size * (GAIN * (acceptance.mean(0) - TARGET_ACCEPTANCE)).exp()
        progress(step + 1)
    return log_weight, point.log_lik, torch.stack(used)


def _transition(
    at: Callable[[Tensor], _Point], point: _Point, b: float, step_size: Float[Tensor, "B 1"], leapfrog: int
) -> tuple[_Point, Float[Tensor, "K B"]]:
    """One Hamiltonian Monte Carlo transition, and its probability of acceptance."""
    # Paths of one length may be whole periods of a dimension, which then stands still.
    step_size = step_size * (0.5 + torch.rand_like(step_size))
    momentum = torch.randn_like(point.z)
    before = point.log_density(b) - 0.5 * momentum.square().sum(-1)
    moved, momentum = point, momentum + 0.5 * step_size * point.gradient(b)
    for step in range(leapfrog):
        moved = at(moved.z + step_size * momentum)
        weight = 1.0 if step < leapfrog - 1 else 0.5
        momentum = momentum + weight * step_size * moved.gradient(b)
    log_ratio = moved.log_density(b) - 0.5 * momentum.square().sum(-1) - before
    log_ratio = log_ratio.nan_to_num(nan=-math.inf)  # a path that ran away is refused
    accepted = torch.rand_like(log_ratio).log() < log_ratio
    return moved.or_else(point, accepted), log_ratio.clamp(max=0).exp()


def _by_class(vae: VAE, x: Shaped[Tensor, "N E"]) -> tuple[Int[Tensor, " rows"], ...]:
    """The rows of each class, which share p(x|z, y); all rows where there are none."""
    y = vae.split(x)[1]
    rows = torch.arange(len(x), device=x.device)
    return (rows,) if y is None else tuple(rows[y[:, c] > 0] for c in y.any(0).nonzero()[:, 0])


def _chunk(vae: VAE, x: Tensor, particles: int, batch_size: int | None, name: str = "particles") -> int:
    """How many decoded images to hold at a time."""
    for label, value in {name: particles, "batch_size": batch_size, "images": len(x)}.items():
        if value is not None and value < 1:
            raise ValueError(f"expected {label} >= 1, got {value}")
    vae.check_observed(x)
    return batch_size or max(1, NUMBERS // (x.shape[1] * vae.likelihood.outputs))


def _report(progress: Progress | None, done: int, total: int, what: str) -> None:
    if progress is not None:
        progress(done, total, what)


@contextlib.contextmanager
def _evaluating(vae: VAE, seed: int) -> Iterator[None]:
    with vae.evaluating(), seeded(seed, vae.zeros.device), pyro.validation_enabled(False):
        yield


@contextlib.contextmanager
def seeded(seed: int, device: torch.device | str) -> Iterator[None]:
    """torch's default generators seeded, and on leaving set back to where they were."""
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield

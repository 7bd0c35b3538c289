"""Markov chains from p(z) to p(z|x) and back, by way of p(z) p(x|z)^b, and their importance weights.

Each step is a Hamiltonian Monte Carlo transition, which leaves its own p(z) p(x|z)^b as it is and is its own
reverse.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Bool, Float
from torch import Tensor

TARGET_ACCEPTANCE, GAIN, FIRST_STEP_SIZE = 0.65, 0.2, 0.5


def schedule(steps: int) -> list[float]:
    """Values of b from 0 to 1, close together at the ends: the sigmoid of even steps from -4 to 4, rescaled."""
    values = torch.linspace(-4, 4, steps + 1, dtype=torch.float64).sigmoid()
    return ((values - values[0]) / (values[-1] - values[0])).tolist()


@dataclass(frozen=True)
class Point:
    """Chains' places, log densities and their gradients in z."""

    z: Float[Tensor, "K B L"]
    log_prior: Float[Tensor, "K B"]
    log_lik: Float[Tensor, "K B"]
    prior_gradient: Float[Tensor, "K B L"]
    lik_gradient: Float[Tensor, "K B L"]

    def log_density(self, b: float) -> Float[Tensor, "K B"]:
        """log p(z) + b log p(x|z)."""
        return self.log_prior + b * self.log_lik

    def gradient(self, b: float) -> Float[Tensor, "K B L"]:
        """The gradient of `log_density` in z."""
        return self.prior_gradient + b * self.lik_gradient

    def or_else(self, other: "Point", here: Bool[Tensor, "K B"]) -> "Point":
        """This point where `here`, else the other."""
        wide = here.unsqueeze(-1)
        return Point(
            torch.where(wide, self.z, other.z),
            torch.where(here, self.log_prior, other.log_prior),
            torch.where(here, self.log_lik, other.log_lik),
            torch.where(wide, self.prior_gradient, other.prior_gradient),
            torch.where(wide, self.lik_gradient, other.lik_gradient),
        )


def anneal(
    at: Callable[[Tensor], Point],
    z: Float[Tensor, "K B L"],
    temperatures: list[float],
    leapfrog: int,
    step_sizes: Float[Tensor, "steps B"] | None,
    progress: Callable[[], None],
) -> tuple[Float[Tensor, "K B"], Float[Tensor, "K B"], Float[Tensor, "steps B"]]:
    """Runs chains from draws of p(z) to p(z|x).

    Args:
        at: The point at any z.
        z: Draws from the prior.
        temperatures: The values of b, from 0 to 1.
        leapfrog: Leapfrog steps of a transition.
        step_sizes: One for each step and image; if None, they adapt to the chains while these run, and the
            weights are biased.
        progress: Called after each step.

    Returns:
        log w, where E[w] = p(x); the last log p(x|z); and the step sizes.
    """
    point, log_weight, used = at(z), torch.zeros(z.shape[:2], dtype=torch.float64, device=z.device), []
    step_size = z.new_full(z.shape[1:2], FIRST_STEP_SIZE)
    for step, (before, b) in enumerate(pairwise(temperatures)):
        log_weight += (b - before) * point.log_lik.double()
        if step_sizes is not None:
            step_size = step_sizes[step]
        used.append(step_size)
        point, acceptance = transition(at, point, b, step_size.unsqueeze(-1), leapfrog)
        step_size = step_size * (GAIN * (acceptance.mean(0) - TARGET_ACCEPTANCE)).exp()
        progress()
    return log_weight, point.log_lik, torch.stack(used)


def anneal_back(
    at: Callable[[Tensor], Point],
    z: Float[Tensor, "K B L"],
    temperatures: list[float],
    leapfrog: int,
    step_sizes: Float[Tensor, "steps B"],
    progress: Callable[[], None],
) -> Float[Tensor, "K B"]:
    """Runs the chains of `anneal` in reverse, from draws of p(z|x) to p(z).

    Returns:
        log w, where E[1 / w] = 1 / p(x).
    """
    point, log_weight = at(z), torch.zeros(z.shape[:2], dtype=torch.float64, device=z.device)
    for step in reversed(range(len(step_sizes))):
        before, b = temperatures[step : step + 2]
        point, _ = transition(at, point, b, step_sizes[step].unsqueeze(-1), leapfrog)
        log_weight += (b - before) * point.log_lik.double()
        progress()
    return log_weight


def transition(
    at: Callable[[Tensor], Point], point: Point, b: float, step_size: Float[Tensor, "B 1"], leapfrog: int
) -> tuple[Point, Float[Tensor, "K B"]]:
    """One Hamiltonian Monte Carlo transition, and its probability of acceptance.

    Each image's step size is multiplied by a random number from 0.5 to 1.5.
    """
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

"""Pareto k-hat, which says whether the mean of importance weights can be trusted.

Beyond a high cutpoint, almost any distribution looks like a generalized Pareto distribution, whose shape k
says how heavy the tail is: weights have a finite mean where k < 1, and a finite variance where k < 1/2. The
larger k is, the more weights it takes until those that matter have been seen, and until then both the mean
and its standard error are too small.

Sources: Pareto Smoothed Importance Sampling, Vehtari, Simpson, Gelman, Yao & Gabry, 2024,
https://arxiv.org/abs/1507.02646, section 3; A New and Efficient Estimation Method for the Generalized Pareto
Distribution, Zhang & Stephens, 2009, https://doi.org/10.1198/tech.2009.08017.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

FEWEST_WEIGHTS = 100  # with fewer, the threshold is below PRIOR_K, and no k-hat speaks for the weights
FEWEST_IN_TAIL = 5
PRIOR_K, PRIOR_COUNT = 0.5, 10  # k-hat is drawn toward 0.5, as if by ten more weights in the tail
PRIOR_B, CANDIDATES = 3, 30  # Zhang & Stephens' grid over the other parameter
LOWEST = math.log(torch.finfo(torch.float64).tiny)  # nats below the largest weight that a double can hold
EQUAL = 1e-3  # nats; log weights that come from float32 agree no better


def tail_length(particles: int) -> int:
    """The number of largest weights that make up the tail: min(K / 5, 3 sqrt(K)), rounded up (appendix H)."""
    return math.ceil(min(particles / 5, 3 * math.sqrt(particles)))


def threshold(particles: int) -> float:
    """The largest k with which the mean of K weights is reliable: min(1 - 1 / log10(K), 0.7) (eq. 13)."""
    return min(1 - 1 / math.log10(particles), 0.7)


def k_hat(largest: Float[Tensor, "some N"]) -> Float[Tensor, " N"]:
    """The shape k of the tails of N sets of importance weights.

    Args:
        largest: The logarithms of the largest weights of each set, in any order: `tail_length` of them, and
            the next one, which is the cutpoint.

    Returns:
        k, in float64. It is -inf where the largest weights are all equal, so that there is no tail, and inf
        where fewer than five weights lie beyond the cutpoint, since many are tied with it.
    """
    log_weight = largest.double().sort(0).values
    log_weight = (log_weight - log_weight[-1]).clamp(min=LOWEST)
    exceedances = log_weight[1:].exp() - log_weight[0].exp()
    count = (exceedances > 0).sum(0)
    k = torch.where(count < FEWEST_IN_TAIL, math.inf, _fit(exceedances, count))
    return torch.where(log_weight[0] > -EQUAL, -math.inf, k)


def _fit(x: Float[Tensor, "M N"], count: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """k of the exceedances x, ascending in each column; only the last `count` of them are above zero.

    With b = -k / sigma, the likelihood is largest at k = mean(log(1 - b x)), a function of b alone. The
    estimate of b is its posterior mean over a grid.
    """
    quartile = x.gather(0, (len(x) - count + (count / 4 + 0.5).long() - 1).unsqueeze(0))[0]
    number = CANDIDATES + math.isqrt(len(x))
    index = torch.arange(1, number + 1, dtype=x.dtype, device=x.device).unsqueeze(-1)
    b = 1 / x[-1] + (1 - (number / (index - 0.5)).sqrt()) / (PRIOR_B * quartile)
    # One candidate after the other, which holds M x N numbers at a time.
    k = torch.stack([(-each * x).log1p().sum(0) / count for each in b])
    log_likelihood = count * ((-b / k).log() - k)  # up to a constant
    b = (log_likelihood.softmax(0) * b).sum(0)
    k = (-b * x).log1p().sum(0) / count
    return (count * k + PRIOR_COUNT * PRIOR_K) / (count + PRIOR_COUNT)

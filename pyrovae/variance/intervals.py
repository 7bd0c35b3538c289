"""Confidence intervals for the noise of a gradient: for a variance, a ratio of two, and signal against noise.

Variances of gradients are means of skewed, heavy-tailed numbers: the squared distances of draws from the mean
gradient. Resampling does not help much there, because the draws that matter most are often missing from the
sample. Three classical corrections together do:

1. The logarithm is estimated, by the jackknife: "Jackknifing Variances", Miller, 1968, Annals of Mathematical
   Statistics 39(2), https://doi.org/10.1214/aoms/1177698418. A draw that holds a large share of the sum moves
   the logarithm without it much further than a linear approximation says.
2. Skewness is removed by the monotone cubic transformation of "On the Removal of Skewness by Transformation",
   Hall, 1992, Journal of the Royal Statistical Society B 54(1), pages 221-228.
3. Quantiles are those of Student's t, with the degrees of freedom that match the relative variance of the
   variance estimate, as in "An Approximate Distribution of Estimates of Variance Components", Satterthwaite,
   1946, Biometrics Bulletin 2(6), https://doi.org/10.2307/3002019.

To use all three at once is our choice. `python -m benchmarks.coverage` measures how often the intervals hold
the truth on gradients whose moments are known.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.special import stdtrit

FEWEST_DEGREES = 3.0  # of freedom, that heavy tails may leave


def log_pseudo_values(samples: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """The jackknife's pseudo-values of the logarithm of a mean of positive samples, around that logarithm."""
    n = len(samples)
    share = np.minimum(samples / samples.sum(), 1 - 1e-4)  # a single sample may hold everything
    return -(n - 1) * np.log((1 - share) * (n / (n - 1)))


def mean_limits(value: float, samples: Float[np.ndarray, " n"], level: float = 0.95) -> tuple[float, float]:
    """A confidence interval for the mean of positive samples.

    Args:
        value: The estimate of that mean, which may be better than the average of the samples.
        samples: How the estimate varies: independent, and with that mean.
        level: The probability that the interval is to hold the truth.
    """
    if not samples.any():
        return value, value
    below, above = _limits([log_pseudo_values(samples)], level)
    return value * math.exp(below), value * math.exp(above)


def ratio_limits(
    value: float,
    above: Float[np.ndarray, " n"],
    below: Float[np.ndarray, " m"],
    level: float = 0.95,
    *,
    paired: bool = False,
) -> tuple[float, float]:
    """A confidence interval for the ratio of the means of two positive samples.

    Args:
        value: The estimate of that ratio.
        above: Samples of the numerator, as for `mean_limits`.
        below: Samples of the denominator.
        level: The probability that the interval is to hold the truth.
        paired: Whether the samples of one number depend on each other, as under common noise.
    """
    if not above.any():
        return value, value
    ours, theirs = log_pseudo_values(above), log_pseudo_values(below)
    low, high = _limits([ours - theirs] if paired else [ours, -theirs], level)
    return value * math.exp(low), value * math.exp(high)


def _limits(parts: Sequence[np.ndarray], level: float) -> tuple[float, float]:
    """What to add to an estimate for an interval, given independent samples whose means' sum it is."""
    variance = third = spread = 0.0
    for values in parts:
        n, centred = len(values), values - values.mean()
        square = (centred**2).mean()
        of_mean = square / (n - 1)
        kurtosis = (centred**4).mean() / square**2 if square > 0 else 1.0
        variance += of_mean
        third += (centred**3).mean() / n**2
        spread += of_mean**2 * (kurtosis - 1) / n
    if not variance > 0:
        return 0.0, 0.0
    degrees = 2 * variance**2 / spread if spread > 0 else math.inf
    t = float(stdtrit(min(max(degrees, FEWEST_DEGREES), 1e6), (1 + level) / 2))
    error, skewness = math.sqrt(variance), third / variance**1.5
    return -error * _unskewed(t, skewness), -error * _unskewed(-t, skewness)


def _unskewed(t: float, skewness: float) -> float:
    """The inverse of Hall's transformation t + a t^2/3 + a^2 t^3/27 + a/6, where a is the mean's skewness."""
    if abs(skewness) < 1e-6:
        return t
    return 3 / skewness * (float(np.cbrt(1 + skewness * (t - skewness / 6))) - 1)


def snr_limits(
    snr: float,
    gram: Float[np.ndarray, "blocks blocks"],
    distances: Float[np.ndarray, " blocks"],
    sizes: Float[np.ndarray, " blocks"],
    level: float = 0.95,
) -> tuple[float, float]:
    """A confidence interval for ||mean|| / sqrt(tr Cov); from 0 on, where it cannot be told from none.

    The interval is that of the logarithm of ||average of the draws|| / sqrt(tr Cov), made as above from the
    jackknife's pseudo-values over blocks of draws. What noise adds to the square of that ratio, 1 / draws, is
    taken off the limits.

    Args:
        snr: The estimate, 0 where noise explains the average.
        gram: Inner products of the sums over blocks of draws.
        distances: Sums over blocks of the draws' squared distances from the mean.
        sizes: The draws in each block.
        level: The probability that the interval is to hold the truth.
    """
    blocks, draws = len(sizes), sizes.sum()
    if blocks < 4 or not distances.sum() > 0:
        return (0.0, math.inf) if distances.sum() > 0 else (snr, snr)
    others = gram.sum(1) - gram.diagonal()
    pairs = sizes * (draws - sizes)  # of draws from this block and from another
    squared_norms = (others.sum() - 2 * others) / (pairs.sum() - 2 * pairs)  # without each block
    traces = (distances.sum() - distances) / (draws - sizes)
    raw = squared_norms / traces + 1 / draws
    logarithms = np.log(np.maximum(raw, 1e-3 / draws)) / 2  # below is chance
    below, above = _limits([-(blocks - 1) * logarithms], level)
    centre = snr**2 + 1 / draws
    limits = (centre * math.exp(2 * by) - 1 / draws for by in (below, above))
    low, high = (math.sqrt(max(limit, 0.0)) for limit in limits)
    return low, high


@dataclass(frozen=True)
class Slope:
    """The slope of the logarithm of a signal-to-noise ratio in that of the particles, by least squares.

    Attributes:
        value: The slope; nan where it is not resolved.
        interval: Its 95 % confidence interval.
        unresolved: The numbers of particles at which the ratio's interval reaches down to 0. One is enough
            for the slope to be unknown: without them, it would be that of what noise has lifted over the floor.
    """

    value: float
    interval: tuple[float, float]
    unresolved: tuple[int, ...] = ()


def slope(particles: Sequence[int], ratios: Sequence[float], intervals: Sequence[tuple[float, float]]) -> Slope:
    """Fits the slope of log SNR in log K.

    The interval is made of those of the ratios, which are not symmetric: "Construction of Confidence Limits
    about Effect Measures: A General Approach", Zou & Donner, 2008, Statistics in Medicine 27(10),
    https://doi.org/10.1002/sim.3095.

    Args:
        particles: K, at least two different ones.
        ratios: SNR at each K.
        intervals: Their 95 % confidence intervals.
    """
    unresolved = tuple(k for k, (low, _) in zip(particles, intervals, strict=True) if not low > 0)
    if unresolved:
        return Slope(math.nan, (math.nan, math.nan), unresolved)
    x, y = np.log(particles), np.log(ratios)
    low, high = np.log(np.array(intervals)).T
    weights = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    downward = np.where(weights > 0, weights * (y - low), weights * (high - y))
    upward = np.where(weights > 0, weights * (high - y), weights * (y - low))
    value = float(weights @ y)
    return Slope(value, (value - float(np.hypot.reduce(downward)), value + float(np.hypot.reduce(upward))))

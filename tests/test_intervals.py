"""Confidence intervals: what they are made of, against definitions, and how often they hold the truth."""

import math

import numpy as np
import pytest
from scipy import stats as distributions

from pyrovae.variance.intervals import (
    _unskewed,
    log_pseudo_values,
    mean_limits,
    ratio_limits,
    slope,
    snr_limits,
)

REPEATS = 400
# Of a binomial count around 95 %, at a false-alarm rate of 1e-5: 0.895 to 0.99. Power: 5 % of coverage.
FEWEST, MOST = distributions.binom.ppf([0.5e-5, 1 - 0.5e-5], REPEATS, 0.95)


def holds(interval: tuple[float, float], truth: float) -> bool:
    return interval[0] <= truth <= interval[1]


def samples(*shape: int, power: int = 1) -> np.ndarray:
    """Of mean 1: powers of a chi-square variate, the heavier in the tail the larger the power."""
    return np.random.default_rng(0).chisquare(1, shape) ** power / (1, 1, 3, 15)[power]


def test_pseudo_values_are_those_of_the_jackknife():
    values = samples(20)
    n, whole = len(values), math.log(values.mean())
    expected = [n * whole - (n - 1) * math.log(np.delete(values, i).mean()) - whole for i in range(n)]
    np.testing.assert_allclose(log_pseudo_values(values), expected, rtol=1e-9, atol=1e-12)


def test_a_single_sample_may_hold_everything():
    low, high = mean_limits(0.1, np.eye(1, 10)[0])
    assert 0 < low < 0.1 < high < math.inf


@pytest.mark.parametrize("skewness", [-0.7, -1e-9, 0.0, 1e-3, 0.4])
def test_the_transformation_is_undone(skewness):
    for t in (-3.0, 0.0, 0.5, 2.0):
        x = _unskewed(t, skewness)
        assert x + skewness * x**2 / 3 + skewness**2 * x**3 / 27 + skewness / 6 == pytest.approx(t, abs=1e-6)


def test_intervals_are_those_of_students_t_where_nothing_is_skewed():
    """Of many samples with two values only, whose variance has no error: the quantile is the normal one."""
    values = np.tile([0.9, 1.1], 500)
    low, high = mean_limits(1.0, values)
    expected = distributions.norm.ppf(0.975) * 0.1 / math.sqrt(999)
    assert (-math.log(low), math.log(high)) == pytest.approx((expected, expected), rel=2e-3)
    narrower = mean_limits(1.0, values, level=0.5)
    assert math.log(narrower[1]) == pytest.approx(expected * 0.6745 / 1.96, rel=2e-3)


def test_degrees_of_freedom_follow_the_kurtosis():
    """One large sample among ten leaves the fewest, 3. Symmetric values have no skewness to remove."""
    few = np.array([0.5, 1.5] + [1.0] * 8)
    values = log_pseudo_values(few)
    error = math.sqrt(values.var() / 9)
    kurtosis = distributions.kurtosis(values, fisher=False)
    degrees = max(20 / (kurtosis - 1), 3)
    assert degrees > 3
    reach = distributions.t.ppf(0.975, degrees) * error
    low, high = mean_limits(1.0, few)
    assert math.log(high / low) == pytest.approx(2 * reach, rel=0.02)


def test_intervals_scale_with_what_they_are_of():
    values = samples(50)
    low, high = mean_limits(1.0, values)
    assert mean_limits(7.0, 7 * values) == pytest.approx((7 * low, 7 * high))


@pytest.mark.parametrize(("power", "draws"), [(1, 32), (3, 256)])
def test_intervals_of_means_hold_the_truth(power, draws):
    held = sum(holds(mean_limits(x.mean(), x), 1.0) for x in samples(REPEATS, draws, power=power))
    assert FEWEST <= held <= MOST


@pytest.mark.parametrize("paired", [True, False])
def test_intervals_of_ratios_hold_the_truth(paired):
    """Pairs that are alike, and samples of unequal size that have nothing in common."""
    above, other = samples(2, REPEATS, 128)
    below = 0.5 * (0.9 * above + 0.1 * other) if paired else 0.5 * other[:, :96]
    found = [ratio_limits(a.mean() / b.mean(), a, b, paired=paired) for a, b in zip(above, below, strict=True)]
    assert FEWEST <= sum(holds(interval, 2.0) for interval in found) <= MOST
    widths = np.log([high / low for low, high in found])
    assert (widths.mean() < 0.1) == paired


def test_a_ratio_to_itself_is_known():
    values = samples(20)
    assert ratio_limits(1.0, values, values, paired=True) == (1, 1)


def ratios(truth: float, entries: int, draws: int = 256, blocks: int = 32):
    """Intervals of signal-to-noise ratios, of normal gradients with spreads from 1 to 1 / entries."""
    generator = np.random.default_rng(0)
    scales = 1 / np.arange(1, entries + 1)
    mean = truth * math.sqrt((scales**2).sum() / entries)
    for _ in range(REPEATS):
        drawn = mean + scales * generator.standard_normal((draws, entries))
        sums = drawn.reshape(blocks, -1, entries).sum(1)
        distances = ((drawn - drawn.mean(0)) ** 2).sum(1)
        trace = distances.sum() / (draws - 1)
        snr = math.sqrt(max((drawn.mean(0) ** 2).sum() / trace - 1 / draws, 0))
        sizes = np.full(blocks, draws / blocks)
        yield snr_limits(snr, sums @ sums.T, distances.reshape(blocks, -1).sum(1), sizes)


@pytest.mark.parametrize(("truth", "entries"), [(1.0, 2), (0.15, 10), (0.05, 50)])
def test_intervals_of_signal_to_noise_hold_the_truth(truth, entries):
    """Far above the floor of 1 / 16, at twice the floor, and below it, where most of them reach down to 0."""
    found = list(ratios(truth, entries))
    assert FEWEST <= sum(holds(interval, truth) for interval in found) <= MOST
    from_zero = sum(low == 0 for low, _ in found)
    assert from_zero > 0.9 * REPEATS if truth < 1 / 16 else from_zero == 0


def test_signal_to_noise_of_too_few_blocks_or_without_noise():
    assert snr_limits(0.5, np.ones((2, 2)), np.ones(2), np.full(2, 2.0)) == (0, math.inf)
    assert snr_limits(math.inf, np.ones((8, 8)), np.zeros(8), np.full(8, 2.0)) == (math.inf, math.inf)


def test_a_slope_is_that_of_a_line_with_the_errors_of_its_points():
    """Symmetric errors add up as those of a weighted sum do."""
    k, error = np.array([1, 4, 16, 64]), np.array([0.01, 0.02, 0.05, 0.1])
    snr = 0.7 * k**-0.5
    low, high = (snr * np.exp(-error)).tolist(), (snr * np.exp(error)).tolist()
    found = slope(k.tolist(), snr.tolist(), list(zip(low, high, strict=True)))
    assert found.value == pytest.approx(-0.5)
    x = np.log(k) - np.log(k).mean()
    reach = math.sqrt((x**2 @ error**2) / (x**2).sum() ** 2)
    assert found.interval == pytest.approx((-0.5 - reach, -0.5 + reach))
    assert found.unresolved == ()


def test_a_slope_falls_as_far_as_its_last_ratio_may():
    """The interval of a small ratio reaches far down: so does the slope's, where K is above the average."""
    falling = slope([1, 4], [1.0, 0.5], [(1.0, 1.0), (0.05, 0.6)])
    assert falling.interval == pytest.approx((math.log(0.05) / math.log(4), math.log(0.6) / math.log(4)))
    rising = slope([4, 1], [1.0, 0.5], [(1.0, 1.0), (0.05, 0.6)])
    assert rising.interval == pytest.approx((-math.log(0.6) / math.log(4), -math.log(0.05) / math.log(4)))


def test_a_slope_over_a_ratio_within_the_noise_is_not_resolved():
    found = slope([1, 4, 16], [0.5, 0.2, 0.1], [(0.4, 0.6), (0.1, 0.3), (0.0, 0.15)])
    assert found.unresolved == (16,)
    assert math.isnan(found.value)
    assert all(map(math.isnan, found.interval))

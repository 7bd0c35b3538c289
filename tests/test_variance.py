"""Moments, intervals and tests for bias against what is known exactly, at stated false-alarm rates."""

import dataclasses
import functools
import math
from statistics import NormalDist

import jaxtyping
import numpy as np
import pytest
import torch
from scipy import stats as distributions

from pyrovae.estimators import (
    AnalyticKL,
    Antithetic,
    Dreg,
    Elbo,
    Iwae,
    MeasureValued,
    Renyi,
    Rloo,
    Rws,
    StickingTheLanding,
    StlIwae,
    Vimco,
)
from pyrovae.variance.stats import GradientStats
from tests.linear_gaussian import MILD, OFF, TABLED, by_parameter, measured, random_case, runs, stats_of
from tests.test_per_draw import assert_same, independent

F64 = torch.float64
PHI = {"encoder.bias": slice(None)}
# In standard errors, two-sided: a false alarm in 1e-5 of comparisons, of which there are some 300 here.
LIMIT = -NormalDist().inv_cdf(1e-5 / 2)


@pytest.fixture(autouse=True, scope="module")
def _without_checks_of_shapes():
    """Shapes are checked in test_per_draw and test_cli; it takes half of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        yield


def test_the_trace_alone_is_that_of_every_entry():
    every, alone = (measured(OFF, Elbo(), draws=64, elementwise=elementwise) for elementwise in (True, False))
    assert not alone.variance
    assert every.traces["loc"] > 0
    assert alone.traces == pytest.approx(every.traces, rel=1e-9)


def test_statistics_of_given_draws_are_those_of_the_measurement():
    pair, x = OFF.pair(), torch.ones(1, 1, dtype=F64)
    (bias,) = (p for name, p in pair.named_parameters() if name == "encoder.bias")
    gradients = independent(pair.model, pair.guide, Elbo(), (x,), {"p": bias}, draws=70)
    whole = measured(OFF, Elbo(), draws=70, parts={"encoder": {"encoder.bias": slice(None)}})
    ours = stats_of(torch.from_numpy(gradients["p"]))
    theirs = dataclasses.replace(
        whole,
        **{
            field: {"p": getattr(whole, field)["encoder.bias"]}
            for field in ("mean", "variance", "tr_cov_of", "block_sums")
        },
        parts=ours.parts,
    )
    assert_same(ours, theirs)


# Moments


ESTIMATORS = {
    "elbo": Elbo(),
    "elbo, score": Elbo(use_rep=False),
    "elbo, K = 3": Elbo(num_particles=3),
    "analytic-kl": AnalyticKL(),
    "analytic-kl, score": AnalyticKL(use_rep=False),
    "stl": StickingTheLanding(),
    "antithetic": Antithetic(),
    "measure-valued": MeasureValued(),
    "rloo": Rloo(num_particles=3),
    "iwae": Iwae(num_particles=2),
    "iwae, score": Iwae(num_particles=2, use_rep=False),
    "renyi": Renyi(num_particles=2, alpha=0.3),
    "vimco": Vimco(),
    "dreg": Dreg(num_particles=2),
    "stl-iwae": StlIwae(num_particles=2),
    "rws": Rws(),
    "rws, pathwise": Rws(use_rep=True),
}


@functools.cache
def of_off(name: str) -> GradientStats:
    return measured(OFF, ESTIMATORS[name])


@pytest.mark.parametrize("name", ESTIMATORS)
def test_means_and_traces_are_those_of_theory(name):
    """Power: 2,048 draws see 10 % of a standard deviation in a mean; 15 % of a trace by the pathwise gradient.

    Of the heavier-tailed traces by the score function they see 30 to 60 %.
    """
    estimator = ESTIMATORS[name]
    other = MILD["mild-1"] if estimator.importance_weighted else random_case(3)
    for case, stats in ((OFF, of_off(name)), (other, measured(other, estimator, draws=256))):
        truth = case.truth(estimator)
        means, variances = by_parameter(truth.mean), by_parameter(truth.variance)
        for parameter, mean in stats.mean.items():
            error = (variances[parameter] / stats.draws).sqrt()
            assert ((mean - means[parameter]).abs() <= LIMIT * error + 1e-12).all(), parameter
        for group, rows in stats.parts.items():
            expected = sum(variances[parameter][r].sum().item() for parameter, r in rows.items())
            distances = stats.distances[group]
            limit = LIMIT * distances.std(ddof=1) / math.sqrt(len(distances)) + 1e-12
            assert abs(stats.tr_cov(group) - expected) <= limit, group
            assert abs(distances.mean() - expected) <= limit, group


@pytest.mark.parametrize("case", [TABLED["sharp"], TABLED["posterior"]])
def test_variance_that_vanishes_is_found_to_vanish(case):
    """An antithetic pair has none in mu, whatever q; sticking the landing none in phi where q is exact."""
    assert measured(case, Antithetic(), draws=64).tr_cov("loc") < 1e-20
    if case is TABLED["posterior"]:
        for estimator in (StickingTheLanding(), Dreg(num_particles=2), Rloo()):
            stats = measured(case, estimator, draws=64)
            assert stats.tr_cov("encoder") < 1e-20
            assert stats.interval("encoder")[1] < 1e-20
            assert stats.tr_cov("decoder") > 0.1


def test_entries_errors_and_the_largest():
    stats = measured(OFF, Elbo(), draws=64)
    assert stats.num_parameters == 4
    assert stats.largest_variance() == max(v.max().item() for v in stats.variance.values())
    for name, error in stats.standard_error.items():
        torch.testing.assert_close(error, (stats.variance[name] / 64).sqrt())
    assert stats.tr_cov() == pytest.approx(sum(v.sum().item() for v in stats.variance.values()))
    assert stats.noise_floor == 1 / 8


# Groups


def test_groups_add_up():
    stats = measured(OFF, Elbo(), draws=64)
    assert stats.members() == ["loc", "scale", "decoder"]
    assert stats.members("encoder") == ["loc", "scale"]
    for of in (stats.tr_cov, stats.squared_norm):
        assert of() == pytest.approx(of("loc") + of("scale") + of("decoder"))
        assert of("encoder") == pytest.approx(of("loc") + of("scale"))
    assert stats.tr_cov_of["encoder.bias"] == pytest.approx(stats.tr_cov("encoder"))
    assert stats.tr_cov("scale") == pytest.approx(stats.variance["encoder.bias"][1].item())


def test_groups_without_parts_are_the_guides_and_the_models():
    stats = measured(OFF, Elbo(), draws=64, parts=None)
    assert stats.members("encoder") == ["encoder"]
    assert set(stats.parts["encoder"]) == {"encoder.bias"}
    assert set(stats.parts["decoder"]) == {"decoder.weight", "decoder.bias"}
    assert stats.tr_cov("encoder") == pytest.approx(measured(OFF, Elbo(), draws=64).tr_cov("encoder"))


@pytest.mark.parametrize(
    "method", ["tr_cov", "interval", "squared_norm", "snr", "snr_interval", "effective_draws", "members"]
)
def test_an_unknown_group_is_refused(method):
    stats = measured(OFF, Elbo(), draws=4)
    with pytest.raises(ValueError, match="expected a group in all, encoder, loc, scale, decoder, got 'trunk'"):
        getattr(stats, method)("trunk")


# Intervals


COVERED = {"pathwise": (Elbo(), 64), "score function": (Elbo(use_rep=False), 256)}


@pytest.mark.parametrize("name", COVERED)
def test_intervals_cover_the_truth(name):
    """300 measurements. Limits are binomial around 0.95, at a false-alarm rate of 1e-5: 0.88 to 0.997.

    Power: 7 % of coverage. `python -m benchmarks.coverage` finds 0.95 in both.
    """
    estimator, draws = COVERED[name]
    truth = sum(OFF.truth(estimator).variance.values())
    intervals = [stats.interval() for stats in runs(estimator, draws, 300)]
    low, high = distributions.binom.ppf([0.5e-5, 1 - 0.5e-5], 300, 0.95)
    assert low <= sum(low <= truth <= high for low, high in intervals) <= high


def test_an_interval_is_around_the_estimate_and_narrows():
    few, many = measured(OFF, Elbo(), draws=64), of_off("elbo")
    for stats in (few, many):
        low, high = stats.interval()
        assert low < stats.tr_cov() < high
        inner = stats.interval(level=0.5)
        assert low < inner[0] < inner[1] < high
    widths = [np.diff(np.log(stats.interval()))[0] for stats in (few, many)]
    assert widths[1] < widths[0] / 4


def test_effective_draws_are_those_that_hold_the_noise():
    few = torch.zeros(64, 2, dtype=F64)
    few[10::16, 0] = 100.0
    assert stats_of(few).effective_draws() == pytest.approx(4, rel=0.1)
    equal = torch.tensor([1.0, -1.0], dtype=F64).repeat(512)[:, None]
    assert stats_of(equal).effective_draws() == pytest.approx(1024, rel=0.1)
    assert stats_of(torch.ones(8, 2)).effective_draws() == math.inf


# Ratios


def test_common_noise_makes_a_ratio_precise():
    """STL beside the total derivative: both intervals hold the ratio, one is at most half as wide."""
    truth = [sum(OFF.truth(e).variance.values()) for e in (StickingTheLanding(), Elbo())]
    stl = measured(OFF, StickingTheLanding(), draws=256)
    widths = []
    for seed in (0, 1):
        ratio, low, high = stl.ratio(measured(OFF, Elbo(), draws=256, seed=seed))
        assert low < truth[0] / truth[1] < high
        assert low < ratio < high
        widths.append(high - low)
    assert widths[0] < widths[1] / 2


def test_a_ratio_to_itself_is_one_exactly():
    stats = measured(OFF, Elbo(), draws=64)
    assert stats.ratio(stats) == (1, 1, 1)
    assert stats.ratio(stats, "decoder") == (1, 1, 1)


def test_noise_of_rounding_has_no_interval():
    """At a part of 1e-15 of the mean, in double precision; at 1e-12 it may be noise."""
    for part, exact in ((1e-15, True), (1e-12, False)):
        alternating = 1 + part * torch.tensor([1.0, -1.0], dtype=F64).repeat(32)[:, None]
        stats, plain = stats_of(alternating), measured(OFF, Elbo(), draws=64, parts={"encoder": PHI})
        assert (stats.interval() == (stats.tr_cov(),) * 2) is exact
        assert (stats.ratio(plain)[1] == stats.ratio(plain)[2]) is exact
        assert math.isnan(plain.ratio(stats)[0]) is exact
        assert (stats.snr_interval() == (stats.snr(),) * 2) is exact


def test_a_ratio_to_nothing_is_no_number():
    stats = measured(OFF, Elbo(), draws=64)
    assert all(map(math.isnan, stats.ratio(stats_of(torch.ones(64, 2)), "all")))
    nothing = stats_of(torch.ones(64, 2)).ratio(stats)
    assert nothing == (0, 0, 0)


# Signal and noise


def test_squared_norm_is_unbiased():
    """Averaged over 1,000 runs of 16 draws. The squared norm of the mean itself is 60 standard errors off."""
    found = runs(Elbo(), 16, 1000)
    truth = sum(value**2 for value in OFF.truth(Elbo()).mean.values())
    ours = np.array([stats.squared_norm() for stats in found])
    raw = np.array([stats.mean["p"].square().sum().item() for stats in found])
    error = ours.std(ddof=1) / math.sqrt(len(ours))
    assert abs(ours.mean() - truth) <= LIMIT * error
    assert raw.mean() - truth > 10 * error
    assert ours.min() < 0


def test_signal_to_noise_is_that_of_theory():
    """65,536 draws: its standard error is less than the floor, 1 / 256."""
    (stats,) = runs(Elbo(), 2**16, 1)
    truth = OFF.truth(Elbo())
    expected = math.sqrt(sum(v**2 for v in truth.mean.values()) / sum(truth.variance.values()))
    assert abs(stats.snr() - expected) < LIMIT * stats.noise_floor


@pytest.mark.parametrize("draws", [256, 250])
def test_intervals_of_signal_to_noise_hold_the_truth(draws):
    """200 measurements, the last block a shorter one. Limits at a false-alarm rate of 1e-5: 0.87 to 1."""
    truth = OFF.truth(Elbo())
    expected = math.sqrt(sum(v**2 for v in truth.mean.values()) / sum(truth.variance.values()))
    intervals = [stats.snr_interval() for stats in runs(Elbo(), draws, 200)]
    held = sum(low <= expected <= high for low, high in intervals)
    assert held >= distributions.binom.ppf(1e-5, 200, 0.95)
    assert np.mean([high - low for low, high in intervals]) < 0.15
    wider = [stats.snr_interval(level=0.99) for stats in runs(Elbo(), draws, 2)]
    assert all(a < c < d < b for (a, b), (c, d) in zip(wider, intervals, strict=False))


def test_signal_to_noise_of_a_group_is_that_of_its_parameters():
    stats = measured(OFF, Elbo(), draws=256)
    for group in ("loc", "encoder", "all"):
        low, high = stats.snr_interval(group)
        assert low < stats.snr(group) < high
    assert stats.snr_interval("encoder") != stats.snr_interval("loc")


def test_signal_to_noise_without_noise_or_signal():
    assert stats_of(torch.ones(8, 2)).snr() == math.inf
    assert stats_of(torch.ones(8, 2)).snr_interval() == (math.inf, math.inf)
    alternating = torch.tensor([1.0, -1.0]).repeat(8)[:, None]
    assert stats_of(alternating).snr() == 0
    assert stats_of(alternating).squared_norm() < 0

"""Pareto k-hat, errors and intervals of importance weights, against closed forms and independent fits."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import genpareto
from torch import Tensor

from pyrovae.evaluation import pareto
from pyrovae.evaluation.weights import Evidence, Tally

F64 = torch.float64


def tally_of(log_weight: Tensor, chunk: int | None = None) -> Evidence:
    """The evidence of weights (K, N) that come a few at a time."""
    tally = Tally(torch.zeros(log_weight.shape[1], 1), len(log_weight))
    for part in log_weight.split(chunk or len(log_weight)):
        tally.add(slice(None), part, 2 * part + 1)
    return tally.result()


def k_hat_of(log_weight: Tensor) -> Tensor:
    return pareto.k_hat(log_weight.topk(pareto.tail_length(len(log_weight)) + 1, dim=0).values)


# Pareto k-hat


@pytest.mark.parametrize(
    ("particles", "length"), [(100, 20), (120, 24), (225, 45), (226, 46), (1000, 95), (5000, 213)]
)
def test_the_length_of_the_tail(particles, length):
    """A fifth of the weights up to 225, where 3 sqrt(K) becomes less."""
    assert pareto.tail_length(particles) == length


def test_the_threshold_grows_with_the_particles_up_to_seven_tenths():
    found = [pareto.threshold(particles) for particles in (10, 100, 1000, 10**6)]
    assert found == pytest.approx([0, 0.5, 2 / 3, 0.7])


INDEX = np.arange(1, 1001)
EVEN = (INDEX * 0.6180339887) % 1
LOG_WEIGHTS = {
    "heavy": -1.2 * np.log(EVEN),
    "light": np.sin(INDEX) + 0.3 * np.sin(1.7 * INDEX),
    "normal-ish": 2 * np.sin(INDEX) * np.sin(2.3 * INDEX) + np.cos(0.7 * INDEX),
    "half": -0.75 * np.log(EVEN),
    "tied": -np.round(EVEN * 40) / 4,
}


@pytest.mark.parametrize(
    ("name", "particles", "expected"),
    [
        ("heavy", 100, 0.917282430286929),
        ("heavy", 1000, 1.0623876939088508),
        ("light", 100, -0.4202465415616791),
        ("light", 1000, -0.7698169404832477),
        ("normal-ish", 100, 0.16785615264197734),
        ("normal-ish", 1000, -0.6455602498199021),
        ("half", 100, 0.6592919928031266),
        ("half", 1000, 0.6790429945808669),
        ("tied", 1000, -0.8783778946912553),
    ],
)
def test_k_hat_is_that_of_arviz(name, particles, expected):
    """The second result of `arviz.psislw(log_weights)`, arviz 0.21.0."""
    log_weight = torch.tensor(LOG_WEIGHTS[name][:particles]).unsqueeze(1)
    for shift in (0.0, -1000.0):  # weights count up to a factor
        assert k_hat_of(log_weight + shift).item() == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("k", [-0.5, 0.2, 0.7, 1.5])
def test_k_hat_is_near_another_fit_of_the_same_tail(k):
    """Scipy maximises the likelihood. The standard error of either is about (1 + k) / sqrt(5000), or 0.04."""
    tail = genpareto.rvs(k, size=5000, random_state=0)
    log_weight = torch.tensor(np.log1p(np.concatenate([[0.0], tail]))).unsqueeze(1)
    found, (other, _, _) = pareto.k_hat(log_weight).item(), genpareto.fit(tail, floc=0)
    assert found == pytest.approx(other, abs=0.02)
    assert found == pytest.approx(k, abs=0.1)


def test_each_image_has_its_own_k_hat():
    log_weight = torch.tensor(np.stack([LOG_WEIGHTS[name] for name in ("heavy", "tied", "light")], 1))
    each = [k_hat_of(log_weight[:, i : i + 1]).item() for i in range(3)]
    assert k_hat_of(log_weight).tolist() == pytest.approx(each)


def test_weights_without_a_tail():
    """Equal ones have none; a rare one that outweighs many equal ones is a tail that cannot be fitted."""
    equal = torch.zeros(1000, 1, dtype=F64)
    rare = equal.clone()
    rare[:4] = 3.0
    assert k_hat_of(equal).item() == -math.inf
    line = torch.linspace(0, 999 / 95, 1000, dtype=F64).unsqueeze(1)  # the tail is one nat wide
    assert k_hat_of(0.9e-3 * line).item() == -math.inf
    assert k_hat_of(1.1e-3 * line).isfinite()
    assert k_hat_of(torch.where(torch.arange(1000) < 95, 0.0, -1.0).double().unsqueeze(1)).isfinite()
    assert k_hat_of(rare).item() == math.inf
    assert k_hat_of(torch.eye(1000, 1, dtype=F64)).item() == math.inf  # one that is larger than all others
    rare[4] = 3.0
    assert k_hat_of(rare).isfinite()


def test_weights_too_far_apart_for_a_double():
    k = k_hat_of(-20.0 * torch.arange(1000, dtype=F64).unsqueeze(1))
    assert 10 < k.item() < math.inf


# The tally


@pytest.mark.parametrize("chunk", [13, 64, 1000])
def test_a_tally_in_chunks_is_that_of_all_weights(chunk):
    torch.manual_seed(0)
    log_weight = 30 + 2 * torch.randn(1000, 3, dtype=F64)
    found, w = tally_of(log_weight, chunk), log_weight.exp()
    torch.testing.assert_close(found.log_evidence, w.mean(0).log())
    torch.testing.assert_close(found.effective_sample_size, w.sum(0) ** 2 / w.square().sum(0))
    torch.testing.assert_close(found.bound, log_weight.mean(0))
    torch.testing.assert_close(found.variance, log_weight.var(0))
    torch.testing.assert_close(found.error, w.std(0) / w.mean(0) / math.sqrt(1000))
    torch.testing.assert_close(found.log_lik, 2 * log_weight.mean(0) + 1)
    torch.testing.assert_close(found.pareto_k, k_hat_of(log_weight))


def test_a_tally_keeps_the_tail_only():
    tally = Tally(torch.zeros(10_000, 1), 5000)
    assert tally.largest.shape == (214, 10_000)


def test_weights_of_no_size_make_no_evidence():
    found = tally_of(torch.full((100, 2), -math.inf, dtype=F64))
    assert (found.log_evidence == -math.inf).all()
    assert not found.reliable.any()


# Errors, intervals and verdicts


def test_one_particle_has_no_error():
    found = tally_of(torch.tensor([[-3.0, 5.0]], dtype=F64))
    assert found.error.isnan().all()
    assert found.variance.isnan().all()
    assert found.pareto_k.isnan().all()
    assert not found.reliable.any()
    lower, upper = found.interval
    assert lower.tolist() == pytest.approx([-3 - math.log(40), 5 - math.log(40)])
    assert (upper == math.inf).all()


def test_fewer_than_a_hundred_particles_have_no_k_hat():
    few, enough = (tally_of(torch.zeros(particles, 1, dtype=F64)) for particles in (99, 100))
    assert few.pareto_k.isnan()
    assert enough.pareto_k == -math.inf
    assert few.reliable
    assert enough.reliable


def evidence(particles: int, effective: float, k: float = math.nan, variance: float = 0.0) -> Evidence:
    numbers = (torch.tensor([value], dtype=F64) for value in (0.0, effective, -0.1, variance, 0.0, k))
    return Evidence(*numbers, particles)


@pytest.mark.parametrize(
    ("found", "reliable"),
    [
        (evidence(4, 1.1), False),
        (evidence(4, 2.1), True),
        (evidence(16, 7.9), False),
        (evidence(16, 8.1), True),
        (evidence(99, 50.0), True),
        (evidence(100, 50.0, k=0.6), False),
        (evidence(1000, 9.9, k=0.1), False),
        (evidence(1000, 10.0, k=0.1), True),
        (evidence(1000, 500.0, k=0.68), False),
        (evidence(1000, 500.0, k=0.66), True),
        (evidence(10**5, 500.0, k=0.71), False),
        (evidence(10**5, 500.0, k=0.7), True),
    ],
)
def test_which_weights_are_reliable(found, reliable):
    assert found.reliable.item() == reliable


def test_the_interval_of_even_weights_is_that_of_student():
    """2.776 is the 97.5 % quantile of four degrees of freedom; sqrt((5/4 - 1) / 4) = 1/4."""
    lower, upper = evidence(5, 4.0).interval
    assert upper.item() == pytest.approx(2.776445 / 4)
    assert lower.item() == pytest.approx(-2.776445 / 4)


def test_the_interval_of_uneven_weights_is_that_of_markov_and_of_log_normals():
    """The quantiles of two degrees of freedom: 4.302653 of Student, and -2 log 0.975 of chi^2."""
    lower, upper = evidence(3, 1.0, variance=4.0).interval
    assert lower.item() == pytest.approx(-math.log(40))
    skew = 2 / (-2 * math.log(0.975)) - 1
    assert upper.item() == pytest.approx(-0.1 + 2 + math.sqrt(4.302653**2 * 4 / 3 + (2 * skew) ** 2))


@pytest.mark.parametrize(("particles", "quantile"), [(100, 1.984217), (1000, 1.962341)])
def test_the_interval_of_many_weights_takes_none_for_log_normal(particles, quantile):
    lower, upper = evidence(particles, particles / 2, variance=100.0, k=0.1).interval
    reach = quantile / math.sqrt(particles - 1)
    assert (lower.item(), upper.item()) == pytest.approx((-reach, reach))


@pytest.mark.parametrize("particles", [2, 4, 16, 64])
@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0])
def test_the_interval_of_log_normal_weights_misses_in_one_case_of_twenty(particles, spread):
    """In at most one, and above in one of forty, up to 4.9 standard errors of the fraction over 4,000 cases.

    Intervals of 1.96 standard errors miss even weights of two particles in 30 % of cases, uneven ones in 78 %.
    """
    torch.manual_seed(0)
    found = tally_of(spread * torch.randn(particles, 4000, dtype=F64) - spread**2 / 2)
    lower, upper = found.interval
    below, above = (upper < 0).double().mean().item(), (lower > 0).double().mean().item()
    for missed, meant in ((below, 0.025), (below + above, 0.05)):
        assert missed < meant + 4.9 * math.sqrt(meant * (1 - meant) / 4000)
    assert below > 0.025 - 4.9 * math.sqrt(0.025 * 0.975 / 4000)

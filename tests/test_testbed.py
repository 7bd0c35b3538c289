"""The exact test-bed against closed forms, other quadrature, and a simulation that shares no code with it."""

import dataclasses
import math
from statistics import NormalDist

import numpy as np
import pyro
import pytest
import torch

from pyrovae.estimators import (
    ESTIMATORS,
    AnalyticKL,
    Antithetic,
    DisArm,
    Dreg,
    Elbo,
    Enumerate,
    Iwae,
    MeasureValued,
    Renyi,
    Rloo,
    RunningMean,
    Rws,
    StickingTheLanding,
    StlIwae,
    Vimco,
)
from pyrovae.variance.testbed import LinearGaussian, Truth
from tests.linear_gaussian import CASES, MILD, NAMES, TABLED, Copies, given_noise, grid, random_case

# In standard errors. With 40 such comparisons here, two-sided, a false alarm in 2e-6 of runs.
LIMIT = -NormalDist().inv_cdf(2e-6 / 80)
PHI = ("mu", "rho")

over_cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def with_baseline(value: float) -> RunningMean:
    estimator = RunningMean()
    estimator.mean = torch.tensor(value, dtype=torch.float64)
    return estimator


def score_variance(case: LinearGaussian, a: float, b: float, c: float) -> tuple[float, float]:
    """Of (A + B eps + C eps^2) times the score, which is eps / s in mu and eps^2 - 1 in rho."""
    in_mu = (a**2 + 2 * b**2 + 15 * c**2 + 6 * a * c) / case.s**2
    return in_mu, 2 * a**2 + 10 * b**2 + 20 * a * c + 74 * c**2


def rloo_variance(case: LinearGaussian, k: int, b: float, c: float) -> tuple[float, float]:
    def h(m22, m11, m20, m02):
        return m22 / k - (k - 2) * m11**2 / (k * (k - 1)) + m20 * m02 / (k * (k - 1))

    spread = b**2 + 2 * c**2
    return (
        h((3 * b**2 + 10 * c**2) / case.s**2, b / case.s, spread, 1 / case.s**2),
        h(10 * b**2 + 60 * c**2, 2 * c, spread, 2),
    )


def closed_forms(case: LinearGaussian) -> dict:
    """(estimator, variance by mu and rho), written out in d, r2, e and in A, B, C."""
    x, w, b, t2, mu, s = dataclasses.astuple(case)
    S2 = 1 / (1 + w**2 / t2)
    m = S2 * w * (x - b) / t2
    L = -0.5 * math.log(2 * math.pi * (w**2 + t2)) - (x - b) ** 2 / (2 * (w**2 + t2))
    d, r2, e = mu - m, s**2 / S2, x - b - w * mu
    A, B, C = L + math.log(r2) / 2 - d**2 / (2 * S2), -s * d / S2, (1 - r2) / 2
    path = s**2 * d**2 / S2**2
    return {
        "total": (Elbo(), (s**2 / S2**2, path + 2 * r2**2)),
        "stl": (StickingTheLanding(), ((1 - r2) ** 2 / s**2, path + 2 * (1 - r2) ** 2)),
        "analytic-kl": (
            AnalyticKL(),
            (w**4 * s**2 / t2**2, s**2 * w**2 * e**2 / t2**2 + 2 * w**4 * s**4 / t2**2),
        ),
        "analytic-kl, score": (AnalyticKL(use_rep=False), score_variance(case, *case.log_lik)),
        "score": (Elbo(use_rep=False), score_variance(case, A, B, C)),
        "baseline": (with_baseline(1.7), score_variance(case, A - 1.7, B, C)),
        "baseline = ELBO": (
            with_baseline(A + C),
            ((2 * B**2 + 10 * C**2) / s**2, 10 * B**2 + 56 * C**2),
        ),
        "antithetic": (Antithetic(), (0, 2 * r2**2)),
        "antithetic, stl": (StickingTheLanding(antithetic=True), (0, 2 * (1 - r2) ** 2)),
    } | {f"rloo({k})": (Rloo(num_particles=k), rloo_variance(case, k, B, C)) for k in (2, 3, 4, 5, 9)}


@over_cases
def test_truth_is_every_closed_form(case):
    S2 = case.posterior[1]
    gradient = -(case.mu - case.posterior[0]) / S2, 1 - case.s**2 / S2
    for name, (estimator, variance) in closed_forms(case).items():
        truth = case.truth(estimator)
        assert [truth.mean[p] for p in PHI] == pytest.approx(gradient, rel=1e-8, abs=1e-8), name
        assert [truth.variance[p] for p in PHI] == pytest.approx(variance, rel=1e-8, abs=1e-8), name


@over_cases
def test_particles_are_averaged(case):
    for name, (estimator, variance) in closed_forms(case).items():
        if not estimator.independent:
            more = type(estimator)(num_particles=4, use_rep=estimator.use_rep, antithetic=estimator.antithetic)
            if isinstance(more, RunningMean):
                more.mean = estimator.mean
            expected = [v / (2 if more.antithetic else 4) for v in variance]
            assert [case.truth(more).variance[p] for p in PHI] == pytest.approx(expected), name


@over_cases
def test_theta_has_the_moments_of_its_polynomial(case):
    """d/dw = e(z) z / t2 and d/db = e(z) / t2, with e(z) = x - b - w z."""
    x, w, b, t2, mu, s = dataclasses.astuple(case)
    e = x - b - w * mu
    mean = (e * mu - w * s**2) / t2, e / t2
    variance = s**2 * ((e - w * mu) ** 2 + 2 * w**2 * s**2) / t2**2, w**2 * s**2 / t2**2
    for estimator in (Elbo(), Elbo(use_rep=False), MeasureValued(), with_baseline(1.0)):
        truth = case.truth(estimator)
        assert (truth.mean["w"], truth.mean["b"]) == pytest.approx(mean, rel=1e-8, abs=1e-8)
        assert (truth.variance["w"], truth.variance["b"]) == pytest.approx(variance, rel=1e-8, abs=1e-8)
    for k in (2, 5):
        truth = case.truth(Rloo(num_particles=k))
        assert (truth.variance["w"], truth.variance["b"]) == pytest.approx([v / k for v in variance], abs=1e-8)


@pytest.mark.parametrize(
    ("case", "gradient"),
    [("off", (0.4, -0.33333)), ("sharp", (-1.3, 0.64)), ("posterior", (0, 0))],
)
def test_true_gradients_are_those_of_the_table(case, gradient):
    assert [TABLED[case].gradient[p] for p in PHI] == pytest.approx(gradient, rel=2e-5, abs=1e-12)


@pytest.mark.parametrize(
    ("case", "name", "variance"),
    [
        ("off", "total", (2.66667, 3.66222)),
        ("off", "stl", (0.166667, 0.328889)),
        ("off", "analytic-kl", (0.666667, 1.21556)),
        ("off", "score", (6.05173, 11.8134)),
        ("off", "baseline = ELBO", (0.736667, 2.62222)),
        ("off", "rloo(2)", (0.57, 1.52889)),
        ("sharp", "total", (3.24, 0.3268)),
        ("sharp", "stl", (10.24, 0.8868)),
        ("sharp", "analytic-kl", (2.56, 0.2192)),
        ("sharp", "score", (74.1906, 4.57623)),
        ("sharp", "baseline = ELBO", (28.98, 6.4104)),
        ("sharp", "rloo(2)", (18.74, 3.6824)),
        ("posterior", "total", (2, 2)),
        ("posterior", "stl", (0, 0)),
        ("posterior", "analytic-kl", (0.5, 0.625)),
        ("posterior", "score", (4.59355, 4.59355)),
        ("posterior", "baseline = ELBO", (0, 0)),
        ("posterior", "rloo(2)", (0, 0)),
    ],
)
def test_variances_are_those_of_the_table(case, name, variance):
    truth = TABLED[case].truth(closed_forms(TABLED[case])[name][0])
    assert [truth.variance[p] for p in PHI] == pytest.approx(variance, rel=5e-6, abs=1e-12)


def test_sticking_the_landing_has_less_variance_exactly_where_r2_is_above_one_half():
    for case in CASES.values():
        stl, total = (case.truth(e).variance["mu"] for e in (StickingTheLanding(), Elbo()))
        assert (stl < total) == (case.s**2 / case.posterior[1] > 0.5)


# Importance weights


@pytest.mark.parametrize(
    ("estimator", "mean", "variance"),
    [
        (Iwae(num_particles=2), (0.160362, -0.099948), (1.125581, 1.123116)),
        (Dreg(num_particles=2), (0.160362, -0.099948), (0.020848, 0.020022)),
        (StlIwae(num_particles=2), (0.340091, -0.239041), None),
        (Vimco(num_particles=2), (0.160362, -0.099948), (0.960600, 1.366074)),
    ],
)
def test_importance_weighted_moments_are_those_of_the_table(estimator, mean, variance):
    truth = TABLED["off"].truth(estimator)
    assert [truth.mean[p] for p in PHI] == pytest.approx(mean, abs=5e-7)
    if variance:
        assert [truth.variance[p] for p in PHI] == pytest.approx(variance, abs=5e-7)


def importance_weighted_bound(case: LinearGaussian, particles: int, alpha: float = 0.0) -> float:
    """By the trapezoidal rule, whose error is exponentially small on what is smooth and vanishes far out."""
    eps, density = trapezoid()
    a, b, c = case.log_weight
    f = a + b * eps + c * eps**2
    if particles == 1:
        return float(density @ f)
    bounds = (np.logaddexp(*np.meshgrid((1 - alpha) * f, (1 - alpha) * f)) - math.log(2)) / (1 - alpha)
    return float((np.outer(density, density) * bounds).sum())


def trapezoid(points: int = 161) -> tuple[np.ndarray, np.ndarray]:
    eps = np.linspace(-9, 9, points)
    density = np.exp(-(eps**2) / 2)
    return eps, density / density.sum()


def test_the_bound_of_two_particles_is_that_of_the_table():
    assert importance_weighted_bound(TABLED["off"], 2) == pytest.approx(-1.540541, abs=5e-7)
    noise, weights = grid(2, 64)
    copies = Copies(TABLED["off"], len(weights), given_noise(noise))
    estimator = Iwae(num_particles=2)
    assert (estimator.bound(copies.draws(estimator)) @ weights).item() == pytest.approx(-1.540541, abs=5e-7)


UNBIASED = [
    Elbo(),
    AnalyticKL(use_rep=False),
    Iwae(num_particles=2),
    Iwae(num_particles=2, use_rep=False),
    Renyi(num_particles=2, alpha=0.3),
    Renyi(num_particles=2, alpha=0.3, use_rep=False),
    Vimco(),
    Dreg(num_particles=2),
]


@pytest.mark.parametrize("estimator", UNBIASED, ids=lambda e: f"{type(e).__name__}, {e.use_rep}")
@pytest.mark.parametrize("case", MILD.values(), ids=MILD)
def test_the_mean_is_the_slope_of_the_bound(case, estimator):
    particles, alpha, h = estimator.num_particles, getattr(estimator, "alpha", 0.0), 1e-5
    changes = {
        "mu": ("mu", h, h),
        "rho": ("s", case.s * math.expm1(h), -case.s * math.expm1(-h)),
        "w": ("w", h, h),
        "b": ("b", h, h),
    }
    truth = case.truth(estimator)
    for name, (field, up, down) in changes.items():
        low, high = (
            importance_weighted_bound(
                dataclasses.replace(case, **{field: getattr(case, field) + step}), particles, alpha
            )
            for step in (-down, up)
        )
        assert truth.mean[name] == pytest.approx((high - low) / (2 * h), rel=1e-6, abs=1e-8), name


def test_biased_estimators_are_known_as_such():
    case = TABLED["off"]
    iwae = case.truth(Iwae(num_particles=2)).mean
    for estimator in (StlIwae(num_particles=2), Rws(), Rws(use_rep=True)):
        mean = case.truth(estimator).mean
        assert abs(mean["mu"] - iwae["mu"]) > 0.01
        assert mean["w"] == pytest.approx(iwae["w"])


@pytest.mark.parametrize(
    "estimator",
    [*UNBIASED[2:], StlIwae(num_particles=2), Rws(), Rws(use_rep=True)],
    ids=lambda e: f"{type(e).__name__}, {e.use_rep}",
)
@pytest.mark.parametrize("case", MILD.values(), ids=MILD)
def test_another_quadrature_gives_the_same_moments(case, estimator):
    eps, density = trapezoid()
    noise = torch.tensor(np.stack([axis.ravel() for axis in np.meshgrid(eps, eps)]))
    weights = torch.tensor(np.outer(density, density).ravel())
    truth = case.truth(estimator)
    for name, gradient in Copies(case, len(weights), given_noise(noise)).gradients_of(estimator).items():
        mean = (gradient @ weights).item()
        assert truth.mean[name] == pytest.approx(mean, abs=1e-6)
        variance = ((gradient - mean) ** 2 @ weights).item()
        assert truth.variance[name] == pytest.approx(variance, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("family", [Iwae, Vimco, Dreg, Rws])
def test_no_truth_is_told_where_the_grid_is_too_coarse_for_it(seed, family):
    case, estimator = random_case(seed), family(num_particles=2)
    truth = case.truth(estimator)
    assert truth is None or truth.agrees(finer(case, estimator))


def finer(case: LinearGaussian, estimator) -> Truth:
    noise, weights = grid(2, 180)
    gradients = Copies(case, len(weights), given_noise(noise)).gradients_of(estimator)
    mean = {name: (g @ weights).item() for name, g in gradients.items()}
    return Truth(mean, {name: ((g - mean[name]) ** 2 @ weights).item() for name, g in gradients.items()})


def test_no_truth_is_told_where_none_is_known():
    case = TABLED["off"]
    assert case.truth(Iwae(num_particles=4)) is not None
    assert case.truth(Iwae(num_particles=5)) is None
    assert random_case(3).truth(Iwae(num_particles=2)) is None  # nearly all weight lies on one particle
    for estimator in (Elbo(num_particles=50), Rloo(num_particles=50), Antithetic(num_particles=50)):
        assert case.truth(estimator) is not None


@pytest.mark.parametrize("estimator", [Enumerate(), DisArm(), type("Unknown", (Elbo,), {})()])
def test_refuses_an_estimator_that_it_does_not_know(estimator):
    with pytest.raises(
        ValueError, match=r"\Aexpected an estimator in ESTIMATORS for a Gaussian guide, got .*\Z"
    ):
        TABLED["off"].truth(estimator)


def test_every_gaussian_estimator_has_a_truth():
    for name, family in ESTIMATORS.items():
        for use_rep in family.gradients if name not in ("disarm", "enumerate") else ():
            truth = TABLED["off"].truth(family(use_rep=use_rep))
            assert tuple(truth.mean) == tuple(truth.variance) == NAMES
            assert all(math.isfinite(v) for v in (*truth.mean.values(), *truth.variance.values()))


# Measure-valued derivatives


def simulated_measure_valued(case: LinearGaussian, n: int) -> dict[str, np.ndarray]:
    """From densities alone: Rayleigh against its negative, double-sided Maxwell against M U."""
    rng = np.random.default_rng(0)
    x, w, b, t2, mu, s = dataclasses.astuple(case)

    def normal(value, mean, variance):
        return -0.5 * (np.log(2 * np.pi * variance) + (value - mean) ** 2 / variance)

    def f(eps):
        z = mu + s * eps
        return normal(z, 0, 1) + normal(x, w * z + b, t2) - normal(z, mu, s**2)

    rayleigh = rng.rayleigh(size=n)
    maxwell = np.sqrt(rng.chisquare(3, size=n)) * rng.choice([-1, 1], size=n)
    return {
        "mu": (f(rayleigh) - f(-rayleigh)) / (s * math.sqrt(2 * math.pi)),
        "rho": f(maxwell) - f(maxwell * rng.random(n)),  # d/drho = s d/ds
    }


@pytest.mark.parametrize("case", ["off", "sharp", "random-1"])
def test_measure_valued_moments_are_those_of_a_simulation(case):
    # Power: at n = 400,000 the limit is 0.9 % of a standard deviation on the mean, 1 to 3 % on the variance.
    case, n = CASES[case], 400_000
    truth = case.truth(MeasureValued())
    _, b, c = case.log_weight
    assert truth.variance["mu"] == pytest.approx(b**2 * (4 - math.pi) / (math.pi * case.s**2))
    assert truth.variance["rho"] == pytest.approx(b**2 + 4 * c**2)
    for name, gradient in simulated_measure_valued(case, n).items():
        deviations, variance = gradient - truth.mean[name], truth.variance[name]
        assert abs(deviations.mean()) < LIMIT * math.sqrt(variance / n)
        squares = deviations**2
        assert abs(squares.mean() - variance) < LIMIT * squares.std() / math.sqrt(n)


# The case and its Pyro pair


@over_cases
def test_the_log_weight_is_its_quadratic_in_the_noise(case):
    eps = torch.linspace(-3, 3, 7, dtype=torch.float64)
    draws = Copies(case, 7, given_noise(eps)).draws(Elbo())
    for value, (a, b, c) in ((draws.log_weight, case.log_weight), (draws.log_lik, case.log_lik)):
        torch.testing.assert_close(value[0], a + b * eps + c * eps**2, rtol=1e-10, atol=1e-10)
    moments = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    assert case.elbo == pytest.approx(float(moments @ torch.tensor(case.log_weight, dtype=torch.float64)))
    assert case.truth(AnalyticKL()).mean == pytest.approx(case.gradient, rel=1e-8, abs=1e-8)


@pytest.mark.parametrize("estimator", [Elbo(), Elbo(use_rep=False), Dreg(num_particles=3), MeasureValued()])
def test_the_pair_has_the_cases_parameters(estimator):
    case, n = TABLED["sharp"], 50
    pair, copies = case.pair(), Copies(case, n)
    x = torch.full((n, 1), case.x, dtype=torch.float64)
    pyro.set_rng_seed(0)
    estimator.loss_and_grads(pair.model, pair.guide, x)
    parameters = dict(pair.named_parameters())
    for name, gradient in copies.gradients_of(estimator).items():
        path, row = pair.PARAMETERS[name]
        total = -parameters[path].grad.flatten()[row]
        torch.testing.assert_close(total, gradient.sum(), rtol=1e-11, atol=1e-11)
    assert parameters["encoder.weight"].grad is None


def test_the_pairs_parts_cover_each_trained_row_once():
    pair = TABLED["off"].pair()
    counts = {name: torch.zeros(len(p)) for name, p in pair.named_parameters() if p.requires_grad}
    for members in pair.parts().values():
        for name, rows in members.items():
            counts[name][rows] += 1
    assert all((count == 1).all() for count in counts.values())

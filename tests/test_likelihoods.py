"""Likelihoods: one contract for all of them, then each against its closed form, a quadrature or torch's own."""

import math

import numpy as np
import pyro
import pytest
import torch
from torch.distributions import constraints

from pyrovae.likelihoods import (
    BINARIZATIONS,
    LIKELIHOODS,
    Bernoulli,
    Categorical,
    ContinuousBernoulliDistribution,
    Gaussian,
)

F64 = torch.float64

# The registry with its defaults, so that a new entry is tested without a line here, and variants.
CASES = {
    **{name: family() for name, family in LIKELIHOODS.items()},
    **{f"bernoulli-{name}": Bernoulli(binarize=name) for name in BINARIZATIONS},
    **{f"gaussian-{c}": Gaussian(c=c) for c in (1e-4, 1.0, "learned")},
    **{f"categorical-{levels}": Categorical(levels=levels) for levels in (2, 17)},
}
over_cases = pytest.mark.parametrize("likelihood", CASES.values(), ids=CASES.keys())

# A z-statistic beyond 5.5 has probability 4e-8: with 27 of them, a false-alarm rate of 1e-6 for this
# file. An error of 8 standard errors is found with probability 0.99.
Z = 5.5

NODES, WEIGHTS = (torch.tensor(a, dtype=F64) for a in np.polynomial.legendre.leggauss(100))


def on(low, high):
    """Gauss-Legendre points and weights; 100 of them integrate exp(300 x) on [0, 1] to rounding error."""
    return low + (high - low) * (NODES + 1) / 2, (high - low) / 2 * WEIGHTS


def some_eta(likelihood, sizes=(0.0, 1e-3, -0.3, 2.0, -7.0, 40.0, -300.0)):
    """One pixel under each of several outputs of a decoder, (E, 1, outputs)."""
    return torch.tensor(sizes, dtype=F64)[:, None, None] * torch.arange(likelihood.outputs).cos()


def make(likelihood, eta):
    return likelihood(eta, **{name: torch.tensor(v, dtype=F64) for name, v in likelihood.learned.items()})


def support(distribution):
    """Points (S, E) and weights (S, E) that sum or integrate over the support of one pixel, of batch E."""
    base = distribution.base_dist
    if base.support.is_discrete:
        x = base.enumerate_support()[..., 0]
        return x, torch.ones_like(x, dtype=F64)
    if base.support == constraints.unit_interval:
        low, high = torch.zeros(len(base.mean), dtype=F64), torch.ones(len(base.mean), dtype=F64)
    else:
        low, high = (base.mean[:, 0] + sign * 12 * base.stddev[:, 0] for sign in (-1, 1))
    pairs = [on(a, b) for a, b in zip(low, high, strict=True)]
    return tuple(torch.stack(part, dim=-1) for part in zip(*pairs, strict=True))


@over_cases
@pytest.mark.parametrize("batch", [(), (5,), (3, 5), (2, 3, 5)])
def test_batch_and_event_shapes(likelihood, batch):
    eta = torch.randn(*batch, 6, likelihood.outputs)
    distribution = likelihood(eta, **{k: torch.tensor(v) for k, v in likelihood.learned.items()})
    assert (distribution.batch_shape, distribution.event_shape) == (batch, (6,))
    x = likelihood.observe(torch.rand(*batch, 6))
    assert distribution.log_prob(x).shape == batch
    assert distribution.expand((4, *batch)).log_prob(x).shape == (4, *batch)
    assert likelihood.to_pixels(x).shape == likelihood.mean(eta).shape == (*batch, 6)


@over_cases
def test_integrates_to_one_where_it_says_so(likelihood):
    distribution = make(likelihood, some_eta(likelihood))
    x, weights = support(distribution)
    total = (distribution.log_prob(x[..., None]).exp() * weights).sum(0)
    if likelihood.normalised:
        torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-12, atol=0)
    else:
        assert (total < 0.51).all()


@over_cases
def test_mean_is_the_expected_image(likelihood):
    eta = some_eta(likelihood)
    # The mean of the soft one is that of the Bernoulli whose log-probability it borrows.
    distribution = make(likelihood, eta) if likelihood.normalised else make(Bernoulli(), eta)
    x, weights = support(distribution)
    expected = (distribution.log_prob(x[..., None]).exp() * weights * likelihood.to_pixels(x)).sum(0)
    torch.testing.assert_close(likelihood.mean(eta)[:, 0], expected, rtol=0, atol=1e-7)


@over_cases
def test_gradients_are_finite(likelihood):
    eta = some_eta(likelihood).requires_grad_()
    x = likelihood.observe(torch.rand(len(eta), 1, dtype=F64))
    make(likelihood, eta).log_prob(x).sum().backward()
    assert eta.grad.isfinite().all()


@over_cases
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_observations_lie_in_the_support(likelihood, dtype):
    pixels = torch.cat([torch.rand(50, 4, dtype=dtype), torch.tensor([[0.0, 0.5, 1.0, 1 / 255]], dtype=dtype)])
    distribution = make(likelihood, torch.zeros(4, likelihood.outputs, dtype=dtype))
    x = likelihood.observe(pixels)
    assert distribution.support.check(x).all()
    with pyro.validation_enabled(True):
        assert distribution.log_prob(x).isfinite().all()


@over_cases
def test_what_was_observed_is_observed_again(likelihood):
    x = likelihood.observe(torch.rand(1000))
    pixels = likelihood.to_pixels(x)
    assert ((pixels >= 0) & (pixels <= 1)).all()
    assert torch.equal(likelihood.observe(pixels), x)


@pytest.mark.parametrize(
    ("name", "levels"),
    [("categorical", 256), ("categorical-17", 17), ("categorical-2", 2), ("bernoulli-threshold", 2)],
)
def test_levels_round_to_the_nearest(name, levels):
    pixels = torch.rand(1000)
    error = CASES[name].to_pixels(CASES[name].observe(pixels)) - pixels
    assert error.abs().max() <= 0.5 / (levels - 1) + 1e-6


@pytest.mark.parametrize("name", ["gaussian", "bernoulli-soft", "continuous-bernoulli"])
def test_grey_pixels_stay_as_they_are(name):
    pixels = torch.rand(1000)
    x = CASES[name].observe(pixels)
    assert torch.equal(x, pixels)
    assert torch.equal(CASES[name].to_pixels(x), pixels)


def test_digits_return_exactly_from_17_levels():
    pixels = torch.arange(17) / 16
    x = Categorical(levels=17).observe(pixels)
    assert torch.equal(x, torch.arange(17))
    assert torch.equal(Categorical(levels=17).to_pixels(x), pixels)


@over_cases
def test_log_constant_is_the_gaussians_alone(likelihood):
    if not isinstance(likelihood, Gaussian):
        assert likelihood.log_constant(6) == 0
    elif likelihood.learned:
        assert likelihood.log_constant(6) is None
    else:  # the density of an image that is exactly the mean
        at_mean = likelihood(torch.zeros(6, 1, dtype=F64)).log_prob(torch.full((6,), 0.5, dtype=F64))
        assert likelihood.log_constant(6) == pytest.approx(at_mean.item(), rel=1e-12)


@over_cases
def test_is_a_site_in_a_plate(likelihood):
    with pyro.plate("data", 3), pyro.validation_enabled(True):
        x = pyro.sample("x", make(likelihood, torch.randn(3, 4, likelihood.outputs, dtype=F64)))
    assert x.shape == likelihood.to_pixels(x).shape == (3, 4)


# Bernoulli


def test_stochastic_binarization_is_drawn_with_the_pixel_as_probability():
    draw = Bernoulli(binarize="stochastic").observe
    p, n = torch.linspace(0, 1, 11, dtype=F64), 20_000
    x = draw(p.expand(n, -1), torch.Generator().manual_seed(0))
    assert torch.equal(x.mean(0)[[0, -1]], p[[0, -1]])
    z = (x.mean(0) - p)[1:-1] / (p * (1 - p) / n)[1:-1].sqrt()
    assert z.abs().max() < Z
    assert torch.equal(x, draw(p.expand(n, -1), torch.Generator().manual_seed(0)))
    assert not torch.equal(x, draw(p.expand(n, -1), torch.Generator().manual_seed(1)))


def test_threshold_binarization_is_at_one_half():
    x = Bernoulli(binarize="threshold").observe(torch.tensor([0.0, 0.49, 0.5, 1.0]))
    assert x.tolist() == [0, 0, 1, 1]


def test_plain_bernoulli_refuses_grey_pixels_that_the_soft_one_scores():
    eta, grey = torch.tensor([[0.7], [-2.0]], dtype=F64), torch.tensor([0.25, 0.5], dtype=F64)
    with pyro.validation_enabled(True):
        with pytest.raises(ValueError, match="support"):
            Bernoulli()(eta).log_prob(grey)
        score = Bernoulli(binarize="soft")(eta).log_prob(grey)
        p = eta[:, 0].sigmoid()
        torch.testing.assert_close(score, (grey * p.log() + (1 - grey) * (1 - p).log()).sum())
        with pytest.raises(ValueError, match="support"):
            Bernoulli(binarize="soft")(eta).log_prob(grey + 1)


def test_only_the_soft_bernoulli_is_a_pseudo_likelihood():
    assert [name for name, case in CASES.items() if not case.normalised] == ["bernoulli-soft"]
    discrete = {name.split("-")[0] for name, case in CASES.items() if case.discrete}
    assert discrete == {"bernoulli", "categorical"}
    assert not Bernoulli(binarize="soft").discrete


# The continuous Bernoulli: around 0, around the switch between formulas at |logit| = 0.2, and far out

LOGITS = [
    sign * size
    for size in (0.0, 1e-6, 1e-3, 0.05, 0.099, 0.101, 0.199, 0.2, 0.201, 1.0, 5.0, 15.0, 16.0, 40.0, 300.0)
    for sign in ((1,) if size == 0 else (1, -1))
]
VALUES = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])


def tilt(eta):
    """Quadrature weights of the continuous Bernoulli's density, (E, 100), and log of its normaliser."""
    x, weights = on(0, 1)
    mass = weights * (eta[:, None] * (x - eta[:, None].gt(0).double())).exp()  # at most 1: no overflow
    return mass / mass.sum(1, keepdim=True), mass.sum(1).log() + eta.relu()


def moments(eta):
    """Mean, variance and fourth central moment, by quadrature."""
    x, (mass, _) = on(0, 1)[0], tilt(eta)
    mean = mass @ x
    centred = x - mean[:, None]
    return mean, (mass * centred**2).sum(1), (mass * centred**4).sum(1)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_continuous_bernoulli_log_prob_is_exact(dtype):
    eta, x = torch.tensor(LOGITS, dtype=dtype)[:, None], VALUES.to(dtype)
    exact = eta.double() * x.double() - tilt(eta[:, 0].double())[1][:, None]
    error = (ContinuousBernoulliDistribution(eta).log_prob(x).double() - exact).abs()
    # A few roundings of the largest term, |eta| / 2.
    assert (error / (1 + eta.abs()) < 10 * torch.finfo(dtype).eps).all()


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_continuous_bernoulli_gradient_is_the_residual(dtype):
    eta = torch.tensor(LOGITS, dtype=dtype)[:, None].expand(-1, 5).clone().requires_grad_()
    x = VALUES.to(dtype).expand_as(eta).clone().requires_grad_()
    ContinuousBernoulliDistribution(eta).log_prob(x).sum().backward()
    mean = moments(eta.detach()[:, 0].double())[0][:, None]
    # Rounding near the switch, where two numbers near 10 are subtracted; the series' rest is smaller.
    atol = 100 * torch.finfo(dtype).eps
    torch.testing.assert_close(eta.grad.double(), x.detach().double() - mean, rtol=0, atol=atol)
    torch.testing.assert_close(x.grad, eta.detach())
    ours = ContinuousBernoulliDistribution(eta.detach()[:, 0]).mean.double()
    torch.testing.assert_close(ours, mean[:, 0], rtol=0, atol=atol)


def test_continuous_bernoulli_passes_gradcheck_on_both_sides_of_the_switch():
    eta = torch.tensor([-0.201, -0.2, -0.199, -1e-9, 0, 1e-9, 0.199, 0.2, 0.201], dtype=F64, requires_grad=True)
    x = torch.full_like(eta, 0.3).requires_grad_()
    assert torch.autograd.gradcheck(lambda e, v: ContinuousBernoulliDistribution(e).log_prob(v), (eta, x))
    assert torch.autograd.gradcheck(lambda e: ContinuousBernoulliDistribution(e).mean, (eta,))


def test_continuous_bernoulli_agrees_with_torch_where_torch_is_exact():
    eta = torch.linspace(-10, 10, 81, dtype=F64)[:, None]
    theirs = torch.distributions.ContinuousBernoulli(logits=eta)
    ours = ContinuousBernoulliDistribution(eta)
    torch.testing.assert_close(ours.log_prob(VALUES.double()), theirs.log_prob(VALUES.double()))
    torch.testing.assert_close(ours.mean, theirs.mean)


def test_torchs_continuous_bernoulli_is_wrong_where_ours_is_not():
    # Why there is one of our own. At x = 1 the density at logit a > 0 is a / (1 - exp(-a)).
    eta, x = torch.tensor(40.0), torch.tensor(1.0)
    exact = math.log(40 / -math.expm1(-40))
    assert abs(torch.distributions.ContinuousBernoulli(logits=eta).log_prob(x).item() - exact) > 0.1
    assert abs(ContinuousBernoulliDistribution(eta).log_prob(x).item() - exact) < 1e-5


SAMPLED = [-40.0, -1.0, -1e-4, 0.0, 0.5, 40.0]


def test_continuous_bernoulli_samples_have_the_density():
    eta, n = torch.tensor(SAMPLED, dtype=F64), 100_000
    x = ContinuousBernoulliDistribution(eta).rsample((n,))
    mean, variance, fourth = moments(eta)
    z = (x.mean(0) - mean) / (variance / n).sqrt()
    assert z.abs().max() < Z
    z = (x.var(0) - variance) / ((fourth - variance**2) / n).sqrt()
    assert z.abs().max() < Z
    u = torch.where(eta == 0, x, (eta * x).expm1() / eta.where(eta != 0, torch.ones(())).expm1())
    distance = u.sort(0).values - torch.arange(1, n + 1)[:, None] / n
    # Kolmogorov-Smirnov, with the Dvoretzky-Kiefer-Wolfowitz bound for a false-alarm rate of 1e-8.
    assert distance.abs().max() < math.sqrt(math.log(2 / 1e-8) / (2 * n))


def test_continuous_bernoulli_samples_have_the_gradient_of_their_mean():
    # d mean / d eta is the variance, for this as for every exponential family.
    eta, n = torch.tensor(SAMPLED, dtype=F64), 20_000
    logits = eta.expand(n, -1).clone().requires_grad_()
    ContinuousBernoulliDistribution(logits).rsample().sum().backward()
    error = logits.grad.mean(0) - moments(eta)[1]
    assert (error / (logits.grad.std(0) / n**0.5)).abs().max() < Z


# Gaussian


@pytest.mark.parametrize("c", [1e-4, 0.05, 1.0, "learned"])
def test_gaussian_c_is_a_variance(c):
    eta, x = torch.randn(3, 6, 1, dtype=F64), torch.rand(3, 6, dtype=F64)
    learned = {"log_c": torch.tensor(0.3, dtype=F64).log()} if c == "learned" else {}
    variance = 0.3 if c == "learned" else c
    sse = (x - 1 / (1 + (-eta[..., 0]).exp())).square().sum(-1)
    log_prob = Gaussian(c=c)(eta, **learned).log_prob(x)
    torch.testing.assert_close(log_prob, -3 * math.log(2 * math.pi * variance) - sse / (2 * variance))
    if c != "learned":
        torch.testing.assert_close(log_prob, Gaussian(c=c).log_constant(6) - sse / (2 * c))


def test_learned_c_is_best_at_the_mean_squared_error():
    likelihood = Gaussian(c="learned")
    eta, x = torch.randn(3, 6, 1, dtype=F64), torch.rand(3, 6, dtype=F64)
    best = (x - likelihood.mean(eta)).square().mean().log()
    log_c = (best + torch.tensor([-0.1, 0.0, 0.1], dtype=F64)).requires_grad_()
    sum(likelihood(eta, log_c=one).log_prob(x).sum() for one in log_c).backward()
    torch.testing.assert_close(log_c.grad[1], torch.zeros((), dtype=F64), rtol=0, atol=1e-12)
    assert log_c.grad[0] > 0 > log_c.grad[2]
    assert likelihood.learned == {"log_c": pytest.approx(math.log(0.05))}


# Categorical


def test_categorical_scores_each_pixel_by_its_own_softmax():
    eta, x = torch.randn(2, 3, 5, dtype=F64), torch.tensor([[0, 4, 2], [1, 1, 3]])
    twin = sum(eta[:, d].log_softmax(-1).gather(1, x[:, d : d + 1])[:, 0] for d in range(3))
    torch.testing.assert_close(Categorical(levels=5)(eta).log_prob(x), twin)


def test_two_level_categorical_is_a_thresholded_bernoulli():
    eta, pixels = torch.randn(4, 6, 1, dtype=F64), torch.rand(4, 6, dtype=F64)
    two = torch.cat([torch.zeros_like(eta), eta], dim=-1)
    binary, categorical = Bernoulli(binarize="threshold"), Categorical(levels=2)
    torch.testing.assert_close(
        categorical(two).log_prob(categorical.observe(pixels)), binary(eta).log_prob(binary.observe(pixels))
    )
    torch.testing.assert_close(categorical.mean(two), binary.mean(eta))


@pytest.mark.parametrize(
    ("family", "setting", "value"),
    [
        (Bernoulli, "binarize", "round"),
        (Gaussian, "c", 0.0),
        (Gaussian, "c", -0.1),
        (Gaussian, "c", math.nan),
        (Gaussian, "c", math.inf),
        (Categorical, "levels", 1),
        (Categorical, "levels", 257),
    ],
)
def test_refuses_bad_settings(family, setting, value):
    with pytest.raises(ValueError, match=f"expected {setting}"):
        family(**{setting: value})


@pytest.mark.parametrize("name", CASES)
def test_from_pixels_undoes_to_pixels(name):
    x = CASES[name].observe(torch.rand(5, 6))
    assert torch.equal(CASES[name].from_pixels(CASES[name].to_pixels(x)), x)


def test_from_pixels_cuts_and_rounds_where_observing_does():
    pixels = torch.rand(5, 6)
    assert torch.equal(Bernoulli(binarize="threshold").from_pixels(pixels), (pixels >= 0.5).float())
    assert torch.equal(Bernoulli().from_pixels(pixels), pixels)
    assert torch.equal(Categorical(levels=3).from_pixels(pixels), (2 * pixels).round().long())


@pytest.mark.parametrize(("c", "learned"), [(0.04, {}), ("learned", {"log_c": torch.tensor(0.04).log()})])
def test_a_gaussian_pixel_lies_within_ten_standard_deviations_of_a_grey_level(c, learned):
    """From -2 to 3 at a standard deviation of 0.2, in every pixel."""
    x = torch.tensor([[-1.99, 2.99], [-2.01, 0.5], [0.5, 3.01], [3.01, -2.01]])
    assert Gaussian(c=c).can_observe(x, **learned).tolist() == [True, False, False, False]

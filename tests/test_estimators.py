"""Estimators against closed forms, against Pyro's own under the same noise, and at their edges."""

import contextlib
import math
from statistics import NormalDist

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.distributions.testing.fakes import NonreparameterizedNormal
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch import nn

from pyrovae.estimators import ESTIMATORS, AnalyticKL, Elbo
from tests.linear_gaussian import CASES, TABLED, LinearGaussian

# In standard errors. With a hundred such comparisons in the suite, two-sided, a false alarm in 2e-5 of suites.
LIMIT = -NormalDist().inv_cdf(2e-5 / 200)


def moments_in_theory(case: LinearGaussian) -> dict:
    return {
        "elbo": (Elbo(), case.pathwise_variance),
        "elbo, score": (Elbo(use_rep=False), case.score_variance(case.log_weight)),
        "analytic-kl": (AnalyticKL(), case.analytic_kl_variance),
        "analytic-kl, score": (AnalyticKL(use_rep=False), case.score_variance(case.log_lik)),
    }


@pytest.mark.parametrize("name", moments_in_theory(CASES["off"]))
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradient_mean_and_variance_are_those_of_theory(case, name):
    estimator, variance = moments_in_theory(case)[name]
    mean, measured = case.moments(estimator)
    torch.testing.assert_close(mean, mean.new_tensor(case.gradient), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(measured, mean.new_tensor(variance), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("case", "name", "variance"),
    [
        ("off", "elbo", (2.66667, 3.66222)),
        ("off", "analytic-kl", (0.666667, 1.21556)),
        ("off", "elbo, score", (6.05173, 11.8134)),
        ("sharp", "elbo", (3.24, 0.3268)),
        ("sharp", "analytic-kl", (2.56, 0.2192)),
        ("sharp", "elbo, score", (74.1906, 4.57623)),
        ("posterior", "elbo", (2, 2)),
        ("posterior", "analytic-kl", (0.5, 0.625)),
        ("posterior", "elbo, score", (4.59355, 4.59355)),
    ],
)
def test_closed_forms_give_the_published_table(case, name, variance):
    assert moments_in_theory(TABLED[case])[name][1] == pytest.approx(variance, rel=1e-5)


@pytest.mark.parametrize("particles", [1, 4])
@pytest.mark.parametrize("name", moments_in_theory(CASES["off"]))
def test_sampled_gradients_have_that_mean_and_variance_over_k(name, particles):
    # Power: at n = 400,000 the limit is 0.8 % of a standard deviation on the mean, 1 to 3 % on the variance
    # of the pathwise estimators, and 2 to 11 % on that of the score function, whose tails are heavier.
    case, n = TABLED["off"], 400_000
    estimator, variance = moments_in_theory(case)[name]
    estimator = type(estimator)(num_particles=particles, use_rep=estimator.use_rep)
    parameters = case.parameters(n)
    loss = estimator.differentiable_loss(*case.pair(*parameters))
    for gradient, mean, single in zip(
        torch.autograd.grad(-loss, parameters), case.gradient, variance, strict=True
    ):
        deviations = gradient - mean
        assert abs(deviations.mean()) < LIMIT * math.sqrt(single / particles / n)
        squares = deviations**2
        assert abs(squares.mean() - single / particles) < LIMIT * squares.std() / math.sqrt(n)


@pytest.mark.parametrize("estimator", [Elbo(num_particles=3), AnalyticKL(num_particles=3)])
def test_bound_is_the_exact_elbo_on_average(estimator):
    case, n = CASES["sharp"], 100_000
    draws = estimator.draws(*case.pair(*case.parameters(n)))
    bound = estimator.bound(draws)
    assert abs(bound.mean() - case.elbo) < LIMIT * bound.std() / math.sqrt(n)


def test_log_weight_is_log_evidence_at_the_posterior():
    case = TABLED["posterior"]
    draws = Elbo(num_particles=5).draws(*case.pair(*case.parameters(7)))
    torch.testing.assert_close(draws.log_weight, torch.full((5, 7), case.log_evidence, dtype=torch.float64))


# Pyro's own estimators under the same noise


def both_losses(vae, ours, theirs, guide=None):
    """(loss, gradient by parameter) of each, drawn with the same seed."""
    x = torch.rand(6, 64, dtype=torch.float64)
    x = vae.likelihood.observe(x)
    for estimator, program in ((ours, vae.guide), (theirs, guide or vae.guide)):
        pyro.set_rng_seed(1)
        vae.zero_grad()
        loss = estimator.differentiable_loss(vae.model, program, x)
        loss.backward()
        yield loss.detach(), {name: p.grad.clone() for name, p in vae.named_parameters()}


def pyro_twin(family, particles):
    return family(num_particles=particles, vectorize_particles=True, max_plate_nesting=1)


@pytest.mark.parametrize("particles", [1, 5])
@pytest.mark.parametrize("beta", [1.0, 2.5])
@pytest.mark.parametrize("likelihood", ["bernoulli", "continuous-bernoulli", "gaussian", "categorical"])
@pytest.mark.parametrize(("ours", "theirs"), [(Elbo, Trace_ELBO), (AnalyticKL, TraceMeanField_ELBO)])
def test_pathwise_equals_pyro_under_the_same_noise(make_vae, likelihood, beta, particles, ours, theirs):
    vae = make_vae(likelihood=likelihood, beta=beta, hidden=(16,)).double()
    mine, pyros = both_losses(vae, ours(num_particles=particles), pyro_twin(theirs, particles))
    torch.testing.assert_close(mine, pyros, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("particles", [1, 5])
@pytest.mark.parametrize("beta", [1.0, 2.5])
def test_score_function_equals_pyro_on_a_site_without_rsample(make_vae, beta, particles):
    vae = make_vae(beta=beta, hidden=(16,)).double()

    def guide(x):
        with pyro.plate("data", len(x), dim=-1), poutine.scale(scale=beta):
            q = vae.posterior(x).base_dist
            pyro.sample("z", NonreparameterizedNormal(q.loc, q.scale).to_event(1))

    mine, pyros = both_losses(
        vae, Elbo(num_particles=particles, use_rep=False), pyro_twin(Trace_ELBO, particles), guide
    )
    torch.testing.assert_close(mine, pyros, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("use_rep", [True, False])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_runs_under_svi_and_trains_every_parameter(make_vae, name, use_rep):
    vae = make_vae(hidden=(16,))
    before = {name: p.detach().clone() for name, p in vae.named_parameters()}
    svi = SVI(
        vae.model,
        vae.guide,
        pyro.optim.Adam({"lr": 1e-3}),
        ESTIMATORS[name](num_particles=2, use_rep=use_rep),
    )
    x = torch.bernoulli(torch.rand(32, 64))
    losses = [svi.step(x) for _ in range(2)]
    assert all(math.isfinite(loss) for loss in losses)
    assert math.isfinite(svi.evaluate_loss(x))
    unchanged = [name for name, p in vae.named_parameters() if torch.equal(before[name], p)]
    assert not unchanged


def test_svi_with_elbo_takes_the_steps_of_trace_elbo(make_vae):
    x = torch.bernoulli(torch.rand(32, 64))
    results = []
    for loss in (Elbo(), Trace_ELBO()):
        vae = make_vae(hidden=(16,))
        pyro.set_rng_seed(1)
        with pyro.get_param_store().scope():
            svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), loss)
            results.append(([svi.step(x) for _ in range(5)], list(vae.state_dict().values())))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


# What draws are


def test_subsampled_plate_scales_the_loss_but_no_weight():
    data = torch.arange(8.0, dtype=torch.float64)

    def program(size, n):
        def plate():
            return pyro.plate("data", size, subsample_size=n, subsample=torch.arange(n))

        def model():
            with plate():
                z = pyro.sample("z", dist.Normal(data.new_zeros(()), 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=data[:n])

        def guide():
            with plate():
                pyro.sample("z", dist.Normal(data.new_ones(n), 0.5))

        return model, guide

    results = []
    for size in (2, 8):
        pyro.set_rng_seed(0)
        results.append((Elbo().draws(*program(size, 2)).log_weight, Elbo().loss(*program(size, 2))))
    (small, small_loss), (large, large_loss) = results
    torch.testing.assert_close(small, large)
    assert large_loss / small_loss != pytest.approx(1)
    pyro.set_rng_seed(0)
    twin = Trace_ELBO().loss(*program(8, 2))
    pyro.set_rng_seed(0)
    assert Elbo().loss(*program(8, 2)) == pytest.approx(twin, rel=1e-12)


def test_loss_is_a_sum_over_data_and_a_mean_over_particles():
    case = TABLED["posterior"]  # where every log-weight is log p(x)
    for particles in (1, 3):
        assert Elbo(num_particles=particles).loss(*case.pair(*case.parameters(5))) == pytest.approx(
            -5 * case.log_evidence
        )


def test_several_sites_add_up():
    zero = torch.zeros(4, dtype=torch.float64)

    def program(observe):
        with pyro.plate("data", 4):
            a = pyro.sample("a", dist.Normal(zero, 1.0))
            b = pyro.sample("b", dist.Normal(a, 2.0))
            if observe:
                pyro.sample("x", dist.Normal(a + b, 1.0), obs=zero)
                pyro.sample("y", dist.Normal(a - b, 1.0), obs=zero)

    pair = (lambda: program(True)), (lambda: program(False))
    for estimator, twin in ((Elbo(), Trace_ELBO()), (AnalyticKL(), TraceMeanField_ELBO())):
        pyro.set_rng_seed(0)
        mine = estimator.loss(*pair)
        pyro.set_rng_seed(0)
        assert mine == pytest.approx(twin.loss(*pair), rel=1e-12)


# Refusals: never silently wrong


def test_pathwise_refuses_a_guide_without_rsample():
    case = TABLED["off"]
    pair = case.pair(*case.parameters(3), NonreparameterizedNormal)
    with pytest.raises(ValueError, match=r"expected a reparameterized.* guide site 'z'.*use_rep=False"):
        Elbo().loss(*pair)
    Elbo(use_rep=False).loss(*pair)


def test_analytic_kl_refuses_a_pair_without_closed_form():
    case = TABLED["off"]
    with pytest.raises(ValueError, match=r"expected a closed-form KL.*use the estimator 'elbo'"):
        AnalyticKL().loss(*case.pair(*case.parameters(3), lambda loc, scale: dist.StudentT(4.0, loc, scale)))


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_needs_a_particle(estimator):
    with pytest.raises(ValueError, match="expected num_particles >= 1, got 0"):
        estimator(num_particles=0)


def program(*names, plates=1, observe=False):
    """A model or guide with these latent sites, the first inside so many plates."""

    def run():
        with contextlib.ExitStack() as stack:
            for dim in range(plates):
                stack.enter_context(pyro.plate(f"plate-{dim}", 3, dim=-1 - dim))
            for name in names:
                pyro.sample(name, dist.Normal(0.0, 1.0))
            if observe:
                pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))

    return run


@pytest.mark.parametrize(
    ("model", "guide", "message"),
    [
        (program("z", plates=0, observe=True), program("z", plates=0), "'z' in one plate"),
        (program("z", plates=2, observe=True), program("z", plates=2), "'z' in one plate"),
        (program("z", observe=True), program("other"), "same latent sites"),
        (program("z"), program("z"), "observes data, got none"),
    ],
    ids=["no plate", "two plates", "different sites", "nothing observed"],
)
def test_refuses_what_is_no_vae(model, guide, message):
    with pytest.raises(ValueError, match=message):
        Elbo().loss(model, guide)


def test_refuses_to_score_a_sample_that_a_flow_cannot_invert():
    class Flow(nn.Module):
        def __init__(self):
            super().__init__()
            self.planar = dist.transforms.Planar(2)

        def forward(self):
            with pyro.plate("data", 3):
                base = dist.Normal(torch.zeros(3, 2), 1.0).to_event(1)
                return pyro.sample("z", dist.TransformedDistribution(base, [self.planar]))

    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=torch.zeros(3, 2))

    flow = Flow()
    assert math.isfinite(Elbo().loss(model, flow))
    with pytest.raises(ValueError, match=r"guide site 'z'.*no inverse.*use_rep=True"):
        Elbo(use_rep=False).loss(model, flow)

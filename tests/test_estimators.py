"""Estimators against closed forms, against Pyro's own under the same noise, and at their edges."""

import contextlib
import io
import math
from itertools import product
from statistics import NormalDist

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.distributions.testing.fakes import NonreparameterizedNormal
from pyro.distributions.testing.rejection_gamma import ShapeAugmentedGamma
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.distributions import kl_divergence
from torch.nn.functional import binary_cross_entropy_with_logits

from pyrovae.data import Images
from pyrovae.estimators import (
    ESTIMATORS,
    AnalyticKL,
    Antithetic,
    DisArm,
    Dreg,
    Elbo,
    Enumerate,
    Iwae,
    LearnedBaseline,
    MeasureValued,
    Reconstruction,
    Renyi,
    Rloo,
    RunningMean,
    Rws,
    StickingTheLanding,
    StlIwae,
    Vimco,
)
from pyrovae.training import fit
from pyrovae.variance.testbed import NODES
from tests.combinations import (
    EVERY,
    EXISTING,
    FEW,
    KINDS,
    OF_CODES,
    OF_GAUSSIANS,
    SMALL,
    adapt,
    refusal,
    several,
    takes,
)
from tests.linear_gaussian import CASES, MILD, NAMES, TABLED, Copies, given_noise, grid

# In standard errors. With 400 such comparisons in the suite, two-sided, a false alarm in 2e-5 of suites.
LIMIT = -NormalDist().inv_cdf(2e-5 / 800)
F64 = torch.float64


def build(name: str, use_rep: bool, particles: int, antithetic: bool = False):
    """The estimator by name, with a baseline if it learns one."""
    pairs = {"antithetic": True} if antithetic else {}
    estimator = ESTIMATORS[name](num_particles=particles, use_rep=use_rep, **pairs)
    for seed in range(3):
        adapt(estimator, Copies(TABLED["off"], 5).draws(estimator, seed))
    return estimator


def ways(*particles: int, guide: str = "mean-field") -> list[tuple[str, bool, int, bool]]:
    """(name, use_rep, K, antithetic) of every estimator that there is for the guide."""
    return [
        (name, use_rep, k, antithetic)
        for (name, use_rep, of), k, antithetic in product(EXISTING, particles, (False, True))
        if of == guide and takes(name, k, antithetic) and not (antithetic and ESTIMATORS[name]().antithetic)
    ]


def per_draw(*estimators, case=TABLED["off"]):
    """The gradients of each, 50 draws under the same noise."""
    return [Copies(case, 50).gradients_of(estimator) for estimator in estimators]


def combined(gradients: dict, others: dict, weight: float = 1.0) -> dict:
    return {name: gradients[name] + weight * others[name] for name in gradients}


def assert_same(gradients: dict, others: dict, names=NAMES, tolerance: float = 1e-11):
    for name in names:
        torch.testing.assert_close(gradients[name], others[name], rtol=tolerance, atol=tolerance)


# Moments in theory


@pytest.mark.parametrize(
    ("name", "use_rep", "particles", "antithetic"),
    [
        way
        for way in ways(1, 2, 3)
        if way[0] not in OF_GAUSSIANS and (way[2] < 3 or ESTIMATORS[way[0]].independent)
    ],
)
def test_gradient_mean_and_variance_are_those_of_theory(name, use_rep, particles, antithetic):
    estimator = build(name, use_rep, particles, antithetic)
    weighted = estimator.importance_weighted
    noise, weights = grid(particles, NODES[particles] if weighted else 12)
    for case in {1: CASES, 2: MILD if weighted else CASES, 3: {"off": TABLED["off"]}}[particles].values():
        truth = case.truth(estimator)
        gradients = Copies(case, len(weights), given_noise(noise)).gradients_of(estimator)
        for parameter in NAMES:
            mean = gradients[parameter] @ weights
            variance = (gradients[parameter] - mean) ** 2 @ weights
            expected = truth.mean[parameter], truth.variance[parameter]
            assert (mean.item(), variance.item()) == pytest.approx(expected, rel=1e-8, abs=1e-8), parameter


SAMPLED = [way for way in ways(4) if way[0] in ("elbo", "analytic-kl") or (way[0] == "stl" and way[3])]
SAMPLED += [("antithetic", True, 4, False), ("measure-valued", False, 1, False), ("rloo", False, 5, False)]


@pytest.mark.parametrize(("name", "use_rep", "particles", "antithetic"), SAMPLED)
def test_sampled_gradients_have_that_mean_and_variance(name, use_rep, particles, antithetic):
    # Power: at n = 400,000 the limit is 0.9 % of a standard deviation on the mean, 1 to 4 % on the variance
    # of the pathwise and measure-valued estimators, and 2 to 7 % on that of the score function, whose tails
    # are heavier.
    case, n = TABLED["off"], 400_000
    estimator = build(name, use_rep, particles, antithetic)
    truth = case.truth(estimator)
    for parameter, gradient in Copies(case, n).gradients_of(estimator).items():
        deviations, variance = gradient - truth.mean[parameter], truth.variance[parameter]
        assert abs(deviations.mean()) <= LIMIT * math.sqrt(variance / n) + 1e-12, parameter
        squares = deviations**2
        assert abs(squares.mean() - variance) <= LIMIT * squares.std() / math.sqrt(n) + 1e-12, parameter


@pytest.mark.parametrize("estimator", [Elbo(num_particles=3), AnalyticKL(num_particles=3)])
def test_bound_is_the_exact_elbo_on_average(estimator):
    case, n = TABLED["sharp"], 100_000
    bound = estimator.bound(Copies(case, n).draws(estimator))
    assert abs(bound.mean() - case.elbo) < LIMIT * bound.std() / math.sqrt(n)


@pytest.mark.parametrize(
    "way", [way for way in ways(1, 4) if way[0] not in ("analytic-kl", "reconstruction")], ids=str
)
def test_every_bound_is_log_evidence_at_the_posterior(way):
    case, estimator = TABLED["posterior"], build(*way)
    bound = estimator.bound(Copies(case, 7).draws(estimator))
    torch.testing.assert_close(bound, torch.full((7,), case.log_evidence, dtype=F64))


# Identities, draw by draw


def test_rloo_descends_half_the_variance_of_the_log_weights():
    copies, rloo = Copies(TABLED["off"], 50), Rloo(num_particles=5)
    draws = copies.draws(rloo)
    variance = copies.gradients(-0.5 * draws.log_weight.var(0))  # z is cut from the graph
    assert_same(copies.gradients(rloo.surrogate(draws)), variance, ("mu", "rho"))


@pytest.mark.parametrize("particles", [2, 5])
def test_stl_iwae_is_dreg_and_reparameterized_wake_sleep(particles):
    stl, dreg, rws = per_draw(
        StlIwae(num_particles=particles),
        Dreg(num_particles=particles),
        Rws(num_particles=particles, use_rep=True),
    )
    assert_same(stl, combined(dreg, rws), ("mu", "rho"))
    with pytest.raises(AssertionError):
        assert_same(stl, dreg, ("mu", "rho"))


@pytest.mark.parametrize(
    "estimator",
    [
        Dreg(num_particles=3),
        StlIwae(num_particles=3),
        Rws(num_particles=3, use_rep=True),
        Renyi(num_particles=3, alpha=0.0),
    ],
)
def test_theta_follows_the_bound_of_iwae(estimator):
    assert_same(*per_draw(estimator, Iwae(num_particles=3)), ("w", "b"))
    assert_same(*per_draw(Vimco(num_particles=3), Iwae(num_particles=3, use_rep=False)), ("w", "b"))


def test_one_importance_weighted_particle_is_the_elbo():
    assert_same(*per_draw(Iwae(), Elbo()))
    assert_same(*per_draw(Renyi(), Elbo()))
    assert_same(*per_draw(Dreg(), StickingTheLanding()))
    assert_same(*per_draw(StlIwae(), StickingTheLanding()))
    copies = Copies(TABLED["off"], 50)
    score = copies.gradients(copies.draws(Elbo(use_rep=False)).score)  # of mean zero
    plain, weighted, renyi = per_draw(Elbo(use_rep=False), Iwae(use_rep=False), Renyi(use_rep=False))
    assert_same(weighted, combined(plain, score, -1))
    assert_same(renyi, combined(plain, score, -1))


@pytest.mark.parametrize("use_rep", [True, False])
def test_renyi_runs_from_iwae_to_the_elbo(use_rep):
    iwae, zero = (
        family(num_particles=4, use_rep=use_rep) for family in (Iwae, lambda **k: Renyi(alpha=0.0, **k))
    )
    assert_same(*per_draw(iwae, zero))
    copies = Copies(TABLED["off"], 50)
    bounds = [e.bound(copies.draws(e)) for e in (iwae, Renyi(num_particles=4), Elbo(num_particles=4))]
    assert (bounds[0] > bounds[1]).all()
    assert (bounds[1] > bounds[2]).all()
    almost = Renyi(num_particles=4, alpha=1 - 1e-7)
    torch.testing.assert_close(almost.bound(copies.draws(almost)), bounds[2], rtol=1e-5, atol=1e-5)
    assert_same(*per_draw(almost, Elbo(num_particles=4)), tolerance=1e-5)


SHIFTED = {
    (name, False) for name in ("elbo", "analytic-kl", "running-mean", "learned-baseline", "iwae", "renyi")
}


@pytest.mark.parametrize("way", ways(1, 4), ids=str)
def test_a_constant_in_the_log_joint_moves_a_score_function_without_its_own_baseline_alone(way):
    estimator, results = build(*way), []
    for shift in (0.0, 3.0):
        copies = Copies(TABLED["off"], 50)
        copies.shift = shift
        draws = copies.draws(estimator)
        results.append((copies.gradients(estimator.surrogate(draws)), estimator.bound(draws)))
    (plain, bound), (shifted, bound_of_shifted) = results
    torch.testing.assert_close(bound_of_shifted, bound + 3)
    assert_same(plain, shifted, ("w", "b"))
    moves = way[:2] in SHIFTED
    with pytest.raises(AssertionError) if moves else contextlib.nullcontext():
        assert_same(plain, shifted, ("mu", "rho"), tolerance=1e-10)


@pytest.mark.parametrize("way", ways(1, 2), ids=str)
def test_a_surrogate_may_be_asked_for_twice(way):
    estimator, copies = build(*way), Copies(TABLED["off"], 50)
    draws, results = copies.draws(estimator), []
    for _ in range(2):
        pyro.set_rng_seed(1)
        results.append(copies.gradients(estimator.surrogate(draws)))
    assert_same(*results)


@pytest.mark.parametrize(("name", "use_rep", "particles", "antithetic"), ways(4))
def test_antithetic_particles_are_mirror_images(name, use_rep, particles, antithetic):
    estimator = build(name, use_rep, particles, antithetic)
    z = Copies(TABLED["off"], 6).draws(estimator).guide_sites["z"]["value"]
    mirrored = torch.allclose(z[::2] + z[1::2], torch.full((2, 6), 2 * 0.3, dtype=F64))
    assert mirrored == estimator.antithetic == (antithetic or name == "antithetic")


# Pyro's own estimators under the same noise


def both_losses(vae, ours, theirs, guide=None):
    """(loss, gradient by parameter) of each, drawn with the same seed."""
    x = torch.rand(6, 64, dtype=torch.float64)
    x = vae.likelihood.observe(x)
    for estimator, program in ((ours, vae.guide), (theirs, guide or vae.guide)):
        pyro.set_rng_seed(1)
        vae.zero_grad()
        loss = estimator.loss_and_grads(vae.model, program, x)
        yield loss, {name: p.grad.clone() for name, p in vae.named_parameters()}


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


@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("likelihood", ["bernoulli", "categorical"])
def test_importance_weighted_bounds_equal_pyro_under_the_same_noise(make_vae, likelihood, alpha):
    vae = make_vae(likelihood=likelihood, hidden=(16,)).double()
    theirs = RenyiELBO(alpha=alpha, num_particles=5, vectorize_particles=True, max_plate_nesting=1)
    ours = [Renyi(num_particles=5, alpha=alpha)] + [Iwae(num_particles=5)] * (alpha == 0)
    for estimator in ours:
        torch.testing.assert_close(*both_losses(vae, estimator, theirs), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("name", "use_rep", "guide"), sorted({*FEW, *(w for w in EVERY if w[2] in KINDS)}))
def test_runs_under_svi_and_trains_every_parameter_or_is_refused(make_vae, name, use_rep, guide):
    vae = make_vae(hidden=(16,), guide=guide, **SMALL.get(guide, {}))
    before = {name: p.detach().clone() for name, p in vae.named_parameters()}
    x, pattern = torch.bernoulli(torch.rand(32, 64)), refusal(name, use_rep, guide)
    with contextlib.nullcontext() if pattern is None else pytest.raises(ValueError, match=rf"\A{pattern}.*\Z"):
        estimator = ESTIMATORS[name](num_particles=several(name), use_rep=use_rep)
        svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), estimator)
        losses = [svi.step(x) for _ in range(2)]
        assert all(math.isfinite(loss) for loss in losses)
        assert math.isfinite(svi.evaluate_loss(x))
    changed = [name for name, p in vae.named_parameters() if not torch.equal(before[name], p)]
    assert changed == ([] if pattern else list(before))


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


def subsampled(size: int):
    """Two data, out of so many."""
    x = torch.arange(2.0, dtype=F64)

    def plate():
        return pyro.plate("data", size, subsample_size=2, subsample=torch.arange(2))

    def model():
        with plate():
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide():
        with plate():
            pyro.sample("z", dist.Normal(x.new_ones(2), 0.5))

    return model, guide


@pytest.mark.parametrize("estimator", [Elbo(), Iwae(num_particles=3), MeasureValued(), Rloo()])
def test_subsampled_plate_scales_the_loss_but_no_weight(estimator):
    results = []
    for size in (2, 8):
        pyro.set_rng_seed(0)
        draws = estimator.draws(*subsampled(size))
        pyro.set_rng_seed(0)
        loss = estimator.loss(*subsampled(size))
        pyro.set_rng_seed(1)
        results.append((loss, estimator.bound(draws), estimator.surrogate(draws)))
    (small, *of_small), (large, *of_large) = results
    torch.testing.assert_close(of_small, of_large)
    assert large == pytest.approx(4 * small)
    pyro.set_rng_seed(0)
    twin = Trace_ELBO().loss(*subsampled(8))
    pyro.set_rng_seed(0)
    assert Elbo().loss(*subsampled(8)) == pytest.approx(twin, rel=1e-12)


@pytest.mark.parametrize("estimator", [Elbo(), Iwae(num_particles=3)])
def test_loss_is_a_sum_over_data_whatever_the_particles(estimator):
    case = TABLED["posterior"]  # where every log-weight is log p(x)
    assert estimator.loss(*Copies(case, 5).pair) == pytest.approx(-5 * case.log_evidence)


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


# Sites that depend on each other


def chain(family, parameters):
    """a, then b given a, for four data."""
    zero = torch.zeros(4, dtype=F64)
    loc, rho, slope, intercept, rest = parameters

    def model():
        with pyro.plate("data", 4):
            a = pyro.sample("a", dist.Normal(zero, 1.0))
            b = pyro.sample("b", dist.Normal(a, 2.0))
            pyro.sample("x", dist.Normal(a + b, 1.0), obs=zero + 1)

    def guide():
        with pyro.plate("data", 4):
            a = pyro.sample("a", family(loc + zero, rho.exp()))
            pyro.sample("b", family(slope * a + intercept, rest.exp()))

    return model, guide


def chain_parameters():
    values = torch.tensor([0.3, -0.5, 0.7, -0.2, 0.1], dtype=F64)
    return [v.clone().requires_grad_() for v in values]


def chain_gradient(estimator, family=dist.Normal):
    pyro.set_rng_seed(0)
    parameters = chain_parameters()
    return torch.stack(
        torch.autograd.grad(-estimator.differentiable_loss(*chain(family, parameters)), parameters)
    )


@pytest.mark.parametrize("particles", [1, 5])
def test_score_function_of_dependent_sites_equals_pyro(particles):
    twin = chain_gradient(pyro_twin(Trace_ELBO, particles), NonreparameterizedNormal)
    for family in (NonreparameterizedNormal, dist.Normal):
        mine = chain_gradient(Elbo(num_particles=particles, use_rep=False), family)
        torch.testing.assert_close(mine, twin, rtol=1e-11, atol=1e-11)


def log_weights_at_fixed_phi(draws, parameters):
    """log p(x, z) - log q(z) with the guide's parameters cut from the graph, but not z."""
    a, b = (draws.guide_sites[name]["value"] for name in "ab")
    loc, rho, slope, intercept, rest = (p.detach() for p in parameters)
    log_joint = (
        dist.Normal(0.0, 1.0).log_prob(a)
        + dist.Normal(a, 2.0).log_prob(b)
        + dist.Normal(a + b, 1.0).log_prob(torch.ones(4, dtype=F64))
    )
    log_guide = dist.Normal(loc, rho.exp()).log_prob(a) + dist.Normal(
        slope * a + intercept, rest.exp()
    ).log_prob(b)
    return log_joint - log_guide


@pytest.mark.parametrize(
    ("estimator", "weigh"),
    [
        (StickingTheLanding(num_particles=3), lambda w: torch.full_like(w, 1 / 3)),
        (StlIwae(num_particles=3), lambda w: w),
        (Dreg(num_particles=3), lambda w: w**2),
        (Rws(num_particles=3, use_rep=True), lambda w: w - w**2),
    ],
)
def test_a_path_derivative_goes_through_dependent_sites_at_fixed_phi(estimator, weigh):
    parameters = chain_parameters()
    draws = estimator.draws(*chain(dist.Normal, parameters))
    f = log_weights_at_fixed_phi(draws, parameters)
    by_hand = torch.autograd.grad((weigh(f.detach().softmax(0)) * f).sum(), parameters, retain_graph=True)
    mine = torch.autograd.grad(estimator.surrogate(draws).sum(), parameters)
    torch.testing.assert_close(mine, by_hand, rtol=1e-11, atol=1e-11)


# Where the guide can be the exact posterior: probabilistic PCA


class PrincipalComponents:
    """p(z) = N(0, I), p(x|z) = N(W z, t2 I); the guide's own mean for each datum, one covariance for all."""

    def __init__(self, diagonal: bool):
        self.weight, self.x, self.t2 = torch.randn(4, 2, dtype=F64), torch.randn(6, 4, dtype=F64), 0.5
        self.precision = torch.eye(2, dtype=F64) + self.weight.T @ self.weight / self.t2
        covariance = self.precision.inverse()
        self.loc = (self.x @ self.weight @ covariance / self.t2).requires_grad_()
        if diagonal:  # the best such guide
            self.scale = self.precision.diagonal().rsqrt().requires_grad_()
        else:
            self.scale = torch.linalg.cholesky(covariance).requires_grad_()
        self.diagonal = diagonal

    def model(self):
        with pyro.plate("data", 6):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.weight.T, self.t2**0.5).to_event(1), obs=self.x)

    def guide(self):
        with pyro.plate("data", 6):
            if self.diagonal:
                pyro.sample("z", dist.Normal(self.loc, self.scale).to_event(1))
            else:
                pyro.sample("z", dist.MultivariateNormal(self.loc, scale_tril=self.scale))

    def gradient(self, estimator):
        draws = estimator.draws(self.model, self.guide)
        return draws, torch.autograd.grad(estimator.surrogate(draws).sum(), (self.loc, self.scale))


PATHS = [
    StickingTheLanding(),
    StlIwae(num_particles=3),
    Dreg(num_particles=3),
    Rws(num_particles=3, use_rep=True),
]


@pytest.mark.parametrize("estimator", [*PATHS, StickingTheLanding(num_particles=4, antithetic=True)])
def test_a_path_derivative_vanishes_at_an_exact_posterior_of_full_covariance(estimator):
    pca = PrincipalComponents(diagonal=False)
    _, gradients = pca.gradient(estimator)
    for gradient in gradients:
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-10)
    assert all(gradient.abs().max() > 0.1 for gradient in pca.gradient(Elbo())[1])


def test_sticking_the_landing_keeps_what_a_diagonal_covariance_cannot_say():
    pca = PrincipalComponents(diagonal=True)
    draws, (in_loc, in_scale) = pca.gradient(StickingTheLanding())
    deviation = draws.guide_sites["z"]["value"] - pca.loc
    beyond = pca.precision - pca.precision.diagonal().diag()
    torch.testing.assert_close(in_loc, -deviation @ beyond)
    torch.testing.assert_close(in_scale, (-deviation @ beyond * deviation / pca.scale).sum(0))
    assert in_loc.abs().min() > 1e-3


# Codes: exact means by summing over every tuple of codes


class Codes:
    """Three bits that four are observed through, with a copy of the parameters for each of n data."""

    def __init__(self, n: int, drawn: torch.Tensor | None = None):
        generator = torch.Generator().manual_seed(0)
        shapes = {"logits": (3,), "weight": (3, 4), "bias": (4,)}
        self.values = {k: torch.randn(*shape, dtype=F64, generator=generator) for k, shape in shapes.items()}
        self.parameters = {k: v.expand(n, *v.shape).clone().requires_grad_() for k, v in self.values.items()}
        self.n, self.x, self.drawn = n, torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=F64), drawn
        self.pair = self.model, self.guide

    def model(self):
        with pyro.plate("data", self.n):
            z = pyro.sample("z", dist.Bernoulli(logits=self.x.new_zeros(3)).to_event(1))
            logits = (z[..., None] * self.parameters["weight"]).sum(-2) + self.parameters["bias"]
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=self.x)

    def guide(self):
        drawn = self.drawn

        class Given(dist.Bernoulli):
            def sample(self, sample_shape=()):
                return drawn.reshape(self.batch_shape)

        family = dist.Bernoulli if drawn is None else Given
        with pyro.plate("data", self.n):
            pyro.sample("z", family(logits=self.parameters["logits"]).to_event(1))

    def mean_gradient(self, estimator, probabilities) -> dict[str, torch.Tensor]:
        surrogate = estimator.surrogate(estimator.draws(*self.pair))
        gradients = torch.autograd.grad(surrogate @ probabilities, self.parameters.values())
        return {name: g.sum(0) for name, g in zip(self.parameters, gradients, strict=True)}


EVERY_CODE = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=F64)] * 3)


def exact(bound) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The bound, a function of (log p(x, z), log q(z)) of the eight codes, and its gradient."""
    codes = Codes(1)
    parameters = {name: v.clone().requires_grad_() for name, v in codes.values.items()}
    logits = EVERY_CODE @ parameters["weight"] + parameters["bias"]
    errors = binary_cross_entropy_with_logits(logits, codes.x.expand_as(logits), reduction="none")
    log_joint = 3 * math.log(0.5) - errors.sum(-1)
    probabilities = parameters["logits"].sigmoid()
    log_guide = (EVERY_CODE * probabilities + (1 - EVERY_CODE) * (1 - probabilities)).log().sum(-1)
    value = bound(log_joint, log_guide)
    gradients = torch.autograd.grad(value, parameters.values())
    return value.detach(), dict(zip(parameters, gradients, strict=True))


def elbo_of_codes(log_joint, log_guide):
    return log_guide.exp() @ (log_joint - log_guide)


def of_pairs(alpha):
    """The importance-weighted bound of two particles, of order alpha."""

    def bound(log_joint, log_guide):
        f = log_joint - log_guide
        both = torch.stack([f[:, None].expand(8, 8), f[None].expand(8, 8)])
        value = ((1 - alpha) * both).logsumexp(0) - math.log(2)
        return ((log_guide[:, None] + log_guide).exp() * value / (1 - alpha)).sum()

    return bound


def wake(log_joint, log_guide):
    """Its gradient in phi is that of wake-sleep with two particles."""
    f = (log_joint - log_guide).detach()
    weights = torch.stack([f[:, None].expand(8, 8), f[None].expand(8, 8)]).softmax(0)
    score = weights[0] * log_guide[:, None] + weights[1] * log_guide[None]
    return ((log_guide[:, None] + log_guide).detach().exp() * score).sum() + 0 * log_joint.sum()


def every_pair_of_codes(antithetic: bool, monkeypatch) -> tuple[torch.Tensor, torch.Tensor]:
    """(2, n, 3) and their probabilities, (n,)."""
    p = Codes(1).values["logits"].sigmoid()
    if not antithetic:
        codes = torch.stack([EVERY_CODE.repeat_interleave(8, 0), EVERY_CODE.repeat(8, 1)])
        return codes, (codes * p + (1 - codes) * (1 - p)).prod(-1).prod(0)
    # A bit's two values are constant on three intervals of its uniform.
    edges = torch.stack(
        [torch.zeros(3, dtype=F64), torch.minimum(p, 1 - p), torch.maximum(p, 1 - p), torch.ones(3)]
    )
    chosen, bits = torch.cartesian_prod(*[torch.arange(3)] * 3), torch.arange(3)
    uniforms = (edges[:-1] + edges[1:])[chosen, bits] / 2
    monkeypatch.setattr(torch, "rand_like", lambda _: uniforms[None])
    return None, edges.diff(dim=0)[chosen, bits].prod(-1)


@pytest.mark.parametrize(("name", "use_rep", "particles", "antithetic"), ways(2, guide="bernoulli-code"))
def test_the_mean_over_every_pair_of_codes_is_the_gradient_of_the_bound(
    monkeypatch, name, use_rep, particles, antithetic
):
    settings = {"antithetic": True} if antithetic else {}
    estimator = ESTIMATORS[name](num_particles=2, use_rep=use_rep, **settings)
    adapt(estimator, estimator.draws(*Codes(5).pair))
    drawn, probabilities = every_pair_of_codes(estimator.antithetic, monkeypatch)
    assert probabilities.sum() == pytest.approx(1)
    mean = Codes(len(probabilities), drawn).mean_gradient(estimator, probabilities)
    _, gradient = exact(of_pairs(estimator.alpha) if estimator.importance_weighted else elbo_of_codes)
    if name == "rws":
        gradient["logits"] = exact(wake)[1]["logits"]
    assert_same(mean, gradient, mean, tolerance=1e-10)


def test_enumerate_is_the_exact_elbo_and_its_gradient():
    codes, estimator = Codes(5), Enumerate()
    draws = estimator.draws(*codes.pair)
    bound, gradient = exact(elbo_of_codes)
    torch.testing.assert_close(estimator.bound(draws), bound.expand(5))
    torch.testing.assert_close(estimator.reconstruction(draws) - estimator.kl(draws), bound.expand(5))
    q, p = dist.Bernoulli(logits=codes.values["logits"]), dist.Bernoulli(0.5 * torch.ones(3, dtype=F64))
    torch.testing.assert_close(estimator.kl(draws), kl_divergence(q, p).sum().expand(5))
    fifth = torch.full((5,), 0.2, dtype=F64)
    assert_same(codes.mean_gradient(estimator, fifth), gradient, gradient)


def test_enumerate_refuses_more_than_ten_bits(make_vae):
    x = torch.bernoulli(torch.rand(2, 64))
    vae = make_vae(guide="bernoulli-code", latent_dim=10, hidden=(8,))
    assert math.isfinite(Enumerate().loss(*vae.pair, x))
    vae = make_vae(guide="bernoulli-code", latent_dim=11, hidden=(8,))
    with pytest.raises(ValueError, match="expected at most 10 bits for Enumerate, got 11"):
        Enumerate().loss(*vae.pair, x)


# Baselines that are learned


def squares():
    """f = -0.92 - (x - z)^2 / 2 with a fixed guide: on average -0.92 - (x^2 + 1) / 2."""
    x = torch.linspace(-3, 3, 16, dtype=F64)

    def program(observe):
        with pyro.plate("data", 16):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))
            if observe:
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return (lambda: program(True)), (lambda: program(False)), -0.5 * math.log(2 * math.pi) - (x**2 + 1) / 2


def adapted(estimator, steps: int):
    for _ in range(steps):
        adapt(estimator, estimator.draws(*squares()[:2]))
    return estimator


def test_the_running_mean_is_an_exponential_moving_average():
    estimator, average = RunningMean(decay=0.75, num_particles=3), None
    for _ in range(4):
        draws = estimator.draws(*squares()[:2])
        expected = draws.log_weight.new_zeros(1, 1) if average is None else average.reshape(1, 1)
        torch.testing.assert_close(estimator.baseline(draws), expected)
        adapt(estimator, draws)
        f = draws.log_weight.mean()
        average = f if average is None else 0.75 * average + 0.25 * f


def test_the_learned_baseline_comes_to_the_mean_of_each_datum_and_leaves_less_variance():
    estimator = adapted(LearnedBaseline(num_particles=100), 200)
    *pair, mean = squares()
    draws = estimator.draws(*pair)
    baseline = estimator.baseline(draws)
    assert (baseline[0] - mean).abs().max() < 0.5  # of a range of 4.5
    assert (baseline[0] - mean).square().mean() < 0.02 * mean.var()
    running = adapted(RunningMean(num_particles=100), 200)
    left = [(draws.log_weight - b).square().mean() for b in (0, running.baseline(draws), baseline)]
    assert left[0] > 2 * left[1] > 2 * left[2]


@pytest.mark.parametrize("spread", [0.2, 5.0])  # of f: its deviation counts as 1 if it is less
def test_the_learned_baseline_is_a_scaled_network_fitted_by_adam(spread):
    estimator = LearnedBaseline(decay=0.75, lr=0.02, hidden=7, num_particles=3)
    pair, x = squares()[:2], torch.linspace(-3, 3, 16, dtype=F64)
    draws = estimator.draws(*pair)
    torch.testing.assert_close(estimator.baseline(draws), torch.zeros(1, 16, dtype=F64))
    first, last = estimator.network[0], estimator.network[2]
    assert (first.out_features, last.weight.any().item(), last.bias.any().item()) == (7, False, False)
    weights = [p.detach().clone().requires_grad_() for p in (first.weight, first.bias, last.weight, last.bias)]
    adam, moments = torch.optim.Adam(weights, lr=0.02), None

    def predicted():
        return torch.tanh(x[:, None] @ weights[0].T + weights[1]) @ weights[2][0] + weights[3]

    for step in range(4):
        f = spread * torch.randn(3, 16, dtype=F64) + torch.linspace(0, step, 16, dtype=F64)
        estimator.adapt(f, x[:, None])
        new = f.mean().item(), f.square().mean().item()
        moments = new if moments is None else [0.75 * m + 0.25 * n for m, n in zip(moments, new, strict=True)]
        mean, scale = moments[0], math.sqrt(max(moments[1] - moments[0] ** 2, 1.0))
        assert (scale == 1) == (spread < 1)
        loss = ((f.mean(0) - mean) / scale - predicted()).square().mean()
        for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            weight.grad = gradient
        adam.step()
        expected = (mean + scale * predicted().detach())[None]
        torch.testing.assert_close(estimator.baseline(draws), expected)


@pytest.mark.parametrize("family", [RunningMean, LearnedBaseline])
@pytest.mark.parametrize("steps", [0, 3])
def test_a_saved_baseline_learns_on_as_if_never_saved(family, steps):
    estimator, file, other = adapted(family(), steps), io.BytesIO(), family()
    torch.save(estimator.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(3):
        draws = estimator.draws(*squares()[:2])
        assert torch.equal(estimator.baseline(draws), other.baseline(draws))
        adapt(estimator, draws)
        adapt(other, draws)


@pytest.mark.parametrize("family", [RunningMean, LearnedBaseline])
def test_what_a_step_teaches_the_baseline_does_not_change_that_step(make_vae, family):
    class Dull(family):
        def adapt(self, log_weight, observations):
            pass

    images, results = Images(torch.rand(16, 1, 8, 8)), []
    for steps, estimator in product((1, 2), (family(), Dull())):
        vae = make_vae(hidden=(8,))
        fit(vae, images, images, estimator=estimator, epochs=steps, batch_size=16, quiet=True)
        results.append(nn.utils.parameters_to_vector(vae.parameters()).detach())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[2], results[3])


@pytest.mark.parametrize("family", [RunningMean, LearnedBaseline])
@pytest.mark.parametrize("last", [1, 3])
def test_a_ragged_last_batch_has_the_same_baseline(make_vae, family, last):
    """Its gradient is that of no baseline, less the baseline times the score's."""
    vae = make_vae(hidden=(8,)).double()
    x = torch.bernoulli(torch.rand(8, 64, dtype=F64))
    estimator = family(num_particles=2)
    for _ in range(5):
        adapt(estimator, estimator.draws(*vae.pair, x))
    pyro.set_rng_seed(1)
    of_all = estimator.baseline(estimator.draws(*vae.pair, x)).expand(1, 8)
    draws = estimator.draws(*vae.pair, x[:last])
    baseline = estimator.baseline(draws).expand(1, last)
    torch.testing.assert_close(baseline, of_all[:, :last])

    def gradient(surrogate):
        return torch.autograd.grad(surrogate.sum(), vae.parameters(), retain_graph=True, materialize_grads=True)

    plain = gradient(Elbo(num_particles=2, use_rep=False).surrogate(draws))
    score = gradient((baseline * draws.score).mean(0))
    expected = [p - s for p, s in zip(plain, score, strict=True)]
    torch.testing.assert_close(list(gradient(estimator.surrogate(draws))), expected)
    assert any(s.any() for s in score)
    fit(
        vae.float(),
        Images(torch.rand(8 + last, 1, 8, 8)),
        Images(torch.rand(2, 1, 8, 8)),
        estimator=family(),
        epochs=2,
        batch_size=8,
        quiet=True,
    )


def test_a_learned_baseline_refuses_data_of_another_size(make_vae):
    estimator = LearnedBaseline()
    small, large = make_vae((1, 4, 4), hidden=(8,)), make_vae(hidden=(8,))
    adapt(estimator, estimator.draws(*small.pair, torch.zeros(3, 16)))
    with pytest.raises(ValueError, match=r"expected data of 16 numbers each.*got 64: make a new estimator"):
        estimator.loss_and_grads(*large.pair, torch.zeros(3, 64))


# Refusals: never silently wrong


def test_pathwise_refuses_a_guide_without_rsample():
    pair = Copies(TABLED["off"], 3, NonreparameterizedNormal).pair
    for name, use_rep, guide in EXISTING:
        if guide == "mean-field" and name not in OF_GAUSSIANS:
            estimator = ESTIMATORS[name](num_particles=several(name), use_rep=use_rep)
            message = r"\Aexpected a reparameterized.* guide site 'z'.*use_rep=False.*\Z"
            with pytest.raises(ValueError, match=message) if use_rep else contextlib.nullcontext():
                estimator.loss(*pair)


def test_pathwise_refuses_a_rejection_sampler_whose_score_has_a_part():
    """Rejection Sampling Variational Inference, Naesseth et al., 2017: https://arxiv.org/abs/1610.05683."""
    concentration = torch.tensor(2.5, dtype=F64, requires_grad=True)

    def program(observe):
        with pyro.plate("data", 3):
            fn = ShapeAugmentedGamma(concentration, concentration.new_ones(()))
            z = pyro.sample("z", dist.Gamma(concentration.new_ones(()), 1.0) if observe else fn)
            if observe:
                pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones(3, dtype=F64))

    pair = (lambda: program(True)), (lambda: program(False))
    with pytest.raises(
        ValueError, match=r"\Aexpected a reparameterized .* for a part of its gradient only: .*\Z"
    ):
        Elbo().loss(*pair)
    assert math.isfinite(Elbo(use_rep=False).loss_and_grads(*pair))
    assert concentration.grad != 0


def test_analytic_kl_refuses_a_pair_without_closed_form():
    with pytest.raises(ValueError, match=r"expected a closed-form KL.*use the estimator 'elbo'"):
        AnalyticKL().loss(*Copies(TABLED["off"], 3, dist.Cauchy).pair)


def student(loc, scale):
    return dist.StudentT(4.0, loc, scale)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_refuses_numbers_of_particles_that_there_is_no_estimator_for(name):
    family, (least, largest) = ESTIMATORS[name], ESTIMATORS[name].particles
    assert family().num_particles == least
    for too_few in range(least):
        with pytest.raises(ValueError, match=rf"\Aexpected num_particles >= {least} for .*, got {too_few}\Z"):
            family(num_particles=too_few)
    if largest is not None:
        with pytest.raises(ValueError, match=rf"\Aexpected num_particles <= {largest} for .*, got 2\Z"):
            family(num_particles=2)
    if takes(name, 2, antithetic=True):
        with pytest.raises(ValueError, match=r"\Aexpected num_particles even for antithetic pairs, got 3\Z"):
            family(num_particles=3, antithetic=True)
        with pytest.raises(ValueError, match=r"\Aexpected num_particles >= 2 for .*, got 1\Z"):
            family(num_particles=1, antithetic=True)
    else:
        with pytest.raises(ValueError, match=r"\Aexpected .*\Z"):
            family(num_particles=2, antithetic=True)


@pytest.mark.parametrize("family", [Rloo, Iwae, Dreg, Vimco, Rws, Renyi, StlIwae])
def test_particles_that_must_be_independent_are_never_antithetic(family):
    with pytest.raises(ValueError, match=r"\Aexpected antithetic False .*independent particles, got True\Z"):
        family(num_particles=2, antithetic=True)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Renyi(alpha=1.0), "expected alpha from 0 to below 1, got 1.0"),
        (lambda: Renyi(alpha=-0.1), "expected alpha from 0 to below 1, got -0.1"),
        (lambda: Renyi(alpha=math.nan), "expected alpha from 0 to below 1, got nan"),
        (lambda: RunningMean(decay=1.0), "expected decay from 0 to below 1, got 1.0"),
        (lambda: LearnedBaseline(decay=-1.0), "expected decay from 0 to below 1, got -1.0"),
        (lambda: Dreg(use_rep=False), "expected use_rep True for Dreg, .* got False"),
        (lambda: Rloo(use_rep=True), "expected use_rep False for Rloo, .* got True"),
        (lambda: DisArm(antithetic=False), "expected antithetic True for DisArm, .* got False"),
    ],
)
def test_refuses_settings_out_of_range(build, message):
    with pytest.raises(ValueError, match=rf"\A{message}\Z"):
        build()


@pytest.mark.parametrize("name", [name for name, family in ESTIMATORS.items() if family.importance_weighted])
def test_importance_weights_refuse_a_scaled_kl(make_vae, name):
    estimator, images = ESTIMATORS[name](num_particles=2), Images(torch.rand(4, 1, 8, 8))
    for beta in (0.5, 2.0):
        vae = make_vae(beta=beta, hidden=(8,))
        with pytest.raises(ValueError, match=rf"\Aexpected beta = 1 for {type(estimator).__name__}: .*\Z"):
            estimator.loss(*vae.pair, torch.bernoulli(images.pixels.flatten(1)))
        with vae.evaluating():  # without beta
            assert math.isfinite(estimator.loss(*vae.pair, torch.bernoulli(images.pixels.flatten(1))))
    with pytest.raises(ValueError, match=rf"\Aexpected kl_warmup 0 for {type(estimator).__name__}, got 3\Z"):
        fit(make_vae(hidden=(8,)), images, images, estimator=estimator, kl_warmup=3, epochs=1, quiet=True)


@pytest.mark.parametrize("name", OF_CODES)
def test_estimators_of_codes_refuse_a_gaussian(name):
    message = r"\Aexpected a Bernoulli guide at one site for .*, got {'z': Normal.*\Z"
    with pytest.raises(ValueError, match=message):
        ESTIMATORS[name]().loss_and_grads(*Copies(TABLED["off"], 3).pair)


@pytest.mark.parametrize(
    "pair",
    [
        lambda: Copies(TABLED["off"], 3, student).pair,
        lambda: chain(dist.Normal, chain_parameters()),
        lambda: (lambda pca: (pca.model, pca.guide))(PrincipalComponents(diagonal=False)),
        lambda: Codes(3).pair,
    ],
    ids=["student", "two sites", "full covariance", "codes"],
)
def test_measure_valued_refuses_all_but_one_diagonal_gaussian(pair):
    with pytest.raises(
        ValueError, match=r"\Aexpected a Gaussian guide with diagonal covariance at one site.*\Z"
    ):
        MeasureValued().loss_and_grads(*pair())


def test_antithetic_pairs_refuse_noise_without_a_mirror_image():
    with pytest.raises(ValueError, match=r"\Aexpected a guide whose noise can be mirrored .*Exponential.*\Z"):
        Antithetic().loss(*Copies(TABLED["off"], 3, lambda loc, scale: dist.Exponential(scale)).pair)


def program(*names, observe=False):
    """A model or guide with these latent sites in a plate."""

    def run():
        with pyro.plate("data", 3):
            for name in names:
                pyro.sample(name, dist.Normal(0.0, 1.0))
            if observe:
                pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))

    return run


@pytest.mark.parametrize(
    ("estimator", "model", "guide", "message"),
    [
        (Elbo(), program("z", observe=True), program("other"), "same latent sites"),
        (Reconstruction(), program("z"), program("z"), "observes data, got none"),
        (Elbo(), program(), program(), "expected a model with sample sites, got none"),
    ],
    ids=["different sites", "nothing observed", "nothing"],
)
def test_refuses_what_is_no_vae(estimator, model, guide, message):
    with pytest.raises(ValueError, match=message):
        estimator.loss(model, guide)


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

"""Sites outside the data plate, several plates and none: against Pyro under the same noise and closed forms."""

import contextlib
import math
from statistics import NormalDist

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.testing.fakes import NonreparameterizedNormal
from pyro.infer import RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO

from pyrovae.estimators import (
    ESTIMATORS,
    AnalyticKL,
    DisArm,
    Dreg,
    Elbo,
    Enumerate,
    Iwae,
    LearnedBaseline,
    MeasureValued,
    Renyi,
    Rloo,
    RunningMean,
    StickingTheLanding,
)

F64 = torch.float64
NORMALS = {True: dist.Normal, False: NonreparameterizedNormal}  # by use_rep: Pyro follows `has_rsample`


def number(value: float):
    return torch.tensor(value, dtype=F64, requires_grad=True)


class Hierarchy:
    """w outside the data plate, z and x inside, which depend on it: 4 of 6 data.

    Args:
        early: Whether something is observed outside before z.
        late: Whether a penalty on z and on a parameter stands outside after it.
    """

    def __init__(self, family=dist.Normal, *, early: bool = False, late: bool = False, subsample: bool = True):
        self.family, self.early, self.late = family, early, late
        self.m, self.rho, self.a, self.c, self.s, self.t = self.parameters = [
            number(value) for value in (0.3, -0.4, 0.5, 0.2, -0.7, 0.9)
        ]
        self.x = torch.linspace(-1, 2, 6, dtype=F64)
        self.rows = torch.tensor([0, 2, 3, 5]) if subsample else torch.arange(6)

    def plate(self):
        return pyro.plate("data", 6, subsample_size=len(self.rows), subsample=self.rows)

    def model(self) -> None:
        w = pyro.sample("w", self.family(self.x.new_zeros(()), 1.5))
        if self.early:
            pyro.sample("y", dist.Normal(self.t * w, 0.8), obs=torch.tensor(0.7, dtype=F64))
        with self.plate():
            z = pyro.sample("z", self.family(w, 1.0))
            pyro.sample("x", dist.Normal(z + self.t * w, 0.5), obs=self.x[self.rows])
        if self.late:
            pyro.factor("penalty", -0.1 * (z**2).sum(-1, keepdim=z.dim() > 1) - self.t**2)

    def guide(self) -> None:
        w = pyro.sample("w", self.family(self.m, self.rho.exp()))
        with self.plate():
            pyro.sample("z", self.family(self.a * w + self.c * self.x[self.rows], self.s.exp()))


def loss_and_gradient(estimator, pair, parameters):
    """One draw of each under a fixed seed."""
    pyro.set_rng_seed(3)
    if isinstance(estimator, TraceGraph_ELBO | RenyiELBO):  # which have no differentiable_loss
        model, guide = pair
        for parameter in parameters:
            parameter.grad = None

        def with_parameter():  # without one RenyiELBO takes no gradient
            pyro.param("unused", torch.zeros(()))
            model()

        loss = estimator.loss_and_grads(with_parameter, guide)
        return torch.tensor(loss, dtype=F64), torch.stack([parameter.grad for parameter in parameters])
    loss = estimator.differentiable_loss(*pair)
    return loss.detach(), torch.stack(torch.autograd.grad(loss, parameters))


def assert_same(ours, theirs, pair, parameters, of_theirs=None, theirs_parameters=None):
    mine = loss_and_gradient(ours, pair, parameters)
    twin = loss_and_gradient(theirs, of_theirs or pair, theirs_parameters or parameters)
    torch.testing.assert_close(mine, twin, rtol=1e-11, atol=1e-11)


def many(family, particles: int, depth: int = 1, **settings):
    """One of Pyro's ELBOs on as many particles in one pass."""
    return family(num_particles=particles, vectorize_particles=True, max_plate_nesting=depth, **settings)


# A latent site outside the data plate counts once


@pytest.mark.parametrize("validated", [True, False])
@pytest.mark.parametrize("size", [1, 3])
def test_a_latent_outside_the_plate_counts_once_whether_validated_or_not(validated, size):
    x = torch.linspace(-1, 1, size, dtype=F64)

    def model():
        w = pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", size):
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    def guide():
        pyro.sample("w", dist.Normal(x.new_ones(()), 0.5))

    with pyro.validation_enabled(validated):
        for estimator in (Elbo(), Elbo(use_rep=False), StickingTheLanding(), RunningMean(), LearnedBaseline()):
            pyro.set_rng_seed(0)
            ours = estimator.loss(model, guide)
            pyro.set_rng_seed(0)
            assert ours == pytest.approx(Trace_ELBO().loss(model, guide), rel=1e-12)


@pytest.mark.parametrize(("early", "late"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("particles", [1, 3])
def test_pathwise_gradients_equal_pyro(early, late, particles):
    pair = Hierarchy(early=early, late=late)
    assert_same(
        Elbo(num_particles=particles), many(Trace_ELBO, particles), (pair.model, pair.guide), pair.parameters
    )
    if not late:  # its penalty is no distribution that TraceMeanField_ELBO knows
        twin = many(TraceMeanField_ELBO, particles)
        assert_same(AnalyticKL(num_particles=particles), twin, (pair.model, pair.guide), pair.parameters)


@pytest.mark.parametrize(("early", "late"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("particles", [1, 3])
def test_score_function_gradients_equal_pyro(early, late, particles):
    """TraceGraph_ELBO, where all depends on what comes before, has the same signals; Trace_ELBO those of w."""
    pair = Hierarchy(NonreparameterizedNormal, early=early, late=late)
    programs = pair.model, pair.guide
    ours = Elbo(num_particles=particles, use_rep=False)
    mine = loss_and_gradient(ours, programs, pair.parameters)
    loss, gradient = loss_and_gradient(many(Trace_ELBO, particles), programs, pair.parameters)
    of_w = slice(0, 2)
    torch.testing.assert_close(mine[0], loss, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(mine[1][of_w], gradient[of_w], rtol=1e-11, atol=1e-11)
    if particles == 1:  # its provenance does not survive a plate over particles
        twin = loss_and_gradient(TraceGraph_ELBO(), programs, pair.parameters)
        torch.testing.assert_close(mine, twin, rtol=1e-11, atol=1e-11)


def exact_gradient(pair: Hierarchy) -> torch.Tensor:
    """Of the expected bound, by Gauss-Hermite quadrature, exact as log p - log q is quadratic in (w, z)."""
    nodes, weights = (torch.tensor(a) for a in np.polynomial.hermite_e.hermegauss(4))
    weights = weights / weights.sum()
    w = (pair.m + pair.rho.exp() * nodes)[:, None, None]
    x = pair.x[:, None]
    z = pair.a * w + pair.c * x + pair.s.exp() * nodes
    inside = (
        dist.Normal(w, 1.0).log_prob(z)
        + dist.Normal(z + pair.t * w, 0.5).log_prob(x)
        - dist.Normal(pair.a * w + pair.c * x, pair.s.exp()).log_prob(z)
    )
    w = w[:, 0, 0]
    outside = dist.Normal(0.0, 1.5).log_prob(w) - dist.Normal(pair.m, pair.rho.exp()).log_prob(w)
    if pair.early:
        outside = outside + dist.Normal(pair.t * w, 0.8).log_prob(torch.tensor(0.7, dtype=F64))
    if pair.late:
        outside = outside - 0.1 * (z**2 @ weights).sum(1) - pair.t**2
    bound = weights @ ((inside @ weights).sum(1) + outside)
    return torch.stack(torch.autograd.grad(bound, pair.parameters))


class Particles(Hierarchy):
    """A pair with parameters of its own for each particle, whose gradient is then a draw for each."""

    def __init__(self, particles: int, **settings):
        super().__init__(subsample=False, **settings)
        copies = [p.detach().expand(particles, 1).clone().requires_grad_() for p in self.parameters]
        self.m, self.rho, self.a, self.c, self.s, self.t = self.parameters = copies


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    "family",
    [
        *(lambda family=family, **s: family(use_rep=False, **s) for family in (Elbo, AnalyticKL)),
        *(Elbo, Rloo, RunningMean, StickingTheLanding, AnalyticKL),
    ],
)
def test_gradients_are_unbiased_with_a_latent_outside(family, late):
    # Two-sided, 6 parameters x 14 cases: a false alarm in 2e-5 of runs. Power: at 40,000 draws, a gradient that
    # is off by a twentieth of its standard deviation fails.
    n, limit = 40_000, -NormalDist().inv_cdf(2e-5 / 168)
    pair = Particles(n, early=True, late=late)
    pyro.set_rng_seed(1)
    estimator = family(num_particles=n)
    surrogate = n * estimator.surrogate(estimator.draws(pair.model, pair.guide)).sum()
    each = torch.cat(torch.autograd.grad(surrogate, pair.parameters), dim=1)
    truth = exact_gradient(Hierarchy(early=True, late=late, subsample=False))
    standard_error = each.std(0) / math.sqrt(n) + 1e-12
    assert ((each.mean(0) - truth).abs() <= limit * standard_error).all()


def test_a_latent_outside_that_follows_one_inside_weighs_with_all_signals():
    """The guide's v depends on every z, so that each z influences all data; Trace_ELBO leaves that out."""
    n, limit = 100_000, -NormalDist().inv_cdf(2e-5 / 6)
    x = torch.tensor([-1.0, 2.0], dtype=F64)
    parameters = [torch.full((n, 1), value, dtype=F64, requires_grad=True) for value in (0.4, 0.3, 0.7)]
    loc, intercept, slope = parameters

    def model():
        v = pyro.sample("v", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z + v, 1.0), obs=x)

    def guide():
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("v", dist.Normal(intercept + slope * z.sum(-1, keepdim=True), 1.0))

    pyro.set_rng_seed(1)
    estimator = Elbo(num_particles=n, use_rep=False)
    surrogate = n * estimator.surrogate(estimator.draws(model, guide)).sum()
    each = torch.cat(torch.autograd.grad(surrogate, parameters), dim=1)
    # -E[z_i^2]/2 twice, -E[v^2]/2 and -E[(x_i - z_i - v)^2]/2 twice, by their means, given Var(z) = 1.
    loc, intercept, slope = values = [number(value) for value in (0.4, 0.3, 0.7)]
    v = intercept + 2 * slope * loc
    bound = -(loc**2) - (v**2 + 2 * slope**2) / 2
    bound = bound - sum((datum - loc - v) ** 2 + (1 + slope) ** 2 + slope**2 for datum in x) / 2
    truth = torch.stack(torch.autograd.grad(bound, values))
    assert ((each.mean(0) - truth).abs() <= limit * each.std(0) / math.sqrt(n)).all()


# Importance weights of all data together


class InEvents(Hierarchy):
    """The same pair with its data declared as events of a single datum."""

    def model(self) -> None:
        with pyro.plate("one", 1):
            w = pyro.sample("w", self.family(self.x.new_zeros(()), 1.5))[..., None]
            y = torch.tensor(0.7, dtype=F64)
            pyro.sample("y", dist.Normal(self.t * w, 0.8).to_event(1), obs=y.expand(1, 1))
            z = pyro.sample("z", self.family(w.expand(*w.shape[:-1], 6), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + self.t * w, 0.5).to_event(1), obs=self.x[None])
            pyro.factor("penalty", -0.1 * (z**2).sum(-1) - self.t**2)

    def guide(self) -> None:
        with pyro.plate("one", 1):
            w = pyro.sample("w", self.family(self.m, self.rho.exp()))[..., None]
            pyro.sample("z", self.family(self.a * w + self.c * self.x, self.s.exp()).to_event(1))


WEIGHTED = [
    (name, use_rep)
    for name, family in ESTIMATORS.items()
    for use_rep in family.gradients
    if family.importance_weighted
]


@pytest.mark.parametrize("particles", [1, 4])
@pytest.mark.parametrize(("name", "use_rep"), WEIGHTED)
def test_importance_weights_with_a_latent_outside_are_those_of_one_large_datum(name, use_rep, particles):
    pair = Hierarchy(early=True, late=True, subsample=False)
    twin = InEvents()
    estimator = ESTIMATORS[name](num_particles=max(particles, ESTIMATORS[name].particles[0]), use_rep=use_rep)
    assert_same(
        estimator, estimator, (pair.model, pair.guide), pair.parameters,
        (twin.model, twin.guide), twin.parameters,
    )  # fmt: skip


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_importance_weights_with_a_latent_outside_equal_pyro(alpha):
    pair = Hierarchy(early=True, subsample=False)
    assert_same(
        Renyi(alpha=alpha, num_particles=3), many(RenyiELBO, 3, alpha=alpha), (pair.model, pair.guide),
        pair.parameters,
    )  # fmt: skip


def conjugate(x: torch.Tensor):
    """w ~ N(0, 1), z_i ~ N(w, 1), x_i ~ N(z_i, 1) and the exact posterior; log p(x)."""
    n = len(x)
    precision = 1 + n / 2

    def model():
        w = pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", n):
            z = pyro.sample("z", dist.Normal(w, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide():
        w = pyro.sample("w", dist.Normal(x.sum() / 2 / precision, precision**-0.5))
        with pyro.plate("data", n):
            pyro.sample("z", dist.Normal((w + x) / 2, 0.5**0.5))

    covariance = 2 * torch.eye(n, dtype=F64) + 1
    return model, guide, dist.MultivariateNormal(x.new_zeros(n), covariance).log_prob(x).item()


@pytest.mark.parametrize("name", [n for n, f in ESTIMATORS.items() if f.needs_density])
def test_the_bound_is_log_evidence_at_an_exact_posterior_with_a_latent_outside(name):
    model, guide, log_evidence = conjugate(torch.linspace(-2, 1, 5, dtype=F64))
    if name in ("measure-valued", "disarm", "enumerate"):
        with pytest.raises(ValueError, match=r"\Aexpected site 'w' in one plate.* got none: use .*\Z"):
            ESTIMATORS[name]().loss_and_grads(model, guide)
    elif name != "analytic-kl":  # whose KL is not that of the posterior draw by draw
        assert ESTIMATORS[name]().loss(model, guide) == pytest.approx(-log_evidence)


class Penalised:
    """Data of their own, and a penalty outside the plate: before it, after it, on z after it, or none."""

    def __init__(self, penalty: str):
        self.penalty, self.weight = penalty, number(0.3)
        self.parameters = [self.weight]
        self.x = torch.linspace(-1, 1, 4, dtype=F64)

    def model(self) -> None:
        if self.penalty == "before":
            pyro.factor("penalty", -(self.weight**2))
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(self.x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=self.x)
        if self.penalty == "after":
            pyro.factor("penalty", -(self.weight**2))
        elif self.penalty == "on z":
            pyro.factor("penalty", -self.weight * (z**2).sum(-1, keepdim=True))
        elif self.penalty == "by a number":
            pyro.factor("penalty", torch.tensor(z.sum().item(), dtype=F64) - self.weight**2)

    def guide(self) -> None:
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Normal(self.x / 3, 1.0))

    def draws(self, estimator):
        pyro.set_rng_seed(0)
        return estimator.draws(self.model, self.guide)


@pytest.mark.parametrize("place", ["before", "after"])
def test_an_observation_outside_that_no_latent_influences_leaves_the_weights_to_each_datum(place):
    alone, penalised = Penalised("none"), Penalised(place)
    for estimator in (Iwae(num_particles=5), Renyi(num_particles=5), Dreg(num_particles=5)):
        expected, draws = estimator.bound(alone.draws(estimator)), penalised.draws(estimator)
        torch.testing.assert_close(estimator.bound(draws), expected - penalised.weight**2 / 4)
        (gradient,) = torch.autograd.grad(estimator.surrogate(draws).sum(), penalised.weight)
        torch.testing.assert_close(gradient, -2 * penalised.weight.detach())


@pytest.mark.parametrize("family", [MeasureValued, RunningMean])
def test_a_penalty_before_the_plate_is_taken_by_all(family):
    losses = [Penalised(place) for place in ("none", "before")]
    alone, penalised = (family().bound(pair.draws(family())).sum() for pair in losses)
    torch.testing.assert_close(penalised, alone - 0.3**2)


def test_an_observation_outside_that_latents_influence_has_the_weights_of_all_data():
    pair = Penalised("on z")
    assert_same(Iwae(num_particles=3), many(RenyiELBO, 3, alpha=0.0), (pair.model, pair.guide), pair.parameters)
    for place, data in (("on z", 1), ("by a number", 1), ("after", 4)):  # one particle, for the number's sake
        assert len(Iwae().bound(Penalised(place).draws(Iwae()))) == data


def test_latents_outside_that_depend_on_none_inside_leave_each_datum_its_own_signal():
    loc, rho, x = number(0.2), number(-0.3), torch.linspace(-1, 1, 5, dtype=F64)
    normal = NonreparameterizedNormal

    def model():
        pyro.sample("first", normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", 5):
            z = pyro.sample("z", normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        pyro.sample("last", normal(x.new_zeros(()), 1.0))

    def guide():
        pyro.sample("last", normal(x.new_ones(()), 2.0))
        with pyro.plate("data", 5):
            pyro.sample("z", normal(loc, rho.exp()))
        pyro.sample("first", normal(x.new_ones(()), 2.0))

    assert_same(Elbo(use_rep=False), TraceGraph_ELBO(), (model, guide), [loc, rho])


# Several plates, and none


def plated(inner: str, family=dist.Normal, latent_inside: bool = False):
    """z in 3 x 4 cells or in 3 alone, and data in all cells."""
    loc, rho, t = parameters = [number(value) for value in (0.2, -0.5, 0.7)]
    x = torch.linspace(-1, 2, 12, dtype=F64).reshape(4, 3)

    def plates():
        size, dim = 8 if inner == "subsampled" else 4, None if inner == "sequential" else -2
        return pyro.plate("outer", 3, dim=-1), pyro.plate("inner", size, subsample=torch.arange(4), dim=dim)

    def latent(outer, cells, fn):
        with outer, cells if latent_inside else contextlib.nullcontext():
            return pyro.sample("z", fn)

    def model():
        outer, cells = plates()
        z = latent(outer, cells, family(x.new_zeros(()), 1.0))
        with outer:
            if inner == "sequential":
                for i in cells:
                    pyro.sample(f"x{i}", dist.Normal(t * z, 0.5), obs=x[i])
            else:
                with cells:
                    pyro.sample("x", dist.Normal(t * z, 0.5), obs=x)

    def guide():
        latent(*plates(), family(loc, rho.exp()))

    return model, guide, parameters


@pytest.mark.parametrize("use_rep", [True, False])
@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize(
    ("inner", "latent_inside"),
    [("whole", False), ("subsampled", False), ("sequential", False), ("whole", True), ("subsampled", True)],
)
def test_nested_plates_equal_pyro(use_rep, particles, inner, latent_inside):
    model, guide, parameters = plated(inner, NORMALS[use_rep], latent_inside)
    ours = Elbo(num_particles=particles, use_rep=use_rep, max_plate_nesting=2)
    assert_same(ours, many(Trace_ELBO, particles, 2), (model, guide), parameters)


@pytest.mark.parametrize("latent_inside", [True, False])
def test_importance_weights_of_nested_plates_equal_pyro(latent_inside):
    model, guide, parameters = plated("whole", latent_inside=latent_inside)
    ours = Iwae(num_particles=3, max_plate_nesting=2)
    assert_same(ours, many(RenyiELBO, 3, 2, alpha=0.0), (model, guide), parameters)


@pytest.mark.parametrize("latent_inside", [True, False])
def test_a_learned_baseline_sees_the_data_of_each_cell(latent_inside):
    model, guide, _ = plated("whole", latent_inside=latent_inside)
    estimator = LearnedBaseline(num_particles=2, max_plate_nesting=2)
    x = torch.linspace(-1, 2, 12, dtype=F64).reshape(4, 3)
    expected = x.reshape(-1, 1) if latent_inside else x.T
    torch.testing.assert_close(estimator.draws(model, guide).observations, expected)
    assert math.isfinite(estimator.loss_and_grads(model, guide))


def siblings(family=dist.Normal, sizes: tuple = (3, 2)):
    """Two plates beside each other; without sizes none, and the data are events."""
    loc, rho, t = parameters = [number(value) for value in (0.2, -0.5, 0.7)]

    def place(name, fn, plate, **settings):
        with plate or contextlib.nullcontext():
            return pyro.sample(name, fn if plate else fn.to_event(1), **settings)

    def model():
        for name, size in (("first", 3), ("second", 2)):
            plate = pyro.plate(name, size) if sizes else None
            z = place(f"{name}_z", family(t.new_zeros(size), 1.0), plate)
            x = torch.linspace(-1, 1, size, dtype=F64)
            place(f"{name}_x", dist.Normal(t * z, 0.5), plate, obs=x)

    def guide():
        for name, size in (("first", 3), ("second", 2)):
            place(f"{name}_z", family(loc.expand(size), rho.exp()), pyro.plate(name, size) if sizes else None)

    return model, guide, parameters


@pytest.mark.parametrize("sizes", [(3, 2), ()])
def test_several_plates_and_none_equal_pyro(sizes):
    model, guide, parameters = siblings(sizes=sizes)
    for estimator in (Elbo(), Elbo(num_particles=3)):
        assert_same(estimator, many(Trace_ELBO, estimator.num_particles), (model, guide), parameters)
    assert_same(Iwae(num_particles=3), many(RenyiELBO, 3, alpha=0.0), (model, guide), parameters)


def test_all_data_of_several_plates_are_one_datum_for_the_score_function():
    apart, (model, guide, parameters) = siblings(), siblings(sizes=())
    for name, use_rep in (("elbo", False), ("rloo", False), ("vimco", False), ("dreg", True)):
        estimator = ESTIMATORS[name](num_particles=4, use_rep=use_rep)
        assert_same(estimator, estimator, apart[:2], apart[2], (model, guide), parameters)


@pytest.mark.parametrize("family", [Elbo, Rloo])
def test_the_score_function_is_unbiased_where_plates_cross(family):
    """Bits outside, in either plate and in both: nine KLs, all of one number.

    Two-sided limits at a false-alarm rate of 1e-6 each. Power: 3 % of the gradient.
    """
    n, p = 100_000, torch.tensor(0.27, dtype=F64)
    q = torch.full((n, 1, 1), 0.75, dtype=F64, requires_grad=True)

    def program(probability):
        outer, inner = pyro.plate("outer", 2, dim=-1), pyro.plate("inner", 2, dim=-2)
        pyro.sample("w", dist.Bernoulli(probability))
        with outer:
            pyro.sample("x", dist.Bernoulli(probability))
        with inner:
            pyro.sample("y", dist.Bernoulli(probability))
        with outer, inner:
            pyro.sample("z", dist.Bernoulli(probability))

    pyro.set_rng_seed(1)
    estimator = family(num_particles=n, use_rep=False, max_plate_nesting=2)
    surrogate = n * estimator.surrogate(estimator.draws(lambda: program(p), lambda: program(q))).sum()
    (each,) = torch.autograd.grad(surrogate, q)
    one = number(0.75)
    kl = 9 * torch.distributions.kl_divergence(dist.Bernoulli(one), dist.Bernoulli(p))
    (expected,) = torch.autograd.grad(-kl, one)
    assert (each.mean() - expected).abs() < 4.9 * each.std() / math.sqrt(n)
    assert 4.9 * each.std() / math.sqrt(n) < 0.03 * expected.abs()


def test_a_pair_without_latent_sites_is_that_of_maximum_likelihood():
    loc, x = number(0.3), torch.linspace(-1, 1, 4, dtype=F64)

    def model():
        with pyro.plate("data", 4):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    for use_rep in (True, False):
        for particles in (1, 3):
            ours = Elbo(num_particles=particles, use_rep=use_rep)
            assert_same(ours, many(Trace_ELBO, particles), (model, lambda: None), [loc])
        assert_same(AnalyticKL(use_rep=use_rep), Trace_ELBO(), (model, lambda: None), [loc])


def test_a_penalty_outside_without_latent_sites_counts_once():
    loc, x = number(0.3), torch.linspace(-1, 1, 4, dtype=F64)

    def model():
        with pyro.plate("data", 4):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        pyro.factor("penalty", -(loc**2))

    for estimator in (Elbo(use_rep=False), AnalyticKL(), AnalyticKL(use_rep=False), RunningMean(), Rloo()):
        assert_same(estimator, Trace_ELBO(), (model, lambda: None), [loc])


def test_a_model_that_observes_nothing_is_a_density_to_approach():
    loc, rho = number(0.3), number(-0.5)

    def program(loc, scale):
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Normal(loc, scale))

    pair = (lambda: program(loc.new_zeros(()), 2.0)), (lambda: program(loc, rho.exp()))
    for particles in (1, 3):
        twin = many(Trace_ELBO, particles)
        assert_same(Elbo(num_particles=particles), twin, pair, [loc, rho])
    exact = 4 * torch.distributions.kl_divergence(dist.Normal(loc, rho.exp()), dist.Normal(0.0, 2.0))
    torch.testing.assert_close(AnalyticKL().differentiable_loss(*pair), exact)
    assert math.isfinite(Rloo().loss_and_grads(*pair))


# Refusals


def test_several_particles_refuse_a_plate_that_is_in_their_way():
    model, guide, _ = plated("whole")
    refusal = r"\Aexpected no plate at .* several particles .* 'inner' at dim -2: pass max_plate_nesting=2 .*\Z"
    with pytest.raises(ValueError, match=refusal):
        Elbo(num_particles=2).loss(model, guide)

    def nested():  # Pyro gives the inner plate the next dimension that is free
        with pyro.plate("outer", 3), pyro.plate("inner", 4):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    def model():
        nested()
        pyro.factor("nothing", torch.tensor(0.0))

    with pytest.raises(
        ValueError, match=r"\Aexpected no plate at .* 'inner' at dim -3: pass max_plate_nesting=2"
    ):
        Elbo(num_particles=2).loss(model, nested)
    with pytest.raises(ValueError, match=r"\Aexpected max_plate_nesting >= 1.*got 0\Z"):
        Elbo(max_plate_nesting=0)


def with_plates(first: str, second: str, size: int | None = 3, events: int = 0):
    """A pair whose z stands in a plate of each name."""

    def program(name: str, size: int | None, events: int, observe: bool):
        with pyro.plate(name, size, subsample=size and torch.arange(3)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3, *[1] * events), 1.0).to_event(events))
            if observe:
                pyro.sample("x", dist.Normal(z.reshape(-1, 3), 1.0), obs=torch.zeros(3))

    return (lambda: program(first, 3, 0, True)), (lambda: program(second, size, events, False))


@pytest.mark.parametrize(
    ("estimator", "pair", "message"),
    [
        (
            Iwae(num_particles=2),
            (Hierarchy().model, Hierarchy().guide),
            "expected no subsampling for Iwae where",
        ),
        (
            Iwae(num_particles=2),
            with_plates("a", "b"),
            r"expected site 'z' in the same plates .*\['a'\].*\['b'\]",
        ),
        (Elbo(), with_plates("a", "a", None), "expected a size for plate 'a'"),
        (Elbo(), with_plates("a", "a", 6), "expected plate 'a' to have one size .* 3 of 6 .* and 3 of 3 .*"),
        (Elbo(), with_plates("a", "a", 3, 1), r"expected one event shape at site 'z'.*\(\) .*\(1,\)"),
        (DisArm(max_plate_nesting=2), plated("whole")[:2], "expected site 'x' in one plate.*'inner': -2"),
        (Enumerate(), siblings()[:2], r"expected one plate, over the data, for Enumerate, got \['first'"),
        (MeasureValued(), siblings(sizes=())[:2], "expected site 'first_z' in one plate.*got none"),
    ],
    ids=["subsampled", "names", "no size", "sizes", "events", "nested", "siblings", "none"],
)
@pytest.mark.parametrize("validated", [True, False])
def test_what_is_refused_is_refused_in_one_line_whether_validated_or_not(estimator, pair, message, validated):
    with pyro.validation_enabled(validated), pytest.raises(ValueError, match=rf"\A{message}.*\Z"):
        estimator.loss_and_grads(*pair)


def test_a_dimension_that_no_plate_declares_is_refused():
    def program(observe: bool):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))
        if observe:
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(3))

    for validated in (True, False):
        with (
            pyro.validation_enabled(validated),
            pytest.raises(
                ValueError, match=r"\Aexpected values of shape \(1,\) at sample site 'x'.*\(3,\).*\Z"
            ),
        ):
            Elbo().loss(lambda: program(True), lambda: program(False))

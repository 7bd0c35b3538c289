"""Scales, masks, factors and observed values of every kind that Pyro's handlers and distributions give."""

import contextlib
import math
from statistics import NormalDist

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from torch import Tensor

from pyrovae.estimators import (
    ESTIMATORS,
    DisArm,
    Dreg,
    Elbo,
    Enumerate,
    Iwae,
    LearnedBaseline,
    MeasureValued,
    Rloo,
    RunningMean,
    StickingTheLanding,
)
from pyrovae.programs.graphs import capture
from tests.linear_gaussian import given_noise, grid

F64 = torch.float64
LIMIT = -NormalDist().inv_cdf(2e-5 / 800)  # in standard errors, as in test_estimators
OF_WEIGHTS = [name for name, family in ESTIMATORS.items() if family.importance_weighted]


def normals(*, latent=None, observed=None, of_guide="latent", n=4, q=None):
    """z ~ N(0, 1), x ~ N(z, 1) at x = 1, with handlers around the sites; the guide has those of the latent."""
    handlers = {"latent": latent, "observed": observed}
    handlers["guide"] = latent if of_guide == "latent" else of_guide
    x = torch.ones(n, dtype=F64)
    loc = torch.full((n,), 0.3, dtype=F64, requires_grad=True)

    def within(name):
        return contextlib.nullcontext() if handlers[name] is None else handlers[name]()

    def model():
        with pyro.plate("data", n):
            with within("latent"):
                z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            with within("observed"):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide():
        with pyro.plate("data", n), within("guide"):
            pyro.sample("z", dist.Normal(loc, 0.8) if q is None else q(loc, 0.8 + 0 * loc))

    return model, guide, loc


def scaled(value):
    return lambda: poutine.scale(scale=value)


def masked(value):
    return lambda: poutine.mask(mask=value)


SOME = torch.tensor([True, True, False, True])

# Importance weights


@pytest.mark.parametrize("name", OF_WEIGHTS)
@pytest.mark.parametrize(
    "one",
    [1.0, torch.ones(()), torch.ones(4, dtype=F64), torch.ones(1, 4)],
    ids=["number", "tensor", "each", "row"],
)
def test_importance_weights_may_be_scaled_by_one(name, one):
    results = []
    for handler in (None, scaled(one)):
        pyro.set_rng_seed(0)
        results.append(ESTIMATORS[name](num_particles=3).loss(*normals(latent=handler, observed=handler)[:2]))
    assert results[0] == pytest.approx(results[1], rel=1e-12)


@pytest.mark.parametrize("name", OF_WEIGHTS)
@pytest.mark.parametrize(
    "other",
    [2.0, torch.tensor(0.5), torch.tensor([1.0, 1.0, 1.5, 1.0]), torch.tensor([[1.0], [1.0], [2.0]])],
    ids=["number", "tensor", "one datum", "one particle"],
)
@pytest.mark.parametrize("where", ["latent", "observed", "of_guide"])
def test_importance_weights_refuse_a_scale_anywhere(name, other, where):
    estimator = ESTIMATORS[name](num_particles=3)
    message = rf"\Aexpected beta = 1 for {type(estimator).__name__}: .*\Z"
    with pytest.raises(ValueError, match=message):
        estimator.loss(*normals(**{"of_guide": None} | {where: scaled(other)})[:2])


def test_a_plate_s_own_scale_is_no_weight_when_it_is_rounded():
    x = torch.zeros(3)

    def program(observe):
        with pyro.plate("data", 1000, subsample=torch.arange(3)), poutine.scale(scale=torch.ones(3)):
            z = pyro.sample("z", dist.Normal(x, 1.0))
            if observe:
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    assert math.isfinite(Iwae(num_particles=2).loss(lambda: program(True), lambda: program(False)))


@pytest.mark.parametrize("name", OF_WEIGHTS)
@pytest.mark.parametrize(
    ("in_model", "in_guide", "agree"),
    [
        (SOME, SOME, True),
        (SOME, SOME.clone(), True),
        (None, torch.ones(4, dtype=bool), True),
        (True, None, True),
        (False, torch.zeros(4, dtype=bool), True),
        (SOME, None, False),
        (None, SOME, False),
        (SOME, ~SOME, False),
        (True, False, False),
    ],
)
def test_importance_weights_need_one_mask_in_model_and_guide(name, in_model, in_guide, agree):
    handlers = [None if mask is None else masked(mask) for mask in (in_model, in_guide)]
    model, guide, _ = normals(latent=handlers[0], of_guide=handlers[1])
    message = r"\Aexpected one mask at site 'z' in model and guide for .*\Z"
    with contextlib.nullcontext() if agree else pytest.raises(ValueError, match=message):
        assert math.isfinite(ESTIMATORS[name](num_particles=2).loss(model, guide))


def test_masks_of_distributions_are_masks():
    model, guide, _ = normals(latent=masked(SOME), of_guide=None, q=lambda *args: dist.Normal(*args).mask(SOME))
    draws = Iwae(num_particles=2).draws(model, guide)
    expected = dist.Normal(0.3, 0.8).log_prob(draws.guide_sites["z"]["value"])
    torch.testing.assert_close(draws.log_guide, torch.where(SOME, expected, 0.0))


@pytest.mark.parametrize("estimator", [Iwae(num_particles=3), Dreg(num_particles=3)])
def test_a_padded_datum_is_none(estimator):
    """Where everything is masked out, the bound is 0 and there is no gradient; the others are as they were."""
    results = []
    for handler in (None, masked(SOME)):
        model, guide, loc = normals(latent=handler, observed=handler)
        pyro.set_rng_seed(0)
        draws = estimator.draws(model, guide)
        (gradient,) = torch.autograd.grad(estimator.surrogate(draws).sum(), loc)
        results.append(torch.stack([estimator.bound(draws), gradient]))
    torch.testing.assert_close(results[1], torch.where(SOME, results[0], 0.0))


def test_a_scale_that_is_a_tensor_is_captured():
    """It cannot be looked at in a trace, but it has been, in the run before it."""
    model, guide, loc = normals(latent=scaled(torch.ones(4, dtype=F64)), observed=scaled(torch.ones(())))
    pyro.param("loc", loc)
    bound_guide = lambda: (pyro.param("loc"), guide())[1]  # noqa: E731
    step = capture(model, bound_guide, Iwae(num_particles=2), backend=lambda graph, inputs: graph)
    for seed in range(3):
        pyro.set_rng_seed(seed)
        got = step()
        pyro.set_rng_seed(seed)
        assert got.item() == pytest.approx(Iwae(num_particles=2).loss(model, guide), rel=1e-12)
    assert step.reason == ""
    model, guide, loc = normals(latent=scaled(torch.full((), 2.0)))
    pyro.clear_param_store()
    pyro.param("loc", loc)
    step = capture(model, bound_guide, Iwae(num_particles=2), backend=lambda graph, inputs: graph)
    with pytest.raises(ValueError, match=r"\Aexpected beta = 1 for Iwae"):
        step()


# The score function under masks and scales


NODES, WEIGHTS = grid(1, 20)
GAUSSIAN_MASKS = {
    "around the site": {"of_guide": masked(False)},
    "a tensor": {"of_guide": masked(torch.zeros((), dtype=bool))},
    "in the distribution": {"of_guide": None, "q": lambda q: q.mask(False)},
    "inside to_event": {"of_guide": None, "q": lambda q: q.mask(False).to_event(0)},
}


@pytest.mark.parametrize("name", GAUSSIAN_MASKS)
@pytest.mark.parametrize("estimator", [Elbo(use_rep=False), RunningMean(), LearnedBaseline()])
def test_a_masked_latent_has_its_score(name, estimator):
    """The objective without the latent's densities: E_q[log N(x; z, 1)], of gradient x - loc."""
    settings = dict(GAUSSIAN_MASKS[name])
    mask = settings.pop("q", lambda q: q)
    family = given_noise(NODES)
    model, guide, loc = normals(
        latent=masked(False), n=len(WEIGHTS), q=lambda *args: mask(family(*args)), **settings
    )
    draws = estimator.draws(model, guide)
    (gradient,) = torch.autograd.grad(estimator.surrogate(draws).sum(), loc)
    assert (gradient @ WEIGHTS).item() == pytest.approx(1 - 0.3, abs=1e-9)


@pytest.mark.parametrize("mask", [lambda q: q.mask(False), lambda q: q.mask(False).to_event(0)])
def test_a_masked_latent_has_measure_valued_gradients(mask):
    n = 20_000
    model, guide, loc = normals(
        latent=masked(False), n=n, q=lambda *args: mask(dist.Normal(*args)), of_guide=None
    )
    (gradient,) = torch.autograd.grad(-MeasureValued().differentiable_loss(model, guide), loc)
    # Power: the limit is 4 % of a standard deviation of one datum's gradient.
    assert abs(gradient.mean() - (1 - 0.3)) < LIMIT * gradient.std() / math.sqrt(n)


def codes(of_guide, inside=lambda q: q):
    """Two bits z, of which x ~ N(z1 + 2 z2, 1) is observed at 1; the guide's density does not count."""
    logits = torch.tensor([0.4, -0.8], dtype=F64).expand(3, 2).clone().requires_grad_()

    def model():
        with pyro.plate("data", 3):
            with poutine.mask(mask=False):
                z = pyro.sample("z", dist.Bernoulli(torch.full((2,), 0.5, dtype=F64)).to_event(1))
            pyro.sample(
                "x", dist.Normal(z @ torch.tensor([1.0, 2.0], dtype=F64), 1.0), obs=torch.ones(3, dtype=F64)
            )

    def guide():
        with pyro.plate("data", 3), contextlib.nullcontext() if of_guide is None else of_guide():
            pyro.sample("z", inside(dist.Bernoulli(logits=logits).to_event(1)))

    p = logits[0].detach().sigmoid().requires_grad_()
    states = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=F64)] * 2)
    chances = (states * p + (1 - states) * (1 - p)).prod(-1)
    log_lik = dist.Normal(states @ torch.tensor([1.0, 2.0], dtype=F64), 1.0).log_prob(torch.ones((), dtype=F64))
    bound = chances @ log_lik
    (slope,) = torch.autograd.grad(bound, p)
    return model, guide, logits, bound.detach(), slope * (p * (1 - p)).detach()


@pytest.mark.parametrize("masks", [(masked(False), lambda q: q), (None, lambda q: q.mask(False))])
def test_enumeration_weighs_codes_by_their_chances_whatever_is_masked(masks):
    model, guide, logits, bound, slope = codes(*masks)
    draws = Enumerate().draws(model, guide)
    torch.testing.assert_close(Enumerate().bound(draws), bound.expand(3))
    (gradient,) = torch.autograd.grad(Enumerate().surrogate(draws).sum(), logits)
    torch.testing.assert_close(gradient, slope.expand(3, 2))


def test_pairs_of_codes_whose_density_is_masked_still_learn():
    model, guide, logits, *_ = codes(None, lambda q: q.mask(False))
    (gradient,) = torch.autograd.grad(DisArm(num_particles=64).differentiable_loss(model, guide), logits)
    assert gradient.abs().min() > 0


def test_antithetic_pairs_of_a_masked_distribution():
    model, guide, _ = normals(latent=masked(SOME), of_guide=None, q=lambda *args: dist.Normal(*args).mask(SOME))
    z = Elbo(num_particles=2, antithetic=True).draws(model, guide).guide_sites["z"]["value"]
    torch.testing.assert_close(z[0] + z[1], torch.full((4,), 0.6, dtype=F64))


@pytest.mark.parametrize("handler", [scaled(torch.tensor([2.0, 0.5, 1.0, 3.0]).double()), masked(SOME)])
def test_a_path_derivative_is_scaled_and_masked(handler):
    """Sticking the landing is the total derivative without beta times the score."""
    gradients = []
    for estimator in (Elbo(), StickingTheLanding()):
        model, guide, loc = normals(latent=handler)
        pyro.set_rng_seed(0)
        draws = estimator.draws(model, guide)
        gradients.append(torch.autograd.grad(estimator.surrogate(draws).sum(), loc, retain_graph=True)[0])
    weight = draws.log_guide.detach() / dist.Normal(0.3, 0.8).log_prob(draws.guide_sites["z"]["value"]).detach()
    (score,) = torch.autograd.grad(draws.score.sum(), loc)
    torch.testing.assert_close(gradients[1] - gradients[0], weight[0] * score)


# What is observed


def observing(observe):
    """A pair whose model observes in the plate what `observe(z, x)` samples."""
    x = torch.arange(4.0, dtype=F64)
    loc = torch.full((4,), 0.3, dtype=F64, requires_grad=True)

    def model():
        with pyro.plate("data", 4):
            observe(pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0)), x)

    def guide():
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Normal(loc, 0.8))

    return model, guide


def sample(name: str, loc: Tensor, value: Tensor) -> None:
    pyro.sample(name, dist.Normal(loc, 1.0), obs=value)


def event(z: Tensor, x: Tensor, *particles: int) -> None:
    value = torch.stack([x, -x], -1).expand(*particles, 4, 2)
    pyro.sample("x", dist.Normal(z[..., None], torch.ones(2)).to_event(1), obs=value)


X = torch.arange(4.0, dtype=F64)[:, None]
OBSERVED = {
    "a value": (lambda z, x: sample("x", z, x), X),
    "one value for all": (lambda z, x: sample("x", z, x[1]), X[[1]].expand(4, 1)),
    "integers": (lambda z, x: pyro.sample("x", dist.Poisson(z.exp()), obs=x.long()), X),
    "events": (event, torch.cat([X, -X], 1)),
    "values and a factor": (lambda z, x: (sample("x", z, x), pyro.factor("f", -(z**2))), X),
    "a factor of the data": (lambda z, x: (sample("x", z, x), pyro.factor("f", -x)), X),
    "a factor alone": (lambda z, x: pyro.factor("f", -((z - x) ** 2)), X[:, :0]),
    "a value with a dimension of particles": (lambda z, x: sample("x", z, x[None]), X),
    "one expanded to particles": (lambda z, x: sample("x", z, x.expand(z.shape)), X),
    "events expanded to particles": (lambda z, x: event(z, x, *z.shape[:-1]), torch.cat([X, -X], 1)),
    "one computed from particles": (lambda z, x: (sample("x", z, x), sample("y", 0 * z, z - x)), X),
}


@pytest.mark.parametrize("name", OBSERVED)
def test_observations_are_the_numbers_of_each_datum(name):
    observe, expected = OBSERVED[name]
    draws = RunningMean(num_particles=3).draws(*observing(observe))
    torch.testing.assert_close(draws.observations, expected)


@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("family", [RunningMean, LearnedBaseline])
@pytest.mark.parametrize("name", OBSERVED)
def test_baselines_learn_from_whatever_is_observed(family, name, particles):
    observe, expected = OBSERVED[name]
    estimator = family(num_particles=particles)
    refused = family is LearnedBaseline and not expected.numel()
    message = r"\Aexpected data for a learned baseline, got a model that observes no number .*'running-mean'\Z"
    with pytest.raises(ValueError, match=message) if refused else contextlib.nullcontext():
        for _ in range(2):
            assert math.isfinite(estimator.loss_and_grads(*observing(observe)))


def test_a_factor_takes_part_in_the_signal():
    """By hand: the surrogate's gradient is that of the score with f, the factor included."""
    model, guide = observing(lambda z, x: (sample("x", z, x), pyro.factor("f", -(z**2))))
    draws = Rloo(num_particles=3).draws(model, guide)
    z, x = draws.guide_sites["z"]["value"], X[:, 0]
    log_joint = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(x) - z**2
    torch.testing.assert_close(draws.log_joint, log_joint)
    torch.testing.assert_close(draws.log_weight, log_joint - dist.Normal(0.3, 0.8).log_prob(z))

"""Model and guide are one program with one noise in each step, and leave one trace of it in their buffers."""

import gc
import math
import weakref
from statistics import NormalDist

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.nn.functional import dropout

from pyrovae.estimators import (
    ESTIMATORS,
    Dreg,
    Elbo,
    Enumerate,
    MeasureValued,
    Rws,
    StickingTheLanding,
    StlIwae,
)
from pyrovae.programs.graphs import capture
from pyrovae.runtime.buffers import kept_buffers
from tests.combinations import EXISTING, KINDS, SMALL, several

F64 = torch.float64
LIMIT = -NormalDist().inv_cdf(2e-5 / 800)  # in standard errors, as in test_estimators
# The refined guide runs the decoder too, in its own steps; the other families run what the mean field runs.
RUNS = [way for way in EXISTING if way[2] in KINDS]
RUNS += [(name, name == "elbo", "refined") for name in ("elbo", "measure-valued")]


def norms(vae) -> list[nn.BatchNorm2d]:
    return [module for module in vae.modules() if isinstance(module, nn.BatchNorm2d)]


@pytest.mark.parametrize(("name", "use_rep", "guide"), RUNS)
def test_batch_norm_counts_each_step_once(make_vae, name, use_rep, guide):
    settings = {"network": "cnn", "channels": (2, 4), "guide": guide}
    vae = make_vae(**settings, **SMALL.get(guide, {})).double()
    x = torch.bernoulli(torch.rand(4, 64, dtype=F64))
    estimator = ESTIMATORS[name](num_particles=several(name, 2), use_rep=use_rep)
    for step in (1, 2):
        estimator.loss_and_grads(*vae.pair, x)
        assert norms(vae)
        assert [norm.num_batches_tracked.item() for norm in norms(vae)] == [step] * len(norms(vae))


@pytest.mark.parametrize("guide", ["mean-field", "refined"])
def test_running_statistics_are_those_of_the_samples(make_vae, guide):
    """Measure-valued gradients and a refined guide run the decoder at further points, which do not count."""
    states = []
    for steps, estimator in ((2, Elbo(use_rep=False)), (2, MeasureValued()), (0, MeasureValued())):
        pyro.set_rng_seed(0)
        vae = make_vae(network="cnn", channels=(2, 4), guide=guide, **SMALL.get(guide, {}))
        x = torch.bernoulli(torch.rand(4, 64))
        for step in range(steps):
            pyro.set_rng_seed(step)
            estimator.loss_and_grads(*vae.pair, x)
        states.append([norm.running_mean for norm in norms(vae)] + [norm.running_var for norm in norms(vae)])
    of_elbo, of_measure_valued, untrained = states
    torch.testing.assert_close(of_elbo, of_measure_valued)
    assert not any(torch.equal(a, b) for a, b in zip(of_elbo, untrained, strict=True))


def test_a_refined_guide_leaves_the_running_statistics_of_its_vae_alone(make_vae):
    vae = make_vae(network="cnn", channels=(2, 4), guide="refined", refine_steps=3)
    before = {name: value.clone() for name, value in vae.decoder.state_dict().items()}
    vae.posterior_of(torch.bernoulli(torch.rand(4, 64))).mean.sum().backward()
    for name, value in vae.decoder.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is not None for p in vae.decoder.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_graphs_from_before_and_from_within_run_back_after_buffers_are_set_back(training):
    norm = nn.BatchNorm1d(2, dtype=F64).train(training)
    x, weight = torch.randn(2, 5, 2, dtype=F64), norm.weight
    before = norm(x[0]).square().sum()
    counted = [buffer.clone() for buffer in norm.buffers()]
    with kept_buffers():
        within = norm(x[1]).square().sum()
    assert all(torch.equal(a, b) for a, b in zip(norm.buffers(), counted, strict=True))
    (gradient,) = torch.autograd.grad(before + within, weight)
    alone = [torch.autograd.grad(norm(part).square().sum(), weight)[0] for part in x] if training else None
    assert gradient.any()
    if training:
        torch.testing.assert_close(gradient, sum(alone))


def test_buffers_that_a_module_replaces_are_set_back():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self):
            self.calls = self.calls + 1

    counter = Counter()
    with kept_buffers():
        counter()
        counter()
    assert counter.calls == 0
    counter()
    assert counter.calls == 1


# Noise that programs draw themselves


class Noisy:
    """Three sites, each given those before, whose guide drops out some of its numbers."""

    def __init__(self):
        self.parameters = [
            v.clone().requires_grad_() for v in torch.tensor([0.3, -0.5, 0.7, -0.2, 0.1], dtype=F64)
        ]
        self.kept: list[torch.Tensor] = []  # for each run of the guide
        self.runs = 0

    def model(self):
        self.runs += 1
        with pyro.plate("data", 4):
            a = pyro.sample("a", dist.Normal(torch.zeros(4, dtype=F64), 1.0))
            b = pyro.sample("b", dist.Normal(0.7 * a, 2.0))
            c = pyro.sample("c", dist.Normal(a * b, 1.5))
            pyro.sample("x", dist.Normal(a + b - c, 1.0), obs=torch.ones(4, dtype=F64))

    def densities(self, a, b, kept, parameters):
        loc, rho, slope, intercept, rest = parameters
        return (
            dist.Normal(kept * loc, rho.exp()),
            dist.Normal(kept * slope * a + intercept, rest.exp()),
            dist.Normal(slope * a * b + kept * loc, rho.exp() + 0.1 * a**2),
        )

    def guide(self):
        kept = dropout(torch.ones(4, dtype=F64), 0.5)
        self.kept.append(kept)
        with pyro.plate("data", 4):
            a = pyro.sample("a", self.densities(0, 0, kept, self.parameters)[0])
            b = pyro.sample("b", self.densities(a, 0, kept, self.parameters)[1])
            pyro.sample("c", self.densities(a, b, kept, self.parameters)[2])

    def log_weight_at_fixed_phi(self, draws):
        """log p(x, z) - log q(z) with the guide's parameters cut from the graph, but not z."""
        a, b, c = (draws.guide_sites[name]["value"] for name in "abc")
        (kept,) = self.kept
        qs = self.densities(a, b, kept, [p.detach() for p in self.parameters])
        log_guide = sum(q.log_prob(z) for q, z in zip(qs, (a, b, c), strict=True))
        ps = dist.Normal(0.0, 1.0), dist.Normal(0.7 * a, 2.0), dist.Normal(a * b, 1.5)
        log_prior = sum(p.log_prob(z) for p, z in zip(ps, (a, b, c), strict=True))
        return log_prior + dist.Normal(a + b - c, 1.0).log_prob(torch.ones(4, dtype=F64)) - log_guide


@pytest.mark.parametrize(
    ("estimator", "weigh"),
    [
        (StickingTheLanding(), torch.ones_like),
        (StickingTheLanding(num_particles=3), lambda w: torch.full_like(w, 1 / 3)),
        (StlIwae(num_particles=3), lambda w: w),
        (Dreg(num_particles=3), lambda w: w**2),
        (Rws(num_particles=3, use_rep=True), lambda w: w - w**2),
    ],
)
def test_a_path_derivative_is_that_of_the_noise_that_the_guide_drew(estimator, weigh):
    noisy = Noisy()
    draws = estimator.draws(noisy.model, noisy.guide)
    f = noisy.log_weight_at_fixed_phi(draws)
    by_hand = torch.autograd.grad((weigh(f.detach().softmax(0)) * f).sum(), noisy.parameters, retain_graph=True)
    mine = torch.autograd.grad(estimator.surrogate(draws).sum(), noisy.parameters)
    torch.testing.assert_close(mine, by_hand, rtol=1e-11, atol=1e-11)
    assert (len(noisy.kept), noisy.runs) == (1, 1)
    assert noisy.kept[0].unique().tolist() == [0, 2]


@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name not in ("disarm", "enumerate", "point")])
def test_a_surrogate_runs_each_program_once(name):
    """The measure-valued gradient alone needs the model at further points."""
    runs = {"model": 0, "guide": 0}
    loc = torch.zeros(4, dtype=F64, requires_grad=True)

    def run(program):
        runs[program] += 1
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(loc if program == "guide" else 0 * loc, 1.0))
            if program == "model":
                pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones(4, dtype=F64))

    ESTIMATORS[name]().loss_and_grads(lambda: run("model"), lambda: run("guide"))
    assert runs == {"model": 2 if name == "measure-valued" else 1, "guide": 1}


N, X, AT = 100_000, 0.5, 0.3


def dropped(family):
    """x ~ N(h, 1) where h is 2 z or 0 with equal chances, for N data x = X, with as many parameters AT."""
    parameter = torch.full((N,), AT, dtype=F64, requires_grad=True)

    def model():
        with pyro.plate("data", N):
            prior = dist.Normal(parameter.new_zeros(()), 1.0) if family == "normal" else dist.Bernoulli(0.5)
            h = dropout(pyro.sample("z", prior), 0.5)
            pyro.sample("x", dist.Normal(h, 1.0), obs=torch.full((N,), X, dtype=F64))

    def guide():
        with pyro.plate("data", N):
            q = dist.Normal(parameter, 0.8) if family == "normal" else dist.Bernoulli(logits=parameter)
            pyro.sample("z", q)

    return model, guide, parameter


def assert_unbiased(values, exact):
    # Power: the limit is 1.8 % of a standard deviation of one datum's value.
    assert values.std() > 0.1
    assert abs(values.mean() - exact) < LIMIT * values.std() / math.sqrt(N)


def test_measure_valued_gradients_of_a_model_with_dropout_are_unbiased():
    model, guide, loc = dropped("normal")
    (gradient,) = torch.autograd.grad(-MeasureValued().differentiable_loss(model, guide), loc)
    assert_unbiased(gradient, (X - 2 * AT) - AT)  # of -((X - 2 loc)^2 + X^2) / 4 - loc^2 / 2


def test_enumeration_of_a_model_with_dropout_is_unbiased():
    model, guide, logit = dropped("bernoulli")
    draws = Enumerate().draws(model, guide)
    bound = Enumerate().bound(draws)
    (gradient,) = torch.autograd.grad(bound.sum(), logit)
    q = 1 / (1 + math.exp(-AT))
    without, within = -(X**2) / 2, -(X**2 + (X - 2) ** 2) / 4  # mean log-likelihoods given z = 0 and z = 1
    kl = q * math.log(2 * q) + (1 - q) * math.log(2 * (1 - q))
    assert_unbiased(bound, (1 - q) * without + q * within - 0.5 * math.log(2 * math.pi) - kl)
    assert_unbiased(gradient, q * (1 - q) * (within - without - AT))


@pytest.mark.parametrize(
    "estimator", [Elbo(), StickingTheLanding(), Dreg(num_particles=2), Rws(num_particles=2, use_rep=True)]
)
def test_a_step_is_freed_when_it_is_done(estimator):
    """A graph whose hooks held what it computes would stay for good."""
    noisy = Noisy()
    draws = estimator.draws(noisy.model, noisy.guide)
    estimator.surrogate(draws).sum().backward()
    left = weakref.ref(draws.guide_sites["b"]["value"])
    assert left() is not None
    del draws
    gc.collect()
    assert left() is None


@pytest.mark.parametrize(("estimator", "guide"), [(MeasureValued(), "mean-field"), (Elbo(), "refined")])
def test_captured_steps_count_once_too(make_vae, estimator, guide):
    vae = make_vae((1, 4, 4), network="cnn", channels=(2,), guide=guide, **SMALL.get(guide, {}))
    x = torch.bernoulli(torch.rand(4, 16))
    step = capture(*vae.pair, estimator, x, backend=lambda graph, inputs: graph)
    for number in range(1, 4):  # the first two are compared with the programs
        step(x)
        assert [norm.num_batches_tracked.item() for norm in norms(vae)] == [number] * len(norms(vae))
    assert step.reason == ""

"""Pyro's autoguides and auxiliary sites: against Pyro under the same noise, and guides written by hand."""

import contextlib
import math
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.distributions import transforms
from pyro.infer import SVI, Trace_ELBO
from pyro.infer import autoguide as auto

from pyrovae import gradient_moments
from pyrovae.estimators import (
    ESTIMATORS,
    AnalyticKL,
    Antithetic,
    Dreg,
    Elbo,
    Iwae,
    Reconstruction,
    Rloo,
    StickingTheLanding,
)
from pyrovae.programs.graphs import capture
from pyrovae.programs.pairs import leaves_of
from tests.test_graphs import traced

F64 = torch.float64
X = torch.linspace(-1, 2, 4, dtype=F64)
zero = torch.zeros((), dtype=F64)


def real(x):
    """Latent sites outside the data plate and inside, one of them positive."""
    w = pyro.sample("w", dist.Normal(zero, 1.5))
    t = pyro.sample("t", dist.Gamma(zero + 2.0, zero + 3.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(w, 1.0))
        pyro.sample("x", dist.Normal(z + w, t + 0.5), obs=x)


def simplices(x):
    """Latent sites that have more numbers than their guide has noise."""
    p = pyro.sample("p", dist.Dirichlet(zero.new_ones(3)))
    with pyro.plate("data", len(x)):
        v = pyro.sample("v", dist.Dirichlet(zero.new_ones(2)))
        pyro.sample("x", dist.Normal(v[..., 0] * p[..., 0], 1.0), obs=x)


def listed(model):
    """A list of an autoguide of all but the first site, and one of that."""
    first, *others = [site for site in ("w", "t", "z", "p", "v") if site in poutine.trace(model).get_trace(X)]
    guide = auto.AutoGuideList(model)
    guide.append(auto.AutoNormal(poutine.block(model, expose=[first])))
    guide.append(auto.AutoMultivariateNormal(poutine.block(model, expose=others)))
    return guide


AUTOGUIDES = {
    "normal": auto.AutoNormal,
    "diagonal": auto.AutoDiagonalNormal,
    "multivariate": auto.AutoMultivariateNormal,
    "low rank": partial(auto.AutoLowRankMultivariateNormal, rank=2),
    "iaf": partial(auto.AutoIAFNormal, hidden_dim=[12]),
    "flow": partial(
        auto.AutoNormalizingFlow,
        init_transform_fn=partial(transforms.iterated, 1, transforms.block_autoregressive),
    ),
    "structured": auto.AutoStructured,
    "gaussian": auto.AutoGaussian,
    "list": listed,
}


@pytest.fixture(autouse=True)
def _double():
    """Autoguides make their parameters of the default type."""
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(torch.float32)


def built(name: str, model=real):
    """The autoguide, with its parameters made."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = AUTOGUIDES[name](model)
    guide(X)
    return guide


def loss_and_gradients(estimator, model, guide):
    """Of all in the parameter store, with the same noise each time."""
    pyro.set_rng_seed(1)
    loss = estimator.differentiable_loss(model, guide, X)
    parameters = dict(pyro.get_param_store().named_parameters())
    gradients = torch.autograd.grad(loss, [*parameters.values()], allow_unused=True)
    return loss.detach(), dict(zip(parameters, gradients, strict=True))


def pyro_elbo(particles: int) -> Trace_ELBO:
    return Trace_ELBO(num_particles=particles, vectorize_particles=True, max_plate_nesting=1)


@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("model", [real, simplices])
@pytest.mark.parametrize("name", AUTOGUIDES)
def test_the_elbo_of_an_autoguide_is_that_of_pyro(name, model, particles):
    guide = built(name, model)
    theirs = loss_and_gradients(pyro_elbo(particles), model, guide)
    mine = loss_and_gradients(Elbo(num_particles=particles), model, guide)
    torch.testing.assert_close(mine[0], theirs[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(mine[1], theirs[1], rtol=1e-8, atol=1e-10)
    assert all(gradient is not None for gradient in theirs[1].values())


def by_hand(x):
    """What AutoNormal of `real` is, without auxiliary sites."""

    def normal(name: str) -> tuple:
        store = pyro.get_param_store()
        return store[f"AutoNormal.locs.{name}"], store[f"AutoNormal.scales.{name}"]

    pyro.sample("w", dist.Normal(*normal("w")))
    pyro.sample("t", dist.LogNormal(*normal("t")))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(*normal("z")))


@pytest.mark.parametrize(
    ("name", "use_rep"),
    [(n, use_rep) for n, family in ESTIMATORS.items() for use_rep in family.gradients if family.needs_density],
)
def test_auxiliary_sites_make_no_difference_to_any_estimator(name, use_rep):
    guide = built("normal")
    estimator = ESTIMATORS[name](use_rep=use_rep)
    if name in ("measure-valued", "disarm", "enumerate"):
        with pytest.raises(ValueError, match=r"\Aexpected .* in one plate.*\Z"):
            estimator.loss_and_grads(real, guide, X)
        return
    warned = pytest.warns(UserWarning, match="KL at site 't' is taken from samples")
    for particles in {estimator.num_particles, 4}:
        with warned if name == "analytic-kl" else contextlib.nullcontext():
            mine, theirs = (
                loss_and_gradients(ESTIMATORS[name](num_particles=particles, use_rep=use_rep), real, program)
                for program in (guide, by_hand)
            )
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["diagonal", "flow"])
def test_the_kl_of_an_autoguide_of_all_sites_together_has_no_closed_form(name):
    with pytest.raises(ValueError, match=r"\Aexpected a closed-form KL.*use the estimator 'elbo'\Z"):
        AnalyticKL().loss(real, built(name), X)


@pytest.mark.parametrize("name", ["diagonal", "multivariate"])
def test_the_score_of_a_joint_guide_is_multiplied_by_the_signal_of_all_data(name):
    guide, estimator = built(name), Elbo(num_particles=3, use_rep=False)
    _, gradients = loss_and_gradients(estimator, real, guide)
    pyro.set_rng_seed(1)
    draws = estimator.draws(real, guide, X)
    u = draws.guide_sites[f"_{type(guide).__name__}_latent"]["value"][:, 0]  # of each particle
    score = guide.get_posterior().log_prob(u)
    t = u[:, 1].exp()
    log_joint = dist.Normal(zero, 1.5).log_prob(u[:, 0]) + dist.Gamma(2.0, 3.0).log_prob(t) + u[:, 1]
    log_joint = log_joint + dist.Normal(u[:, :1], 1.0).log_prob(u[:, 2:]).sum(1)
    log_joint = log_joint + dist.Normal(u[:, 2:] + u[:, :1], t[:, None] + 0.5).log_prob(X).sum(1)
    surrogate = ((log_joint - score).detach() * score).mean()
    parameters = dict(pyro.get_param_store().named_parameters())
    expected = torch.autograd.grad(-surrogate, [*parameters.values()])
    torch.testing.assert_close(gradients, dict(zip(parameters, expected, strict=True)))


@pytest.mark.parametrize("estimator", [StickingTheLanding(), Dreg(), Iwae(use_rep=False)])
def test_what_scores_given_points_refuses_a_flow_without_inverse(estimator):
    with pytest.raises(ValueError, match=r"\Aexpected a density at any given point .*no inverse.*\Z"):
        estimator.loss_and_grads(real, built("flow"), X)


def test_antithetic_particles_of_an_autoguide_are_mirror_images():
    guide = built("diagonal")
    u = Antithetic().draws(real, guide, X).guide_sites["_AutoDiagonalNormal_latent"]["value"]
    torch.testing.assert_close(u.mean(0)[0], guide.loc)


@pytest.mark.parametrize("name", ["normal", "low rank", "flow"])
def test_svi_takes_the_steps_of_trace_elbo(name):
    states = []
    for loss in (Elbo(), Trace_ELBO()):
        guide = built(name)
        svi = SVI(real, guide, pyro.optim.Adam({"lr": 1e-2}), loss)
        pyro.set_rng_seed(2)
        losses = [svi.step(X) for _ in range(5)]
        states.append((losses, [p.detach().clone() for p in guide.parameters()]))
    torch.testing.assert_close(*states)


@pytest.mark.parametrize("name", ["normal", "iaf"])
def test_an_autoguide_is_captured_and_measured(name):
    guide = built(name)
    expected = loss_and_gradients(Elbo(), real, guide)
    step = capture(real, guide, Elbo(), X, backend=traced)
    pyro.set_rng_seed(1)
    loss = step(X)
    assert step.reason == ""
    parameters = dict(pyro.get_param_store().named_parameters())
    torch.testing.assert_close((loss, {n: p.grad for n, p in parameters.items()}), expected)
    ours, theirs = (gradient_moments(real, guide, e, X, draws=8) for e in (Elbo(), Trace_ELBO()))
    assert ours.tr_cov() == pytest.approx(theirs.tr_cov(), rel=1e-9)
    assert ours.tr_cov() > 0


# Sites of the guide alone


def pair_with(auxiliary: bool, mapped: bool = False):
    """A guide whose z is a sum of two samples; or in part a point."""

    def model(x=X):
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(zero, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=X)

    def guide(x=X):
        loc = pyro.param("loc", zero.clone())
        with pyro.plate("data", 4):
            infer = {"is_auxiliary": True} if auxiliary else {}
            u = pyro.sample("u", dist.Normal(loc, 1.0), infer=infer)
            if mapped:
                pyro.sample("z", dist.Delta(loc.expand(4)))
            else:
                pyro.sample("z", dist.Normal(u, 0.5))

    return model, guide


def test_an_auxiliary_site_of_any_guide_counts_in_its_density():
    model, guide = pair_with(auxiliary=True)
    for particles in (1, 3):
        pyro.set_rng_seed(0)
        mine = Elbo(num_particles=particles).loss(model, guide)
        pyro.set_rng_seed(0)
        assert mine == pytest.approx(pyro_elbo(particles).loss(model, guide), rel=1e-12)
    assert math.isfinite(Rloo().loss_and_grads(model, guide))


def test_a_factor_in_the_guide_counts_in_its_density():
    model, guide = pair_with(auxiliary=True)

    def with_factor():
        guide()
        pyro.factor("more", pyro.param("loc") ** 2, has_rsample=True)

    losses = []
    for programs in ((model, guide), (model, with_factor)):
        pyro.set_rng_seed(0)
        pyro.get_param_store()["loc"] = zero + 2.0
        losses.append(Elbo().loss(*programs))
    assert losses[1] == pytest.approx(losses[0] + 4)


@pytest.mark.parametrize("use_rep", [True, False])
@pytest.mark.parametrize(
    ("guide", "site"),
    [
        (auto.AutoDelta, "w"),
        (auto.AutoLaplaceApproximation, "_AutoLaplaceApproximation_latent"),
        ("list", "t"),
        ("by hand", "z"),
    ],
)
def test_a_point_mass_is_refused_beside_auxiliary_sites_as_well(guide, site, use_rep):
    if guide == "by hand":
        pair = pair_with(auxiliary=True, mapped=True)
    elif guide == "list":
        guide = auto.AutoGuideList(real)
        guide.append(auto.AutoNormal(poutine.block(real, expose=["w", "z"])))
        guide.append(auto.AutoDelta(poutine.block(real, expose=["t"])))
        pair = real, guide
    else:
        pair = real, guide(real)
    message = rf"\Aexpected a guide with a density for Elbo, got a point mass at site '{site}'.*\Z"
    with pytest.raises(ValueError, match=message):
        Elbo(use_rep=use_rep).loss_and_grads(*pair, X)


@pytest.mark.parametrize("use_rep", [True, False])
def test_a_point_that_is_made_of_another_latent_site_has_no_density(use_rep):
    """The density of w is that of w alone."""

    def guide(x):
        w = pyro.sample("w", dist.Normal(pyro.param("loc", zero), 1.0))
        pyro.sample("t", dist.LogNormal(zero, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(2 * w))

    message = r"\Aexpected a guide with a density for Elbo, got a point mass at site 'z'.*\Z"
    with pytest.raises(ValueError, match=message):
        Elbo(use_rep=use_rep).loss_and_grads(real, guide, X)


def test_a_point_that_is_an_auxiliary_sample_in_another_order_has_no_closed_form():
    """It shares its numbers in memory with the sample, whose KL would be that of other entries."""

    def model():
        pyro.sample("z", dist.Normal(torch.arange(4.0).reshape(2, 2), 1.0).to_event(2))

    def guide():
        scale = pyro.param("scale", torch.ones(2, 2))
        auxiliary = {"is_auxiliary": True}
        u = pyro.sample("u", dist.Normal(zero, scale).to_event(2), infer=auxiliary)
        pyro.sample("z", dist.Delta(u.mT, event_dim=2))

    with pytest.raises(ValueError, match=r"\Aexpected a closed-form KL\(q \|\| p\) at site 'z', got none"):
        AnalyticKL().loss_and_grads(model, guide)


def moments_by_hand(model, guide, draws: int) -> tuple[dict, float]:
    """The mean gradient per datum and the trace of its covariance, of Pyro's loss under the same noise."""
    leaves, gradients = leaves_of(model, guide, X), []
    for draw in range(draws):
        torch.manual_seed(int(np.random.SeedSequence((0, draw)).generate_state(1)[0]))
        loss = Trace_ELBO().differentiable_loss(model, guide, X) / len(X)
        gradients.append(torch.autograd.grad(-loss, leaves.values(), materialize_grads=True))
    found = {n: torch.stack(each) for n, each in zip(leaves, zip(*gradients, strict=True), strict=True)}
    return {n: each.mean(0) for n, each in found.items()}, sum(
        each.var(0).sum().item() for each in found.values()
    )


@pytest.mark.parametrize("name", ["normal", "low rank", "flow"])
def test_moments_of_an_autoguides_gradient_are_those_of_pyros_loss(name):
    guide = built(name)
    mean, trace = moments_by_hand(real, guide, draws=8)
    for estimator in (Elbo(), Trace_ELBO()):
        stats = gradient_moments(real, guide, estimator, X, draws=8)
        torch.testing.assert_close(stats.mean, mean)
        assert stats.tr_cov() == pytest.approx(trace)
        assert stats.tr_cov("encoder") == pytest.approx(trace)


@pytest.mark.parametrize("name", ["normal", "low rank"])
def test_moments_of_an_autoguides_location_are_those_of_theory(name):
    """w ~ N(0, I) in two dimensions, x ~ N(H w, I): the gradient is that of the posterior, -P (w - m), over 4.

    Two-sided limits at a false-alarm rate of 1e-6 each. Power: a factor of two in the mean or the variance.
    """
    inputs = torch.tensor([[1.0, 0.5], [0.2, -1.0], [0.7, 0.3], [-0.4, 1.1]])

    def model(x):
        w = pyro.sample("w", dist.Normal(zero, 1.0).expand([2]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal((w.unsqueeze(-2) * inputs).sum(-1), 1.0), obs=x)

    guide = built(name, model)
    stats = gradient_moments(model, guide, Elbo(), X, draws=128)
    [location] = [n for n in stats.mean if n.startswith("locs.") or n == "loc"]
    precision = torch.eye(2) + inputs.T @ inputs
    spread = guide.get_posterior().covariance_matrix if name == "low rank" else guide.scales.w.square().diag()
    loc = guide.loc if name == "low rank" else guide.locs.w
    expected = -(precision @ loc - inputs.T @ X) / 4
    variance = (precision @ spread @ precision).diagonal() / 16
    assert ((stats.mean[location] - expected).abs() < 4.9 * (variance / 128).sqrt()).all()
    assert (stats.variance[location] / variance - 1).abs().max() < 4.9 * math.sqrt(2 / 128)


def test_a_point_of_an_autoguide_reconstructs():
    guide = auto.AutoDelta(real)
    assert math.isfinite(Reconstruction().loss_and_grads(real, guide, X))


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (
            pair_with(auxiliary=False),
            r"expected .* same latent sites, got \['z'\] .* \['u', 'z'\] .*is_auxiliary",
        ),
        ((pair_with(True)[0],) * 2, "expected a guide that observes nothing, got data at site 'x'"),
    ],
    ids=["unmarked", "observed"],
)
def test_other_sites_of_the_guide_alone_are_refused(pair, message):
    with pytest.raises(ValueError, match=rf"\A{message}.*\Z"):
        Elbo().loss(*pair)


def test_a_guide_that_runs_the_model_is_refused():
    message = r"\Aexpected a guide that samples by itself, got AutoNormalMessenger, which runs the model.*\Z"
    for guide in (auto.AutoNormalMessenger(real), poutine.mask(auto.AutoNormalMessenger(real), mask=True)):
        with pytest.raises(ValueError, match=message):
            Elbo().loss(real, guide, X)


@pytest.mark.parametrize("how", ["parallel", "sequential"])
def test_enumerated_sites_are_refused(how):
    def model():
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Bernoulli(zero + 0.5))
            pyro.sample("x", dist.Normal(z, 1.0), obs=X)

    def guide():
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Bernoulli(zero + 0.4), infer={"enumerate": how})

    message = rf"\Aexpected no enumerated site, got infer={{'enumerate': '{how}'}} at site 'z': use .*\Z"
    with pytest.raises(ValueError, match=message):
        Elbo(use_rep=False).loss(model, guide)

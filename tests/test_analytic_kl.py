"""Closed-form KLs among several sites: exact gradients by quadrature, whatever the order, scales and masks."""

import contextlib
import warnings
from itertools import permutations

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import TraceMeanField_ELBO

from pyrovae.estimators import AnalyticKL, Elbo
from pyrovae.programs.graphs import capture
from tests.linear_gaussian import grid

F64 = torch.float64
NOISE, WEIGHTS = grid(3, 8)  # of three sites; exact for polynomials up to degree 15
# What the samples are made of: loc of each site, then its slopes in the others, then log scale.
VALUES = torch.tensor(
    [[0.3, 0.0, 0.5, -0.4, -0.3], [-0.2, 0.6, 0.0, 0.3, 0.1], [0.1, -0.5, 0.2, 0.0, -0.2]], dtype=F64
)


class Three:
    """Latent sites a, b, c, each a normal about a line in the sites before it, and x about their sum.

    Each datum has a copy of the guide's parameters, and a grid point of quadrature as noise.

    Args:
        guide_order: In what order the guide samples the sites; the model does in the order a, b, c.
        independent: Whether the guide's sites are independent of each other.
        settings: A context for each (program, site), such as a scale or a mask.
        copies: How often the grid is repeated.
    """

    def __init__(self, guide_order="abc", *, independent=False, settings=None, copies=1):
        self.guide_order, self.settings = guide_order, settings or {}
        self.noise, self.n = NOISE.repeat(1, copies), copies * NOISE.shape[1]
        self.weights = WEIGHTS.repeat(copies)
        self.parameters = VALUES[..., None].expand(-1, -1, self.n).clone().requires_grad_()
        self.independent = independent

    def prior(self, name, z):
        a, b = z.get("a", 0.0), z.get("b", 0.0)
        return {
            "a": lambda: (torch.zeros(self.n, dtype=F64), 1.0),
            "b": lambda: (0.8 * a + torch.zeros(self.n, dtype=F64), 1.5),
            "c": lambda: (0.5 * a - 0.7 * b, 0.9),
        }[name]()

    def posterior(self, name, z):
        loc, *slopes, rho = self.parameters["abc".index(name)]
        earlier = {} if self.independent else z
        return loc + sum(slopes["abc".index(other)] * earlier[other] for other in earlier), rho.exp()

    def within(self, program, name):
        return self.settings.get((program, name), contextlib.nullcontext)()

    def model(self):
        z = {}
        with pyro.plate("data", self.n):
            for name in "abc":
                with self.within("model", name):
                    z[name] = pyro.sample(name, dist.Normal(*self.prior(name, z)))
            total = sum(z.values())
            pyro.sample("x", dist.Normal(total, 1.0), obs=torch.ones(self.n, dtype=F64))

    def guide(self):
        z = {}
        with pyro.plate("data", self.n):
            for name in self.guide_order:
                loc, scale = self.posterior(name, z)
                fn = (
                    dist.Normal(loc, scale)
                    if self.noise is None
                    else Given(loc, scale, self.noise["abc".index(name)])
                )
                with self.within("guide", name):
                    z[name] = pyro.sample(name, fn)

    def exact(self, weigh=lambda program, name, value: value) -> torch.Tensor:
        """The ELBO's gradient: that of its quadrature, with the samples as functions of the parameters."""
        z, log_guide = {}, 0.0
        for name in self.guide_order:
            loc, scale = self.posterior(name, z)
            value = loc + scale * self.noise["abc".index(name)]
            log_guide = log_guide + weigh("guide", name, dist.Normal(loc, scale).log_prob(value))
            z[name] = value
        priors = {name: dist.Normal(*self.prior(name, z)) for name in "abc"}
        log_prior = sum(weigh("model", name, p.log_prob(z[name])) for name, p in priors.items())
        log_lik = dist.Normal(sum(z.values()), 1.0).log_prob(torch.ones((), dtype=F64))
        return self.mean(torch.autograd.grad((log_lik + log_prior - log_guide).sum(), self.parameters)[0])

    def mean(self, gradient):
        """Over each copy of the grid."""
        return (gradient * self.weights).unflatten(-1, (-1, NOISE.shape[1])).sum(-1)

    def gradient(self, estimator):
        draws = estimator.draws(self.model, self.guide)
        (gradient,) = torch.autograd.grad(estimator.surrogate(draws).sum(), self.parameters)
        return self.mean(gradient)


class Given(dist.Normal):
    """A normal with given noise."""

    def __init__(self, loc, scale, noise):
        super().__init__(loc, scale)
        self.noise = noise

    def expand(self, batch_shape, _instance=None):
        return self

    def rsample(self, sample_shape=()):
        return self.loc + self.scale * self.noise


def sampled_sites(order):
    """The sites that the model conditions on what the guide samples later."""
    return {
        name for name in "abc" if any(order.index(o) > order.index(name) for o in "abc"[: "abc".index(name)])
    }


def warned(sites):
    return pytest.warns(UserWarning, match="is taken from samples") if sites else contextlib.nullcontext()


ORDERS = ["".join(order) for order in permutations("abc")]


@pytest.mark.parametrize("independent", [True, False])
@pytest.mark.parametrize("use_rep", [True, False])
@pytest.mark.parametrize("order", ORDERS)
def test_the_gradient_is_that_of_the_elbo_in_any_order_of_sites(order, use_rep, independent):
    three = Three(order, independent=independent)
    with warned(sampled_sites(order)):
        got = three.gradient(AnalyticKL(use_rep=use_rep))
    exact = three.exact()
    torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(three.gradient(Elbo(use_rep=use_rep)), exact, rtol=1e-9, atol=1e-9)
    assert exact.abs().max() > 0.1


@pytest.mark.parametrize("order", ORDERS)
def test_a_site_is_sampled_only_where_the_model_looks_at_what_the_guide_samples_later(order):
    with warned(sampled_sites(order)) as record:
        forms = AnalyticKL().draws(*(lambda three: (three.model, three.guide))(Three(order))).closed_forms
    assert {name for name, form in forms.items() if form.where is not True} == sampled_sites(order)
    messages = [str(warning.message) for warning in record or []]
    for message, name in zip(messages, [name for name in order if name in sampled_sites(order)], strict=True):
        assert message.startswith(f"the KL at site '{name}' is taken from samples, since the model samples '")


def test_the_score_function_of_two_sites_has_the_gradient_of_a_kl_that_follows():
    """a ~ N(0, 1), b ~ N(a, 1) and x ~ N(0, 1), guided by a ~ N(l, 1) and b ~ N(0, 1): KL = l^2 + 1/2."""
    noise, weights = grid(2, 8)
    n = len(weights)
    loc = torch.full((n,), 1.0, dtype=F64, requires_grad=True)
    zero = torch.zeros(n, dtype=F64)

    def model():
        with pyro.plate("data", n):
            a = pyro.sample("a", dist.Normal(zero, 1.0))
            pyro.sample("b", dist.Normal(a, 1.0))
            pyro.sample("x", dist.Normal(zero, 1.0), obs=zero)

    def guide():
        with pyro.plate("data", n):
            pyro.sample("a", Given(loc, zero + 1, noise[0]))
            pyro.sample("b", Given(zero, zero + 1, noise[1]))

    for use_rep in (True, False):
        estimator = AnalyticKL(use_rep=use_rep)
        draws = estimator.draws(model, guide)
        (gradient,) = torch.autograd.grad(-estimator.surrogate(draws).sum(), loc)
        assert (gradient @ weights).item() == pytest.approx(2, abs=1e-9)
        assert (estimator.kl(draws) @ weights).item() == pytest.approx(1.5, abs=1e-9)


def test_a_site_s_score_is_multiplied_by_what_the_site_influences():
    """By hand: the KL of a site, a constant given those before it, is no part of its own signal."""
    three = Three("acb")
    with warned("c"):
        draws = AnalyticKL(use_rep=False).draws(three.model, three.guide)
    (mine,) = torch.autograd.grad(AnalyticKL(use_rep=False).surrogate(draws).sum(), three.parameters)
    z = {name: draws.guide_sites[name]["value"] for name in "abc"}
    q = {"a": {}, "c": {"a": z["a"]}, "b": {"a": z["a"], "c": z["c"]}}
    q = {name: dist.Normal(*three.posterior(name, given)) for name, given in q.items()}
    p = {name: dist.Normal(*three.prior(name, z)) for name in "abc"}
    kl = {name: torch.distributions.kl_divergence(q[name], p[name]) for name in "ab"}
    log_lik = dist.Normal(sum(z.values()), 1.0).log_prob(torch.ones((), dtype=F64))
    sampled = p["c"].log_prob(z["c"]) - q["c"].log_prob(z["c"])
    signals = {"a": log_lik + sampled - kl["b"], "c": log_lik + sampled - kl["b"], "b": log_lik + sampled}
    surrogate = sum(signals[name].detach() * q[name].log_prob(z[name]) for name in "abc") - kl["a"] - kl["b"]
    (by_hand,) = torch.autograd.grad(surrogate.sum(), three.parameters)
    torch.testing.assert_close(mine, by_hand, rtol=1e-11, atol=1e-11)


def scale(value):
    return lambda: poutine.scale(scale=value)


def mask(value):
    return lambda: poutine.mask(mask=value)


FIRST = torch.cat([torch.ones(NOISE.shape[1]), torch.zeros(NOISE.shape[1])]).bool()  # of two copies
PER_DATUM = torch.where(FIRST, 2.0, 0.5).double()
# By name: settings of sites, and those that are sampled for all data or for some.
SETTINGS = {
    "one scale": ({("model", "b"): scale(2.0), ("guide", "b"): scale(2.0)}, ""),
    "two scales": ({("model", "b"): scale(2.0), ("guide", "b"): scale(3.0)}, "b"),
    "a scale in the model alone": ({("model", "a"): scale(0.5)}, "a"),
    "one scale per datum": ({("model", "c"): scale(PER_DATUM), ("guide", "c"): scale(PER_DATUM.clone())}, ""),
    "a scale per datum in the guide alone": (
        {("guide", "b"): scale(torch.where(FIRST, 1.0, 3.0).double())},
        "b",
    ),
    "one mask": ({("model", "b"): mask(FIRST), ("guide", "b"): mask(FIRST.clone())}, ""),
    "a mask in the model alone": ({("model", "b"): mask(FIRST)}, "b"),
    "opposite masks": ({("model", "c"): mask(FIRST), ("guide", "c"): mask(~FIRST)}, "c"),
    "nothing of a site": ({("model", "b"): mask(False), ("guide", "b"): mask(False)}, ""),
    "nothing of a site in the guide": ({("model", "c"): mask(True), ("guide", "c"): mask(False)}, "c"),
}


@pytest.mark.parametrize("use_rep", [True, False])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_gradient_is_that_of_the_scaled_and_masked_elbo(name, use_rep):
    settings, sampled = SETTINGS[name]
    three = Three(settings=settings, copies=2)

    def weigh(program, site, value):
        context = settings.get((program, site), contextlib.nullcontext)()
        value = value * getattr(context, "scale", 1.0)
        return torch.where(torch.as_tensor(getattr(context, "mask", True)), value, 0.0)

    with warned(sampled) as record:
        got = three.gradient(AnalyticKL(use_rep=use_rep))
    assert [str(w.message)[:20] for w in record or []] == [
        f"the KL at site '{site}' i"[:20] for site in sampled
    ]
    exact = three.exact(weigh)
    torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(three.gradient(Elbo(use_rep=use_rep)), exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("use_rep", [True, False])
@pytest.mark.parametrize("masked", ["around the site", "in the distribution", "inside to_event", "not at all"])
def test_partly_observed_data_give_the_exact_gradient(masked, use_rep):
    """z ~ N(0, 1) and x ~ N(z, 1), half of whose values are missing, so that they are latent too."""
    noise, weights = (t.repeat(*[1] * (t.dim() - 1), 2) for t in grid(2, 8))
    n = len(weights)
    loc = torch.full((n,), 0.7, dtype=F64, requires_grad=True)
    zero, observed = torch.zeros(n, dtype=F64), torch.arange(n) < n // 2

    def model():
        with pyro.plate("data", n):
            z = pyro.sample("z", dist.Normal(zero, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=zero + 1, obs_mask=observed)

    def guide():
        with pyro.plate("data", n):
            pyro.sample("z", Given(loc, zero + 0.5, noise[0]))
            q = Given(0.5 * loc, zero + 0.8, noise[1])
            if masked == "in the distribution":
                q = q.mask(~observed)
            elif masked == "inside to_event":
                q = q.mask(~observed).to_event(0)
            with poutine.mask(mask=~observed) if masked == "around the site" else contextlib.nullcontext():
                pyro.sample("x_unobserved", q)

    estimator = AnalyticKL(use_rep=use_rep)
    with warned(masked == "not at all"):
        draws = estimator.draws(model, guide)
    (gradient,) = torch.autograd.grad(estimator.surrogate(draws).sum(), loc)
    # Observed: (1 - l) - l. Missing: -l, and the KL to N(z, 1) has E[(l/2 - z)^2] / 2, of derivative l / 4.
    exact = torch.tensor([1 - 2 * 0.7, -0.7 - 0.7 / 4], dtype=F64)
    torch.testing.assert_close((gradient * weights).reshape(2, -1).sum(1), exact, rtol=0, atol=1e-9)


@pytest.mark.parametrize("particles", [1, 4])
@pytest.mark.parametrize("independent", [True, False])
def test_in_the_order_of_the_model_it_is_the_estimator_of_pyro(independent, particles):
    three, results = Three(independent=independent), []
    twin = TraceMeanField_ELBO(num_particles=particles, vectorize_particles=True, max_plate_nesting=1)
    for estimator in (AnalyticKL(num_particles=particles), twin):
        three.noise = None
        pyro.set_rng_seed(0)
        loss = estimator.differentiable_loss(three.model, three.guide)
        results.append((loss.detach(), torch.autograd.grad(loss, three.parameters)[0]))
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-11)


def two(first, second):
    """A pair with sites a and b, whose guide's distributions are these."""
    zero = torch.zeros(4, dtype=F64)

    def model():
        with pyro.plate("data", 4):
            a = pyro.sample("a", dist.Normal(zero, 1.0))
            b = pyro.sample("b", dist.Normal(a, 1.0))
            pyro.sample("x", dist.Normal(a + b, 1.0), obs=zero)

    def guide():
        with pyro.plate("data", 4):
            pyro.sample("a", first)
            pyro.sample("b", second)

    return model, guide


def test_a_site_without_a_closed_form_is_sampled_beside_one_that_has_one():
    normal = dist.Normal(torch.full((4,), 0.3, dtype=F64), 0.5)
    # A point with a density of its own, as automatic guides have it: Pyro's closed form leaves the density out.
    log_density = torch.full((4,), 0.7, dtype=F64, requires_grad=True)
    point = dist.Delta(torch.ones(4, dtype=F64), log_density=log_density)
    for second, density in ((dist.Cauchy(torch.zeros(4, dtype=F64), 1.0), None), (point, log_density)):
        with pytest.warns(
            UserWarning, match=r"the KL at site 'b' is taken from samples, since there is none for"
        ):
            draws = AnalyticKL().draws(*two(normal, second))
        a, b = (draws.guide_sites[name]["value"] for name in "ab")
        expected = torch.distributions.kl_divergence(normal, dist.Normal(0.0, 1.0)) - dist.Normal(
            a, 1.0
        ).log_prob(b)
        expected = expected + (second.log_prob(b) if density is None else density)
        torch.testing.assert_close(AnalyticKL().kl(draws), expected)


def test_refuses_a_pair_with_no_closed_form_at_all():
    cauchy = dist.Cauchy(torch.zeros(4), 1.0)
    message = (
        r"\Aexpected a closed-form KL\(q \|\| p\) at site 'a', got none that is right, since there is none .*\Z"
    )
    with pytest.raises(ValueError, match=message):
        AnalyticKL().loss(*two(cauchy, cauchy))


def test_refuses_a_single_site_that_is_scaled_in_the_model_alone(make_vae):
    three = Three()

    def guide():
        with pyro.plate("data", three.n):
            pyro.sample("z", dist.Normal(three.parameters[0, 0], 1.0))

    def model():
        with pyro.plate("data", three.n):
            with poutine.scale(scale=2.0):
                z = pyro.sample("z", dist.Normal(torch.zeros(three.n, dtype=F64), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones(three.n, dtype=F64))

    with pytest.raises(
        ValueError, match=r"\Aexpected a closed-form KL.*scale or mask it in different ways.*\Z"
    ):
        AnalyticKL().loss(model, guide)


@pytest.mark.parametrize("use_rep", [True, False])
def test_scales_that_are_tensors_are_captured(use_rep):
    """Also where the scales of model and guide, equal when captured, differ later."""
    weights = [torch.tensor(2.0, dtype=F64) for _ in range(2)]
    loc = torch.full((4,), 0.3, dtype=F64, requires_grad=True)

    def model(x, beta, other):
        with pyro.plate("data", 4):
            with poutine.scale(scale=beta):
                z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, beta, other):
        mean = pyro.param("loc", loc)
        with pyro.plate("data", 4), poutine.scale(scale=other):
            pyro.sample("z", dist.Normal(mean, 0.5))

    x = torch.ones(4, dtype=F64)
    estimator = AnalyticKL(use_rep=use_rep)
    step = capture(model, guide, estimator, x, *weights, backend=lambda graph, inputs: graph)
    (parameter,) = step.parameters
    for number in range(5):
        if number > 2:
            weights[1].mul_(2)
        pyro.set_rng_seed(number)
        with warnings.catch_warnings():  # a captured step now and then runs the programs themselves, which warn
            warnings.simplefilter("ignore", UserWarning)
            got = step(x, *weights), parameter.grad.clone()
        assert not step.reason
        pyro.set_rng_seed(number)
        with warned(number > 2):
            expected = estimator.differentiable_loss(model, guide, x, *weights)
        torch.testing.assert_close(got, (expected.detach(), *torch.autograd.grad(expected, parameter)))
    assert step.reason == ""

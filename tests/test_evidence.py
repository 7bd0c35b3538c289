"""log p(x) by importance sampling, prior samples and annealing, against exact linear-Gaussian values."""

import contextlib
import math
import random
from dataclasses import dataclass

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyrovae.evaluation import annealed, bidirectional, chunks, importance_weighted, naive
from pyrovae.evaluation.annealing import Point, anneal, schedule, transition
from pyrovae.evaluation.pareto import PRIOR_COUNT, PRIOR_K, tail_length
from pyrovae.guides import Guide
from pyrovae.likelihoods import LIKELIHOODS, Likelihood
from pyrovae.networks import Decoder
from pyrovae.runtime.random_states import seeded
from pyrovae.vae import VAE

pytestmark = pytest.mark.usefixtures("unchecked")  # the tests of `evaluate` check them

T2 = 0.3  # the variance of p(x|z)
ESTIMATES = {"importance_weighted": importance_weighted, "naive": naive}


@dataclass(frozen=True)
class Linear(Likelihood):
    """N(eta, T2 I), without the sigmoid of `Gaussian`."""

    def __call__(self, eta, **learned):
        return dist.Normal(eta.squeeze(-1), math.sqrt(T2)).to_event(1)

    def observe(self, pixels, generator=None):
        return pixels

    def to_pixels(self, x):
        return x

    def mean(self, eta):
        return eta.squeeze(-1)

    def log_constant(self, num_pixels):
        return None


class Posterior(Guide):
    """N(M^-1 W^T (x - b) / T2 + shift, widen^2 M^-1), M = I + W^T W / T2: exact if not shifted or widened."""

    def __init__(self, decoder: nn.Linear, shift: float = 0.0, widen: float = 1.0):
        super().__init__()
        weight, self.bias = decoder.weight.detach(), decoder.bias.detach()
        precision = torch.eye(weight.shape[1], dtype=weight.dtype) + weight.T @ weight / T2
        self.covariance, self.shift, self.widen = precision.inverse(), shift, widen
        self.gain = self.covariance @ weight.T / T2

    def forward(self, x):
        loc = (x - self.bias) @ self.gain.T + self.shift
        return dist.MultivariateNormal(loc, self.widen**2 * self.covariance)


def linear_vae(latent_dim: int = 2, pixels: int = 5, **wrong: float) -> VAE:
    body = nn.Linear(latent_dim, pixels).double()
    with torch.no_grad():
        nn.init.normal_(body.weight)
    decoder = Decoder(body, (1, 1, pixels), 1)
    vae = VAE(likelihood=Linear(), decoder=decoder, guide=Posterior(body, **wrong), latent_dim=latent_dim)
    return vae.double()


def observations(vae: VAE, n: int = 4) -> Tensor:
    z = torch.randn(n, vae.latent_dim, dtype=torch.float64)
    with torch.no_grad():
        eta = vae.decoder(z).squeeze(-1)
    return eta + math.sqrt(T2) * torch.randn_like(eta)


def exact(vae: VAE, x: Tensor) -> Tensor:
    """log N(x; b, W W^T + T2 I)."""
    weight, bias = vae.decoder.body.weight.detach(), vae.decoder.body.bias.detach()
    covariance = weight @ weight.T + T2 * torch.eye(len(bias), dtype=bias.dtype)
    return dist.MultivariateNormal(bias, covariance).log_prob(x)


def elbo(vae: VAE, x: Tensor) -> Tensor:
    """log p(x) - KL(q(z|x) || p(z|x))."""
    posterior = Posterior(vae.decoder.body)(x)
    return exact(vae, x) - torch.distributions.kl_divergence(vae.posterior(x), posterior)


def test_the_exact_posterior_has_no_variance():
    vae = linear_vae()
    x = observations(vae)
    found = importance_weighted(vae, x, particles=50)
    torch.testing.assert_close(found.log_evidence, exact(vae, x))
    torch.testing.assert_close(found.bound, exact(vae, x))
    torch.testing.assert_close(found.effective_sample_size, torch.full((4,), 50.0, dtype=torch.float64))
    assert found.error.max() < 1e-6


def test_a_wrong_guide_is_within_its_error():
    """4.9 standard errors: a false alarm in 1e-6 each. A wrong density of q would be off by far more."""
    vae = linear_vae(shift=0.3, widen=1.5)
    x = observations(vae)
    found = importance_weighted(vae, x, particles=20_000)
    assert ((found.log_evidence - exact(vae, x)).abs() < 4.9 * found.error).all()
    assert (found.error < 0.02).all()


def test_bounds_rise_with_particles_from_the_elbo_to_log_p():
    """Averages over 300 draws; the gaps are far above their standard errors."""
    vae = linear_vae(shift=0.5, widen=1.5)
    x = observations(vae, 1).expand(300, -1)
    means = [importance_weighted(vae, x, particles=k).log_evidence.mean().item() for k in (1, 4, 16, 1000)]
    assert means == sorted(means)
    assert means[0] == pytest.approx(elbo(vae, x[:1]).item(), abs=0.5)
    assert means[-1] == pytest.approx(exact(vae, x[:1]).item(), abs=0.05)


def test_the_mean_log_weight_is_the_elbo():
    vae = linear_vae(shift=0.3, widen=1.5)
    x = observations(vae)
    found = importance_weighted(vae, x, particles=20_000)
    torch.testing.assert_close(found.bound, elbo(vae, x), atol=0.1, rtol=0)
    assert (found.bound < found.log_evidence).all()


@pytest.mark.parametrize("ratio", [0.25, 0.5, 2.0])
def test_pareto_k_is_known_from_the_guides_variance(ratio):
    """1 - r, where the guide has r times the posterior's variance.

    In two dimensions log w = (1 - r) e with e exponential, so that weights are Pareto with that k, or uniform
    for r = 2. Without the pull to 0.5, the mean of 40 images is within 5 standard errors of about 0.02.
    """
    vae = linear_vae(widen=math.sqrt(ratio))
    found = importance_weighted(vae, observations(vae, 40), particles=5000)
    tail = tail_length(5000)
    plain = ((tail + PRIOR_COUNT) * found.pareto_k.mean() - PRIOR_COUNT * PRIOR_K) / tail
    assert plain.item() == pytest.approx(1 - ratio, abs=0.1)


@pytest.mark.parametrize(("widen", "reliable"), [(0.5, False), (0.9, True), (1.0, True), (1.2, True)])
def test_unreliable_weights_are_told_from_reliable_ones(widen, reliable):
    """With half the posterior's scale, errors are of no use: most are too small, and the estimate too low."""
    vae = linear_vae(10, 20, widen=widen)
    x = observations(vae, 40)
    found = importance_weighted(vae, x, particles=1000)
    assert (found.reliable == reliable).all()
    if not reliable:
        assert (found.effective_sample_size > 10).double().mean() > 0.4
        assert ((exact(vae, x) - found.log_evidence) > 1.96 * found.error).double().mean() > 0.5


@pytest.mark.parametrize("estimate", ESTIMATES)
def test_one_particle_has_no_error(estimate):
    vae = linear_vae(widen=1.5)
    found = ESTIMATES[estimate](vae, observations(vae), particles=1)
    assert found.error.isnan().all()
    assert not found.reliable.any()


def test_naive_is_unbiased_in_one_dimension():
    """The mean of p(x|z) over 200,000 prior samples, within 4.9 of its own standard errors."""
    vae = linear_vae(latent_dim=1, pixels=1)
    x = observations(vae)
    found = naive(vae, x, particles=200_000)
    ratio = (found.log_evidence - exact(vae, x)).exp()
    assert ((ratio - 1).abs() < 4.9 * found.error).all()
    assert (found.error < 0.05).all()


def test_naive_falls_short_in_many_dimensions_where_annealing_does_not():
    vae = linear_vae(latent_dim=12, pixels=12)
    x = observations(vae, 2)
    truth = exact(vae, x)
    short = naive(vae, x, particles=1000)
    tight = annealed(vae, x, steps=100, chains=32)
    assert (short.log_evidence < truth - 8).all()
    assert ((tight.log_evidence - truth).abs() < 2).all()


@pytest.mark.parametrize("latent_dim", [1, 3])
def test_annealing_is_within_its_error(latent_dim):
    """4.9 standard errors, small ones: of 500 independent chains."""
    vae = linear_vae(latent_dim)
    x = observations(vae)
    found = annealed(vae, x, steps=50, chains=500)
    assert ((found.log_evidence - exact(vae, x)).abs() < 4.9 * found.error).all()
    assert (found.error < 0.1).all()


@pytest.mark.parametrize("chains", [4, 16])
def test_the_interval_of_few_uneven_chains_misses_in_few_cases(chains):
    """In at most 5 % of 200 images, up to 4.9 standard errors, where 1.96 of its own errors miss in most."""
    vae = linear_vae(5, 10)
    x = observations(vae, 200)
    truth, found = exact(vae, x), annealed(vae, x, steps=20, chains=chains, leapfrog=3)
    lower, upper = found.interval
    assert ((truth - found.log_evidence).abs() > 1.96 * found.error).double().mean() > 0.5
    missed = ((truth < lower) | (truth > upper)).double().mean().item()
    assert missed < 0.05 + 4.9 * math.sqrt(0.05 * 0.95 / 200)
    assert not found.reliable[found.effective_sample_size < min(8, chains / 2)].any()
    assert found.reliable.double().mean() < 0.25


def test_annealing_is_unbiased_for_p_even_in_few_steps():
    """With 3 steps weights are uneven, but the mean of 40,000 is p(x), within 4.9 standard errors."""
    vae = linear_vae(latent_dim=1, pixels=1)
    x = observations(vae, 2)
    found = annealed(vae, x, steps=3, chains=40_000, leapfrog=2)
    ratio = (found.log_evidence - exact(vae, x)).exp()
    assert ((ratio - 1).abs() < 4.9 * found.error).all()
    assert (found.error < 0.02).all()


def test_annealing_ends_at_the_posterior():
    """E[log p(x|z)] under the exact posterior, from its mean and covariance."""
    vae = linear_vae(latent_dim=2)
    x = observations(vae, 2)
    posterior = Posterior(vae.decoder.body)(x)
    with torch.no_grad():
        eta = vae.decoder(posterior.mean).squeeze(-1)
        weight = vae.decoder.body.weight
        spread = (weight @ posterior.covariance_matrix @ weight.T).diagonal(dim1=-2, dim2=-1).sum(-1)
        expected = vae.likelihood(eta.unsqueeze(-1)).log_prob(x) - spread / (2 * T2)
    found = annealed(vae, x, steps=30, chains=4000)
    torch.testing.assert_close(found.log_lik, expected, atol=0.1, rtol=0)


# Bounds from both sides


def within(values: Tensor, expected: float) -> None:
    """The mean is the expected one, within 4.9 standard errors: a false alarm in 1e-6."""
    error = values.std() / math.sqrt(len(values))
    assert (values.mean() - expected).abs() < 4.9 * error


@pytest.mark.parametrize("steps", [3, 12])
def test_forward_weights_estimate_p_and_reverse_weights_its_inverse(steps):
    """E[w] = p(x) and E[1 / w] = 1 / p(x), over images as well; their standard errors are below 0.02."""
    vae = linear_vae(1, 1)
    found = bidirectional(vae, images=4000, chains=1, steps=steps, leapfrog=2)
    truth = exact(vae, found.x)
    for ratio in ((found.lower.log_evidence - truth).exp(), (truth - found.upper).exp()):
        within(ratio, 1.0)
        assert ratio.std() / math.sqrt(len(ratio)) < 0.02


def test_both_bounds_hold_and_close_with_more_steps():
    """On average over images; either side is off by many standard errors at first, and by half at most then."""
    vae, gaps = linear_vae(2, 3), []
    for steps in (4, 30):
        found = bidirectional(vae, images=200, chains=4, steps=steps, leapfrog=3)
        truth = exact(vae, found.x)
        sides = truth - found.lower.log_evidence, found.upper - truth
        torch.testing.assert_close(found.gap, sides[0] + sides[1])
        gaps.append([side.mean().item() for side in sides])
        errors = [side.std().item() / math.sqrt(200) for side in sides]
    for first, last, error in zip(*gaps, errors, strict=True):
        assert first > 2 * last
        assert last > -4.9 * error
        assert first > 4.9 * error


def test_the_images_are_draws_from_the_model():
    """The mean of log p(x) is minus the entropy, (log det(2 pi S) + 5) / 2."""
    vae = linear_vae()
    found = bidirectional(vae, images=2000, chains=1, steps=1, leapfrog=1)
    weight = vae.decoder.body.weight.detach()
    covariance = weight @ weight.T + T2 * torch.eye(5, dtype=torch.float64)
    within(exact(vae, found.x), -0.5 * ((2 * math.pi * covariance).logdet().item() + 5))


def test_the_chains_do_not_start_with_the_noise_of_the_images():
    """Else the step sizes of the reverse chains would depend on the very z that they start from."""
    vae, starts = linear_vae(1, 1), []
    vae.decoder.register_forward_hook(lambda _, args, eta: starts.append(args[0].clone()))
    bidirectional(vae, images=3, chains=2, steps=1, leapfrog=1)
    images, pilot = starts[0], starts[1]
    assert pilot.shape == (4, 3, 1)
    assert not torch.isin(pilot, images).any()
    reverse = starts[-2]  # and all reverse chains start at the z that made the image
    assert torch.equal(reverse, images.expand(2, 3, 1))


def test_images_are_made_in_parts(monkeypatch):
    """No more at a time than an estimate decodes, here 2, and all of them."""
    vae, decoded = linear_vae(1, 5), []
    vae.decoder.register_forward_hook(lambda _, args, eta: decoded.append(args[0]))
    monkeypatch.setattr(chunks, "NUMBERS", 10)
    found = bidirectional(vae, images=7, chains=1, steps=1, leapfrog=1)
    made = decoded[:4]
    assert [len(z) for z in made] == [2, 2, 2, 1]
    assert found.x.shape == (7, 5)
    assert len(torch.cat(made).unique()) == 7
    assert (
        max(z.shape[:-1].numel() for z in decoded) <= 4 * 2
    )  # and annealed by two images, a pilot has 4 chains


def test_reverse_chains_in_parts_give_every_image_its_own():
    vae = linear_vae(1, 1)
    found = bidirectional(vae, images=9, steps=20, chains=20, leapfrog=3, batch_size=60)
    truth = exact(vae, found.x)
    assert ((found.upper - truth).abs() < 0.3).all()
    assert ((found.lower.log_evidence - truth).abs() < 0.3).all()
    assert truth.max() - truth.min() > 1


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_every_likelihood_has_bounds_from_both_sides(make_vae, likelihood):
    """An untrained decoder hardly depends on z, so that they nearly meet."""
    vae = make_vae(likelihood=likelihood, hidden=(8,))
    found = bidirectional(vae, images=3, steps=20, chains=4, leapfrog=3)
    assert found.x.shape == (3, 64)
    assert (found.gap.abs() < 1.5).all()


@pytest.mark.parametrize("labels", [None, torch.tensor([2, 0, 2])])
def test_images_of_a_conditional_vae_have_classes(make_vae, labels):
    vae = make_vae(classes=3, conditional=True, hidden=(8,))
    x = bidirectional(vae, images=3, labels=labels, steps=1, chains=1).x
    classes = vae.split(x)[1]
    assert (classes.sum(-1) == 1).all()
    if labels is not None:
        assert torch.equal(classes.argmax(-1), labels)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1], r"expected labels of shape \(3,\), got \(2,\)"),
        ([0, 1, 3], "expected labels from 0 to 2, got 3"),
    ],
)
def test_wrong_labels_of_images_to_make(make_vae, labels, message):
    with pytest.raises(ValueError, match=message):
        bidirectional(make_vae(classes=3, conditional=True), images=3, labels=torch.tensor(labels))


# Chains


def flat(z: Tensor, log_lik: float = 0.0) -> Point:
    """A density without a slope, where a path goes straight on."""
    level, none = torch.full_like(z[..., 0], log_lik), torch.zeros_like(z)
    return Point(z, torch.zeros_like(level), level, none, none)


def test_step_sizes_are_spread_from_half_to_one_and_a_half():
    """A path of L steps of size e goes L e times its momentum, which is standard normal over 4,000 chains."""
    z = torch.zeros(4000, 500, 1, dtype=torch.float64)
    moved, acceptance = transition(flat, flat(z), 1.0, torch.full((500, 1), 0.2, dtype=torch.float64), 5)
    factors = moved.z.square().mean((0, 2)).sqrt()  # an image's, up to 1.1 %
    assert (acceptance == 1).all()
    assert 0.48 < factors.min() < 0.52
    assert 1.48 < factors.max() < 1.55
    assert factors.mean().item() == pytest.approx(1, abs=4.9 * math.sqrt(1 / 12 / 500))
    assert factors.var().item() == pytest.approx(1 / 12, abs=0.015)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_path_that_runs_away_is_refused(value):
    start = flat(torch.zeros(6, 3, 2, dtype=torch.float64))
    moved, acceptance = transition(
        lambda z: flat(z, value), start, 1.0, torch.ones(3, 1, dtype=torch.float64), 2
    )
    assert (acceptance == 0).all()
    assert torch.equal(moved.z, start.z)
    assert (moved.log_lik == 0).all()


def test_the_schedule_is_an_even_sigmoid_from_minus_four_to_four():
    sigmoid = [1 / (1 + math.exp(-value)) for value in (-4, -2, 0, 2, 4)]
    expected = [(value - sigmoid[0]) / (sigmoid[-1] - sigmoid[0]) for value in sigmoid]
    assert schedule(4) == pytest.approx(expected)
    assert schedule(1) == [0, 1]


def test_a_transition_leaves_the_normal_distribution_as_it_is():
    """With long steps, and paths that are refused: mean, variance and fourth moment of 400,000 chains.

    With short steps the energy is kept, up to the square of the step size.
    """

    def normal(z: Tensor) -> Point:
        half = -0.25 * z.square().sum(-1)
        return Point(z, half, half, -0.5 * z, -0.5 * z)

    z = torch.randn(200, 2000, 1, dtype=torch.float64)
    step_size = torch.full((2000, 1), 1.6, dtype=torch.float64)
    moved, acceptance = transition(normal, normal(z), 1.0, step_size, 3)
    assert 0.5 < acceptance.mean() < 0.9
    _, close = transition(normal, normal(z[:, :10]), 1.0, torch.full((10, 1), 1e-3, dtype=torch.float64), 3)
    assert (1 - close).max() < 1e-4
    for power, expected in ((1, 0.0), (2, 1.0), (4, 3.0)):
        within(moved.z.flatten() ** power, expected)


def test_a_pilots_step_sizes_adapt_to_the_acceptance():
    """By exp(0.2 (acceptance - 0.65)) a step: up where all is accepted, down where nothing is."""
    temperatures, z = [0.0, 0.25, 0.5, 1.0], torch.zeros(8, 2, 1, dtype=torch.float64)
    for at, acceptance in ((flat, 1.0), (lambda z: flat(z, -math.inf if z.any() else 0.0), 0.0)):
        *_, used = anneal(at, z, temperatures, 2, None, lambda: None)
        factor = math.exp(0.2 * (acceptance - 0.65))
        expected = torch.tensor([[0.5 * factor**step] * 2 for step in range(3)], dtype=torch.float64)
        torch.testing.assert_close(used, expected)
        *_, again = anneal(at, z, temperatures, 2, expected, lambda: None)  # given ones do not
        assert torch.equal(again, expected)


@pytest.mark.parametrize("estimate", ESTIMATES)
def test_the_batch_size_changes_rounding_only(estimate):
    vae = linear_vae(widen=1.5)
    x = observations(vae, 7)
    results = [ESTIMATES[estimate](vae, x, particles=100, batch_size=b) for b in (None, 1, 7, 64, 10_000)]
    for result in results[1:]:
        torch.testing.assert_close(result.log_evidence, results[0].log_evidence, atol=1e-10, rtol=0)
        torch.testing.assert_close(result.effective_sample_size, results[0].effective_sample_size)
        torch.testing.assert_close(result.bound, results[0].bound, atol=1e-10, rtol=0)


@pytest.mark.parametrize("estimate", ESTIMATES)
def test_no_more_images_are_decoded_at_a_time_than_the_batch_size(estimate):
    """And as many pairs of a particle and an image are scored."""
    vae, decoded, scored = linear_vae(), [], []
    vae.decoder.register_forward_hook(lambda _, args, eta: decoded.append(args[0].shape[:-1].numel()))

    class Recorded(Linear):
        def __call__(self, eta, **learned):
            p = super().__call__(eta)
            log_prob = p.log_prob
            p.log_prob = lambda x: scored.append(log_prob(x).numel()) or log_prob(x)
            return p

    vae.likelihood = Recorded()
    ESTIMATES[estimate](vae, observations(linear_vae(), 50), particles=300, batch_size=70)
    assert sum(decoded) == {"importance_weighted": 50 * 300, "naive": 300}[estimate]
    assert sum(scored) == 50 * 300
    assert max(*decoded, *scored) <= 70


def test_an_images_noise_does_not_depend_on_the_others():
    vae = linear_vae(widen=1.5)
    x = observations(vae, 7)
    few, all_ = (importance_weighted(vae, part, particles=10).log_evidence for part in (x[:3], x))
    torch.testing.assert_close(few, all_[:3])


def test_annealing_in_parts_gives_every_image_its_own():
    vae = linear_vae()
    x = observations(vae, 5)
    found = annealed(vae, x, steps=20, chains=200, batch_size=400)
    assert ((found.log_evidence - exact(vae, x)).abs() < 4.9 * found.error + 1e-9).all()


@pytest.mark.parametrize("guide", ["mean-field", "bernoulli-code"])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_every_likelihood_and_guide(make_vae, likelihood, guide):
    vae = make_vae(likelihood=likelihood, guide=guide, hidden=(8,))
    x = vae.likelihood.observe(torch.rand(3, 64))
    estimates = [importance_weighted(vae, x, particles=2000), naive(vae, x, particles=2000)]
    if guide == "mean-field":
        estimates.append(annealed(vae, x, steps=20, chains=16))
    for found in estimates:
        assert found.log_evidence.shape == found.bound.shape == (3,)
        assert (found.bound <= found.log_evidence).all()
        assert (found.effective_sample_size <= found.particles * (1 + 1e-9)).all()
    # An untrained decoder hardly depends on z: all estimates are good.
    spread = torch.stack([found.log_evidence for found in estimates]).std(0)
    assert (spread < 1.0).all()


def test_codes_can_be_summed_over(make_vae):
    """Two bits have four codes: log p(x) is exact."""
    vae = make_vae(guide="bernoulli-code", latent_dim=2, hidden=(8,)).double()
    x = vae.likelihood.observe(torch.rand(3, 64, dtype=torch.float64))
    codes = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 2)
    with torch.no_grad():
        log_lik = vae.likelihood(vae.decoder(codes).unsqueeze(1)).log_prob(x)
    truth = log_lik.logsumexp(0) - math.log(4)
    for estimate in ESTIMATES.values():
        found = estimate(vae, x, particles=20_000)
        assert ((found.log_evidence - truth).abs() < 4.9 * found.error + 1e-9).all()


def test_beta_does_not_count(make_vae):
    x = make_vae().likelihood.observe(torch.rand(3, 64))
    plain, scaled = (importance_weighted(make_vae(beta=beta), x, particles=5) for beta in (1.0, 4.0))
    assert torch.equal(plain.log_evidence, scaled.log_evidence)


def both_sides(vae: VAE, x: Tensor, seed: int = 0):
    return bidirectional(vae, images=len(x), steps=3, chains=2, seed=seed).lower


def short_annealing(vae: VAE, x: Tensor, seed: int = 0):
    return annealed(vae, x, steps=3, chains=2, seed=seed)


@pytest.mark.parametrize("estimate", [importance_weighted, naive, short_annealing, both_sides])
@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_changed(make_vae, estimate, training):
    """And what is found does not depend on the mode, though in training batch norm would see other images."""
    vae = make_vae(network="cnn", beta=2.0).train(training)
    x = vae.likelihood.observe(torch.rand(3, 64))
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    state = torch.get_rng_state()
    found = estimate(vae, x)
    assert vae.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    assert all(module.training == training for module in vae.modules())
    assert vae.beta == 2.0
    assert all(parameter.grad is None for parameter in vae.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert not found.log_evidence.requires_grad
    assert torch.equal(found.log_evidence, estimate(vae.eval(), x).log_evidence)


class Noisy(Guide):
    """A guide that draws numbers of its own, from every generator there is."""

    def forward(self, x):
        loc = torch.randn(2) + float(np.random.randn()) + random.gauss(0.0, 1.0)
        return dist.Normal(loc.expand(*x.shape[:-1], -1), 1.0).to_event(1)


def test_every_random_number_is_the_seeds(make_vae):
    """Also those that a guide takes from numpy or from Python, whose states are left as they were."""
    vae = make_vae(likelihood="gaussian", hidden=(8,))
    vae.posterior, x = Noisy(), torch.rand(2, 64)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    first, again, other = (importance_weighted(vae, x, particles=2, seed=s).log_evidence for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


@pytest.mark.parametrize("fails", [False, True])
def test_seeded_restores_all_states(fails):
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    with contextlib.suppress(KeyError), seeded(2**33 - 1, "cpu"):
        random.random(), np.random.rand(), torch.rand(())
        if fails:
            raise KeyError
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_seeds(make_vae):
    vae = make_vae()
    x = vae.likelihood.observe(torch.rand(2, 64))
    for estimate in (importance_weighted, naive, short_annealing, both_sides):
        first, again, other = (estimate(vae, x, seed=seed).log_evidence for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


def test_progress_is_reported(make_vae):
    vae, seen = make_vae(), []
    x = vae.likelihood.observe(torch.rand(3, 64))

    def progress(*args) -> None:
        seen.append(args)

    importance_weighted(vae, x, particles=2, progress=progress)
    assert seen == [(i, 3, "importance sampling") for i in (1, 2, 3)]
    annealed(vae, x, steps=3, chains=2, batch_size=4, progress=progress)
    assert seen[-1] == (12, 12, "annealing")
    naive(vae, x, particles=5, progress=progress)
    assert seen[-1] == (5, 5, "prior samples")
    bidirectional(vae, images=3, steps=3, chains=2, batch_size=4, progress=progress)
    assert seen[-18:] == [(i, 18, "annealing") for i in range(1, 19)]


@pytest.mark.parametrize(
    ("estimate", "wrong", "message"),
    [
        (importance_weighted, {"particles": 0}, "expected particles >= 1, got 0"),
        (naive, {"particles": 0}, "expected particles >= 1, got 0"),
        (naive, {"batch_size": 0}, "expected batch_size >= 1, got 0"),
        (annealed, {"chains": 0}, "expected ais_chains >= 1, got 0"),
        (annealed, {"steps": 0}, "expected ais_steps >= 1, got 0"),
        (annealed, {"leapfrog": 0}, "expected leapfrog >= 1, got 0"),
    ],
)
def test_wrong_numbers(make_vae, estimate, wrong, message):
    vae = make_vae()
    with pytest.raises(ValueError, match=message):
        estimate(vae, vae.likelihood.observe(torch.rand(2, 64)), **wrong)


def test_no_images(make_vae):
    for estimate in (lambda vae: naive(vae, torch.zeros(0, 64)), lambda vae: bidirectional(vae, images=0)):
        with pytest.raises(ValueError, match="expected images >= 1, got 0"):
            estimate(make_vae())


def test_codes_are_not_annealed(make_vae):
    vae = make_vae(guide="bernoulli-code")
    x = vae.likelihood.observe(torch.rand(2, 64))
    for estimate in (short_annealing, both_sides):
        with pytest.raises(ValueError, match=r"expected ais with a continuous z only, got .* BernoulliCode"):
            estimate(vae, x)

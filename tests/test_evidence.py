"""log p(x) by importance sampling, prior samples and annealing, against exact linear-Gaussian values."""

import math
from dataclasses import dataclass

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyrovae.evidence import Evidence, annealed, importance_weighted, naive
from pyrovae.guides import Guide
from pyrovae.likelihoods import LIKELIHOODS, Likelihood
from pyrovae.networks import Decoder
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


@pytest.mark.parametrize("estimate", [importance_weighted, naive, lambda *a: annealed(*a, steps=3)])
@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_changed(make_vae, estimate, training):
    vae = make_vae(network="cnn", beta=2.0).train(training)
    x = vae.likelihood.observe(torch.rand(3, 64))
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    random = torch.get_rng_state()
    found = estimate(vae, x)
    assert vae.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    assert all(module.training == training for module in vae.modules())
    assert vae.beta == 2.0
    assert all(parameter.grad is None for parameter in vae.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert not found.log_evidence.requires_grad


def test_seeds(make_vae):
    vae = make_vae()
    x = vae.likelihood.observe(torch.rand(2, 64))
    for estimate in (importance_weighted, naive, lambda *a, seed: annealed(*a, steps=3, seed=seed)):
        first, again, other = (estimate(vae, x, seed=seed).log_evidence for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


def test_the_error_of_one_particle_is_unknown_not_infinite():
    one = torch.ones(1, dtype=torch.float64)
    assert Evidence(one, one, one, one, 1).error.item() == 0


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
    with pytest.raises(ValueError, match="expected images >= 1, got 0"):
        naive(make_vae(), torch.zeros(0, 64))


def test_codes_are_not_annealed(make_vae):
    vae = make_vae(guide="bernoulli-code")
    with pytest.raises(ValueError, match=r"expected ais with a continuous z only, got .* BernoulliCode"):
        annealed(vae, vae.likelihood.observe(torch.rand(2, 64)))

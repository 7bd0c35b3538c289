"""Guides: shapes, densities, gradients and moments of each family, and what each has of its own."""

import math
import re
from copy import deepcopy
from statistics import NormalDist

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import kl_divergence

from pyrovae import runs
from pyrovae.data import Images
from pyrovae.estimators import Antithetic, Elbo, Enumerate, Rloo
from pyrovae.evaluation import importance_weighted
from pyrovae.evaluation.bounds import kl_per_image, latent_means
from pyrovae.guides import GUIDES, BernoulliCode, Guide, MeanField
from pyrovae.likelihoods import Bernoulli
from pyrovae.networks import MLP, NETWORKS, Encoder
from pyrovae.runs import pictures
from pyrovae.runs.assessment import Examination
from pyrovae.runs.config import Config
from pyrovae.training import fit
from pyrovae.vae import VAE
from tests.combinations import SMALL

SHAPE = (1, 4, 4)
F64 = torch.float64
# In standard errors. With 400 such comparisons in the suite, two-sided, a false alarm in 2e-5 of suites.
LIMIT = -NormalDist().inv_cdf(2e-5 / 800)
DENSE = [name for name, family in GUIDES.items() if family.density and not family.discrete]
FLOWS = ["iaf", "coupling"]  # of two dimensions or more
SYMMETRIC = [name for name in GUIDES if name not in ("mixture", *FLOWS)]

over_guides = pytest.mark.parametrize("name", GUIDES)
over_densities = pytest.mark.parametrize("name", DENSE)


def make_guide(name: str, latent_dim: int = 3, **settings) -> Guide:
    """A guide in a VAE, which one that refines itself asks for."""
    family, settings = MLP(hidden=(6,)), SMALL.get(name, {}) | settings
    guide = GUIDES[name](family.encoder(SHAPE), latent_dim, **settings)
    VAE(
        likelihood=Bernoulli(), decoder=family.decoder(latent_dim, SHAPE, 1), guide=guide, latent_dim=latent_dim
    )
    return guide


def far_from_simple(name: str, latent_dim: int, **settings) -> Guide:
    """One whose parameters are not small, in double precision: a VAE's decoder is told so as well."""
    guide = make_guide(name, latent_dim, **settings).double()
    if name == "refined":
        guide.log_weight.__self__.double()
    with torch.no_grad():
        guide.head.weight.mul_(2)
        for parameter in guide.steps.parameters() if name in FLOWS else ():
            parameter.mul_(2)
    return guide


def times_covered(module: nn.Module, parts: dict[str, dict[str, slice]]) -> dict[str, torch.Tensor]:
    """By parameter, how many parts each of its rows belongs to."""
    counts = {name: torch.zeros(len(p) if p.dim() else 1) for name, p in module.named_parameters()}
    for members in parts.values():
        for name, rows in members.items():
            counts[name][rows] += 1
    return counts


@over_guides
@pytest.mark.parametrize("batch", [(), (5,), (2, 5), (4, 2, 5)], ids=str)
def test_the_batch_is_that_of_the_pixels_and_the_event_z(name, batch):
    q = make_guide(name)(torch.rand(*batch, 16))
    assert (q.batch_shape, q.event_shape) == (batch, (3,))
    assert q.sample((7,)).shape == (7, *batch, 3)
    assert q.log_prob(q.sample()).shape == batch
    assert q.has_rsample == (not GUIDES[name].discrete)


@over_guides
def test_the_prior_is_standard_normal_or_fair_bits(name):
    guide, zeros = make_guide(name), torch.zeros(3, dtype=torch.float64)
    prior, z = guide.prior(zeros), guide(torch.rand(5, 16)).sample().double()
    assert (prior.batch_shape, prior.event_shape) == ((), (3,))
    expected = torch.full((5,), -3 * math.log(2), dtype=torch.float64)
    if not guide.discrete:
        expected = -0.5 * (z**2 + math.log(2 * math.pi)).sum(-1)
    torch.testing.assert_close(prior.log_prob(z), expected)


@pytest.mark.parametrize("name", SYMMETRIC)
def test_the_point_is_where_the_density_is_highest(name):
    guide = make_guide(name)
    q = guide(torch.rand(5, 16))
    point = guide.point(q)
    assert point.shape == (5, 3)
    assert (q.log_prob(point) >= q.log_prob(q.sample((1000,)))).all()


@over_guides
@pytest.mark.parametrize("network", NETWORKS)
def test_parts_cover_every_row_of_every_parameter_once(make_vae, name, network):
    vae = make_vae((1, 8, 8), guide=name, network=network, likelihood="gaussian", c="learned")
    for module in (vae, vae.posterior):
        counts = times_covered(module, module.parts())
        assert not [name for name, count in counts.items() if not (count == 1).all()]
    assert list(vae.parts()) == [*vae.posterior.parts(), "decoder"]


def test_parts_tell_the_loc_head_from_the_scale_head():
    guide = make_guide("mean-field")
    assert list(guide.parts()) == ["trunk", "loc head", "scale head"]
    x = torch.rand(5, 16)
    for part, statistic in (("loc head", lambda q: q.mean), ("scale head", lambda q: q.variance)):
        guide.zero_grad()
        statistic(guide(x)).sum().backward()
        for name, rows in guide.parts()[part].items():
            gradient = guide.get_parameter(name).grad
            assert gradient[rows].any()
            gradient[rows] = 0
            assert not gradient.any()


def test_a_guide_of_ones_own_is_one_part():
    class Own(Guide):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(16, 3)

        def forward(self, x):
            return MeanField.forward(self, x)

    own = Own()
    assert list(own.parts()) == ["encoder"]
    assert all((count == 1).all() for count in times_covered(own, own.parts()).values())
    assert not own.discrete


# Densities, and the samples they belong to


def nodes(latent_dim: int, n: int = 201) -> tuple[Tensor, Tensor]:
    """Points of R^L, dense around 0 and as far as 200, (n^L, L), and the weights of an integral over them."""
    u = torch.linspace(-6, 6, n, dtype=F64)
    points = torch.cartesian_prod(*[u.sinh()] * latent_dim).reshape(-1, latent_dim)
    steps = torch.cartesian_prod(*[u.cosh() * (u[1] - u[0])] * latent_dim).reshape(-1, latent_dim)
    return points, steps.prod(-1)


@over_densities
@pytest.mark.parametrize("latent_dim", [1, 2])
def test_a_density_integrates_to_one_and_has_its_moments(name, latent_dim):
    """By quadrature; a flow's moments are those of 256 points, off by at most a tenth of its scale here."""
    if name in FLOWS and latent_dim == 1:
        pytest.skip("flows take two dimensions or more, as is tested below")
    q = far_from_simple(name, latent_dim)(torch.rand(1, 16, dtype=F64))
    z, weights = nodes(latent_dim)
    density = q.log_prob(z.unsqueeze(1)).squeeze(1).exp() * weights
    assert density.sum().item() == pytest.approx(1, abs=1e-3)
    mean = (density.unsqueeze(-1) * z).sum(0)
    variance = (density.unsqueeze(-1) * (z - mean) ** 2).sum(0)
    loose = 0.1 if name in FLOWS else 1e-3
    torch.testing.assert_close(q.mean[0], mean, rtol=0, atol=loose * variance.sqrt().min().item())
    torch.testing.assert_close(q.variance[0], variance, rtol=2 * loose, atol=0)


def test_codes_have_probabilities_that_sum_to_one():
    q = make_guide("bernoulli-code", 3).double()(torch.rand(4, 16, dtype=F64))
    codes = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=F64)] * 3).unsqueeze(1)
    torch.testing.assert_close(q.log_prob(codes).exp().sum(0), torch.ones(4, dtype=F64))


@over_densities
def test_pathwise_gradients_are_those_of_the_integral(name):
    """d/dphi E[h(z)] in the head's biases, by 40 blocks of 200 samples against quadrature."""
    guide, x = far_from_simple(name, 2), torch.rand(1, 16, dtype=F64)

    def h(z: Tensor) -> Tensor:
        return (z[..., 0] + 0.5 * z[..., 1]).sin() + (z[..., 0] * z[..., 1]).tanh()

    q, (z, weights) = guide(x), nodes(2, 121)
    exact = (q.log_prob(z.unsqueeze(1)).squeeze(1).exp() * weights * h(z)).sum()
    (expected,) = torch.autograd.grad(exact, guide.head.bias)
    blocks = torch.stack(
        [torch.autograd.grad(h(guide(x).rsample((200,))).mean(), guide.head.bias)[0] for _ in range(40)]
    )
    error = blocks.std(0) / math.sqrt(40)
    assert ((blocks.mean(0) - expected).abs() < LIMIT * 1.3 * error + 1e-4).all()  # 1.3: Student's t of 39
    assert expected.abs().max() > 5 * error.max()  # the power to see that it is right


@over_densities
def test_given_z_have_the_density_of_drawn_ones(name):
    """Transforms remember what they made; what was drawn must score as what is given does."""
    q = far_from_simple(name, 3)(torch.rand(5, 16, dtype=F64)).expand((4, 5))
    z = q.rsample()
    drawn, given = q.log_prob(z), q.log_prob(z.detach().clone())
    torch.testing.assert_close(drawn, given, rtol=1e-9, atol=1e-9)


@over_guides
def test_a_sample_without_gradients_has_a_score_in_every_parameter(name):
    """The trap: Pyro's transforms remember a sample's noise, and would not ask for gradients through it."""
    guide = make_guide(name)
    if guide.density:
        q = guide(torch.rand(5, 16))
        (q.log_prob(q.sample()) * torch.arange(5)).sum().backward()
        assert not [n for n, p in guide.named_parameters() if p.grad is None or not p.grad.any()]


@over_guides
def test_a_guide_takes_whatever_its_encoder_takes(name):
    """Pixels and a one-hot class behind them, say."""
    guide = make_guide(name)
    guide.encoder = Encoder(nn.Linear(16 + 10, 6), (16 + 10,), 6)
    if name == "refined":
        guide.attach(lambda x, q, z: q.log_prob(z) + x.mean(-1) * z.sum(-1))
    assert guide(torch.rand(4, 5, 26)).batch_shape == (4, 5)


@over_guides
def test_a_run_is_saved_and_loaded(name, tmp_path, monkeypatch):
    monkeypatch.setattr("pyrovae.runs.training.draw_figures", lambda *_: None)
    parts = {"guide": name, "hidden": (6,), "limit": (16, 8)} | SMALL.get(name, {})
    how = {"bernoulli-code": {"estimator": "rloo"}, "point": {"estimator": "reconstruction"}}.get(name, {})
    run, _ = runs.train(Config(**parts, **how, epochs=1, figure_epochs=()), out=tmp_path / "run")
    first, again = runs.load(run), runs.load(run)
    x = torch.rand(5, 64)
    assert type(first.posterior) is GUIDES[name]
    assert torch.equal(first.encode(x), again.encode(x))
    assert not first.encode(x).requires_grad  # though whoever asks for it later may ask with gradients
    assert not first.approximate_posterior(x).stddev.requires_grad
    settings = {key: getattr(first.posterior, key) for key in SMALL.get(name, {}) if key.startswith("refine")}
    assert settings.items() <= parts.items()
    for key, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


# Closed forms


@pytest.mark.parametrize("name", ["full-covariance", "low-rank"])
def test_the_kl_of_correlated_gaussians_is_that_of_two_gaussians(name):
    guide = far_from_simple(name, 3)
    q, zeros = guide(torch.rand(5, 16, dtype=F64)), torch.zeros(3, dtype=F64)
    both = (
        dist.MultivariateNormal(q.mean, q.covariance_matrix),
        dist.MultivariateNormal(zeros, zeros.exp().diag()),
    )
    torch.testing.assert_close(kl_divergence(q, guide.prior(zeros)), kl_divergence(*both))


def test_the_kl_of_a_student_is_that_of_quadrature(make_vae):
    vae, x = (
        make_vae(SHAPE, guide="student-t", latent_dim=1, hidden=(6,), df=5.0).double(),
        torch.rand(2, 16).round(),
    )
    q, (z, weights) = vae.posterior(x.double()), nodes(1, 2001)
    log_q, log_p = (p.log_prob(z.unsqueeze(1)) for p in (q, vae.posterior.prior(vae.zeros)))
    expected = ((log_q.exp() * (log_q - log_p)) * weights.unsqueeze(1)).sum(0)
    torch.testing.assert_close(
        kl_divergence(q, vae.posterior.prior(vae.zeros).expand((2,))), expected, rtol=1e-4, atol=0
    )
    torch.testing.assert_close(kl_per_image(vae, x)[:, 0], expected.detach(), rtol=1e-4, atol=0)


def test_a_full_covariance_is_that_of_its_heads():
    guide, x = make_guide("full-covariance", 3).double(), torch.rand(5, 16, dtype=F64)
    loc, h, below = guide.head(guide.encoder(x)).split([3, 3, 3], -1)
    tril = torch.zeros(5, 3, 3, dtype=F64)
    for n in range(5):
        for i in range(3):
            tril[n, i, i] = (0.5 * h[n, i]).exp()
        tril[n, 1, 0], tril[n, 2, 0], tril[n, 2, 1] = below[n]
    q = guide(x)
    torch.testing.assert_close(q.mean, loc)
    torch.testing.assert_close(q.covariance_matrix, tril @ tril.transpose(-1, -2))


def test_a_mixture_is_the_sum_of_its_gaussians():
    guide, x = make_guide("mixture", 3, components=4).double(), torch.rand(5, 16, dtype=F64)
    loc, h, logits = guide.head(guide.encoder(x)).split([12, 12, 4], -1)
    z, each = torch.randn(5, 3, dtype=F64), 0
    for c in range(4):
        part = slice(3 * c, 3 * c + 3)
        normal = dist.Normal(loc[:, part], (0.5 * h[:, part]).exp()).to_event(1)
        each = each + logits.softmax(-1)[:, c] * normal.log_prob(z).exp()
    torch.testing.assert_close(guide(x).log_prob(z), each.log())


def test_a_mixture_of_distant_narrow_gaussians_has_finite_gradients():
    guide = make_guide("mixture", 20)
    with torch.no_grad():
        guide.head.weight.mul_(50)
    z = guide(torch.rand(50, 16)).rsample((20,))
    z.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in guide.parameters())


def test_opposite_noise_of_low_rank_is_mirrored_at_its_mean(make_vae):
    vae, x = make_vae(SHAPE, guide="low-rank", latent_dim=3, hidden=(6,)), torch.rand(5, 16).round()
    draws = Antithetic(num_particles=4).draws(*vae.pair, x)
    z, mean = draws.guide_sites["z"]["value"], vae.posterior(x).mean
    torch.testing.assert_close(z[::2] + z[1::2], 2 * mean.expand(2, 5, 3))
    assert not torch.equal(z[0], z[2])


def test_the_heads_of_a_flow_are_its_base_and_each_dimension_sees_those_before():
    guide, x = far_from_simple("iaf", 4, flow_depth=1), torch.rand(1, 16, dtype=F64)
    q = guide(x)
    torch.testing.assert_close(q.base_dist.mean, guide.outputs(guide.encoder(x))[0])
    noise = torch.randn(1, 4, dtype=F64)
    (move,) = q.transforms
    jacobian = torch.autograd.functional.jacobian(lambda e: move(e[None])[0], noise[0])
    assert torch.equal(jacobian, jacobian.tril())
    assert (jacobian.tril(-1) != 0).any()
    torch.testing.assert_close(move.inv(move(noise).clone()), noise)


# Refinement


def refined_vae(**settings) -> VAE:
    guide = make_guide("refined", 3, **settings)
    return guide.log_weight.__self__.double()


def elbo_of(vae: VAE, x: Tensor) -> float:
    with vae.evaluating():
        return -Elbo(num_particles=2000).loss(*vae.pair, x)


def test_refining_raises_the_elbo_of_an_untrained_encoder():
    """From many nats below; the error of each is a few hundredths of a nat."""
    x = torch.rand(5, 16, dtype=F64).round()
    elbos = []
    for steps in (1, 4, 16):
        vae = refined_vae(refine_steps=steps)
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in vae.parameters():
                parameter.normal_()
        elbos.append(elbo_of(vae, x))
    assert elbos[0] + 1 < elbos[1] < elbos[2] + 0.5


def test_gradients_go_through_the_steps_or_past_them():
    """Against finite differences of the whole, and of where the steps start."""
    x, probe = torch.rand(2, 16, dtype=F64).round(), torch.randn(2, 3, dtype=F64)
    for through in (True, False):
        vae = refined_vae(refine_through=through, refine_steps=3)
        bias = vae.posterior.head.bias

        def loc(vae=vae):
            return (vae.posterior(x).mean * probe).sum()

        given = torch.autograd.grad(loc(), [bias, vae.decoder.body[0].weight], allow_unused=True)
        differences = []
        with torch.no_grad():
            for i in range(3):
                ends = []
                for sign in (1, -1):
                    bias[i] += sign * 1e-5
                    ends.append(loc().item())
                    bias[i] -= sign * 1e-5
                differences.append((ends[0] - ends[1]) / 2e-5)
        expected = torch.tensor(differences, dtype=F64) if through else probe.sum(0)
        torch.testing.assert_close(given[0][:3], expected, rtol=1e-5, atol=1e-7)
        assert (given[1] is not None and given[1].any().item()) == through


def test_a_refined_guide_is_one_function_of_x_that_belongs_to_its_vae():
    vae, x = refined_vae(), torch.rand(5, 16, dtype=F64).round()
    q = vae.posterior(x)
    with torch.no_grad():
        again = vae.posterior(x)
    assert not again.mean.requires_grad
    torch.testing.assert_close(q.mean, again.mean)
    alone = torch.cat([vae.posterior(row[None]).mean for row in x])
    torch.testing.assert_close(q.mean, alone)
    names = [name for name, _ in vae.named_parameters()]
    assert len(names) == len(set(names))
    assert not [name for name, _ in vae.posterior.named_parameters() if "decoder" in name]
    copy = deepcopy(vae)
    with torch.no_grad():
        for parameter in copy.decoder.parameters():
            parameter.add_(1.0)
    torch.testing.assert_close(vae.posterior(x).mean, q.mean)
    assert not torch.allclose(copy.posterior(x).mean, q.mean)


def test_refining_climbs_the_bound_at_the_vaes_beta():
    """At a large beta the posterior is drawn to the prior."""
    vae, x = refined_vae(refine_steps=20), torch.rand(5, 16, dtype=F64).round()
    vae.beta = 1000.0
    q = vae.posterior(x)
    torch.testing.assert_close(q.mean, torch.zeros(5, 3, dtype=F64), rtol=0, atol=0.05)
    torch.testing.assert_close(q.stddev, torch.ones(5, 3, dtype=F64), rtol=0, atol=0.05)


def test_grey_pixels_and_levels_are_refined_too(make_vae):
    for likelihood in ("bernoulli", "categorical"):
        vae = make_vae(guide="refined", likelihood=likelihood, hidden=(6,))
        x, before = torch.rand(5, 64), torch.get_rng_state()
        assert vae.encode(x).isfinite().all()
        assert torch.equal(torch.get_rng_state(), before)


# Refusals


@pytest.mark.parametrize(
    ("name", "latent_dim", "settings", "message"),
    [
        ("low-rank", 2, {"rank": 0}, "expected rank >= 1, got 0"),
        ("student-t", 2, {"df": 2.0}, "expected df > 2, where the KL to a normal prior is finite, got 2.0"),
        (
            "student-t",
            2,
            {"df": math.nan},
            "expected df > 2, where the KL to a normal prior is finite, got nan",
        ),
        ("mixture", 2, {"components": 0}, "expected components >= 1, got 0"),
        ("iaf", 1, {}, "expected latent_dim >= 2 for InverseAutoregressive, got 1: use mean-field"),
        ("coupling", 1, {}, "expected latent_dim >= 2 for Coupling, got 1: use mean-field"),
        ("iaf", 3, {"flow_depth": 0}, "expected flow_depth >= 1, got 0"),
        ("coupling", 3, {"flow_width": 0}, "expected flow_width >= 1, got 0"),
        (
            "iaf",
            9,
            {"flow_width": 8},
            "expected flow_width >= latent_dim, 9, for an autoregressive network, got 8",
        ),
        ("refined", 2, {"refine_steps": 0}, "expected refine_steps >= 1, got 0"),
        ("refined", 2, {"refine_lr": 0.0}, "expected refine_lr > 0, got 0.0"),
        ("mixture", 2, {"scale_head": "square"}, "expected scale_head in exp, softplus, got 'square'"),
    ],
)
def test_what_a_family_cannot_be_made_of_is_one_line(name, latent_dim, settings, message):
    with pytest.raises(ValueError, match=rf"\A{re.escape(message)}\Z"):
        make_guide(name, latent_dim, **settings)


def test_a_refined_guide_without_a_vae_says_what_it_needs():
    guide = GUIDES["refined"](MLP(hidden=(6,)).encoder(SHAPE), 2)
    with pytest.raises(ValueError, match=r"\Aexpected a Refined guide in a VAE.*VAE\(guide=\.\.\.\)\Z"):
        guide(torch.rand(5, 16))


# Codes


def test_a_code_has_independent_bits_of_its_heads_logits():
    guide = make_guide("bernoulli-code").double()
    x = torch.rand(5, 16, dtype=torch.float64)
    p = guide.head(guide.encoder(x)).sigmoid()
    q = guide(x)
    torch.testing.assert_close(q.mean, p)
    z = torch.bernoulli(p)
    torch.testing.assert_close(q.log_prob(z), (z * p + (1 - z) * (1 - p)).log().sum(-1))
    assert set(q.sample((20,)).unique().tolist()) == {0.0, 1.0}


def test_a_vae_of_codes_samples_and_reconstructs_from_codes(make_vae):
    vae, x = make_vae(SHAPE, guide="bernoulli-code", latent_dim=4, hidden=(6,)), torch.rand(7, *SHAPE)
    assert isinstance(vae.posterior, BernoulliCode)
    probabilities = vae.encode(x)
    assert probabilities.shape == (7, 4)
    assert ((probabilities > 0) & (probabilities < 1)).all()
    torch.testing.assert_close(vae.reconstruct(x), vae.decode((probabilities > 0.5).float()))
    decoded = []
    vae.decoder.register_forward_hook(lambda _, given, __: decoded.append(*given))
    vae.sample(50)
    vae.reconstruct(x)
    assert [z.shape for z in decoded] == [(50, 4), (7, 4)]
    assert set(torch.cat(decoded).unique().tolist()) == {0.0, 1.0}


@pytest.mark.usefixtures("unchecked")
def test_a_vae_of_codes_learns_by_rloo(make_vae):
    vae = make_vae(SHAPE, guide="bernoulli-code", latent_dim=4, hidden=(16,))
    before = {name: p.detach().clone() for name, p in vae.named_parameters()}
    pixels = torch.tensor([0.05, 0.95]).repeat(32)[:, None, None, None] * torch.ones(64, *SHAPE)
    images = Images(pixels)  # dark and bright: one bit says which
    rloo, settings = Rloo(num_particles=8), {"lr": 0.01, "batch_size": 8, "quiet": True}
    (first,) = fit(vae, images, images, estimator=rloo, epochs=1, **settings).history
    assert all(math.isfinite(value) for value in first.values() if isinstance(value, float))
    assert not [name for name, p in vae.named_parameters() if torch.equal(p, before[name])]
    *_, last = fit(vae, images, images, estimator=rloo, epochs=10, **settings).history
    assert last["validation_bound"] > first["validation_bound"] + 1
    x = vae.likelihood.observe(pixels.flatten(1))
    with vae.evaluating():
        exact = Enumerate().loss(*vae.pair, x)
        assert Rloo(num_particles=200).loss(*vae.pair, x) == pytest.approx(exact, rel=0.02)


def test_a_code_has_no_pathwise_gradient(make_vae):
    vae, images = make_vae(SHAPE, guide="bernoulli-code", hidden=(6,)), Images(torch.rand(4, *SHAPE))
    message = (
        r"\Aexpected a reparameterized sampler at guide site 'z'.*use the score function \(use_rep=False\)\Z"
    )
    with pytest.raises(ValueError, match=message):
        Elbo().loss(*vae.pair, images.pixels.flatten(1).round())
    with pytest.raises(ValueError, match=message):
        fit(vae, images, images, epochs=1, quiet=True)


def test_a_refined_guide_is_validated_as_it_is_trained(make_vae):
    vae = make_vae(guide="refined", hidden=(8,), beta=4.0)
    x = vae.observe(torch.rand(5, 64))
    trained = vae.posterior_of(x).mean
    with vae.evaluating():
        torch.testing.assert_close(vae.posterior_of(x).mean, trained)
    assert vae.trained_beta is None


class Fixed(Guide):
    """One Gaussian for all data, whose mean is a parameter itself; the encoder is for nothing."""

    def __init__(self, encoder, latent_dim):
        super().__init__()
        self.loc, self.scale = nn.Parameter(torch.zeros(latent_dim)), nn.Parameter(torch.ones(latent_dim))

    def forward(self, x):
        loc, scale = (value.expand(*x.shape[:-1], -1) for value in (self.loc, self.scale))
        return dist.Normal(loc, scale).to_event(1)


@pytest.mark.usefixtures("unchecked", "no_figures")
def test_a_guide_of_parameters_alone_is_trained_judged_and_pictured(tmp_path, monkeypatch):
    """Views of a parameter want gradients even where none are taken."""
    config = Config(guide=f"{__name__}:Fixed", epochs=1, limit=(40, 20), hidden=(4,), figure_epochs=())
    run, _ = runs.train(config, out=tmp_path / "run")
    vae = runs.load(run)
    images = config.make_dataset().validation
    x = vae.observe(images.pixels.flatten(1))
    found = Examination(particles=2, limit=10).of_vae(vae, config.make_dataset())
    assert found.latents.active == 0
    assert found.latents.kl == pytest.approx([0, 0], abs=1e-2)
    given = [
        vae.encode(images.pixels),
        vae.reconstruct(images.pixels),
        latent_means(vae, x),
        kl_per_image(vae, x),
    ]
    codes = pictures.encode(run, split="test")
    given += [codes.mean, codes.scale, importance_weighted(vae, x, particles=2).log_evidence, vae.sample(2)]
    assert not any(value.requires_grad for value in given)
    codes.save(tmp_path / "codes.npz")
    assert len(pictures.latent(run).axes[0].collections) > 0
    assert pictures.reconstruct(run, images=2).axes

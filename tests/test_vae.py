"""The VAE as a Pyro pair and as a user meets it; its guides against their formulas."""

import contextlib

import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn

from pyrovae.guides import GUIDES, SCALE_HEADS, Guide, MeanField
from pyrovae.likelihoods import LIKELIHOODS, Bernoulli
from pyrovae.networks import MLP, NETWORKS
from pyrovae.vae import VAE, prior_grid

F64 = torch.float64
SHAPE = (2, 6, 5)
SMALL = {name: {} for name in NETWORKS} | {"mlp": {"hidden": (12, 7)}, "cnn": {"channels": (4, 6)}}

over_likelihoods = pytest.mark.parametrize("likelihood", LIKELIHOODS)
over_networks = pytest.mark.parametrize("network", NETWORKS)


def images(n=5):
    return torch.rand(n, *SHAPE)


def observations(vae, n=5):
    return vae.likelihood.observe(images(n).flatten(1))


def normal_log_prob(x, loc, variance):
    return -0.5 * ((x - loc) ** 2 / variance + (2 * torch.pi * variance).log())


def state(vae):
    return {name: value.clone() for name, value in vae.state_dict().items()}


def missing_gradient(module):
    return [n for n, p in module.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


# Images in, images out


@over_likelihoods
@over_networks
@pytest.mark.parametrize("guide", GUIDES)
def test_images_in_and_out(make_vae, likelihood, network, guide):
    vae = make_vae(SHAPE, likelihood=likelihood, network=network, guide=guide, latent_dim=3, **SMALL[network])
    x = images()
    q = vae.approximate_posterior(x)
    assert (q.batch_shape, q.event_shape) == ((5,), (3,))
    assert vae.encode(x).shape == (5, 3)
    assert vae.decode(torch.randn(3)).shape == SHAPE
    assert vae.decode(torch.randn(2, 4, 3)).shape == (2, 4, *SHAPE)
    for pictures in (vae.reconstruct(x), vae.sample(5), vae.decode(100 * torch.randn(5, 3))):
        assert pictures.shape == (5, *SHAPE)
        assert not pictures.requires_grad
        assert ((pictures >= 0) & (pictures <= 1)).all()


def test_the_encoder_sees_pixels_as_in_training(make_vae):
    vae, images = make_vae(binarize="threshold"), torch.rand(5, 1, 8, 8)
    assert torch.equal(vae.encode(images), vae.encode((images >= 0.5).float()))


def test_images_may_be_flat_and_of_any_precision(make_vae):
    vae, x = make_vae(SHAPE), images()
    assert torch.equal(vae.encode(x), vae.encode(x.flatten(1)))
    assert torch.equal(vae.encode(x), vae.encode(x.double()))
    assert torch.equal(vae.reconstruct(x), vae.reconstruct(x.flatten(1)))
    torch.testing.assert_close(vae.reconstruct(x), vae.decode(vae.approximate_posterior(x).mean))


def test_a_seed_gives_the_same_samples_each_time(make_vae):
    vae = make_vae(SHAPE)
    assert torch.equal(vae.sample(3, seed=1), vae.sample(3, seed=1))
    assert not torch.equal(vae.sample(3, seed=1), vae.sample(3, seed=2))
    assert not torch.equal(vae.sample(3), vae.sample(3))
    before = torch.get_rng_state()
    vae.sample(3, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


@over_likelihoods
@over_networks
def test_double_precision(make_vae, likelihood, network):
    vae = make_vae(SHAPE, likelihood=likelihood, network=network, **SMALL[network]).double()
    loss = Trace_ELBO().differentiable_loss(*vae.pair, observations(vae))
    assert loss.dtype == F64
    for result in (vae.encode(images()), vae.reconstruct(images()), vae.sample(2)):
        assert result.dtype == F64


# Evaluation changes nothing


@pytest.mark.parametrize("fails", [False, True])
def test_evaluating_leaves_all_as_it_was(make_vae, fails):
    vae = make_vae(SHAPE, network="cnn", channels=(4,), beta=0.5)
    vae.posterior.eval()
    vae.posterior.head.train()  # a mixed state
    modes = {name: module.training for name, module in vae.named_modules()}
    assert set(modes.values()) == {True, False}
    with contextlib.suppress(KeyError), vae.evaluating():
        assert not any(module.training for module in vae.modules())
        assert vae.beta == 1
        assert not torch.is_grad_enabled()
        if fails:
            raise KeyError
    assert {name: module.training for name, module in vae.named_modules()} == modes
    assert vae.beta == 0.5
    assert torch.is_grad_enabled()


class Hiding(Guide):
    """A guide whose network stands in a list, where PyTorch does not see it."""

    def __init__(self, pixels):
        super().__init__()
        self.networks = [nn.Sequential(nn.Linear(pixels, 2), nn.BatchNorm1d(2), nn.Dropout(0.5))]

    def forward(self, x):
        return dist.Normal(self.networks[0](x), 1.0).to_event(1)


@pytest.mark.parametrize("training", [True, False])
def test_hidden_networks_are_evaluated_too(make_vae, training):
    vae = make_vae(SHAPE, hidden=(4,))
    vae.posterior = Hiding(60)
    hidden, x = vae.posterior.networks[0].train(training), images()
    before = {name: value.clone() for name, value in hidden.state_dict().items()}
    first, again = vae.encode(x), vae.encode(x)
    assert torch.equal(first, again)
    assert all(torch.equal(value, before[name]) for name, value in hidden.state_dict().items())
    assert [module.training for module in hidden.modules()] == [training] * 4
    assert torch.equal(hidden(x.flatten(1)), first) == (not training)


def test_evaluation_moves_no_running_statistics(make_vae):
    vae = make_vae(SHAPE, network="cnn", channels=(4,)).train()
    before = state(vae)
    first = vae.reconstruct(images())
    vae.encode(images())
    vae.sample(4)
    after = vae.state_dict()
    assert any("running_mean" in name for name in before)
    assert not [name for name in before if not torch.equal(before[name], after[name])]
    assert first.shape == (5, *SHAPE)


def test_a_guide_is_refined_for_the_beta_that_it_was_trained_for(make_vae):
    """log p(x|z) / beta + log p(z) - log q(z|x), in training and in evaluation, where beta counts as 1."""
    vae = make_vae(SHAPE, likelihood="gaussian", guide="refined", beta=4.0, latent_dim=3, hidden=(8,)).double()
    x, q = images(4).flatten(1).double(), dist.Normal(torch.zeros(4, 3, dtype=F64), 0.5).to_event(1)
    z = torch.randn(6, 4, 3, dtype=F64)
    prior = normal_log_prob(z, 0, torch.ones((), dtype=F64)).sum(-1)
    expected = vae.log_lik(z, x) / 4 + prior - q.log_prob(z)

    def check() -> None:
        torch.testing.assert_close(vae._log_weight(x, q, z), expected)

    check()
    refined = vae.posterior(x).mean
    with vae.evaluating():
        check()
        with vae.evaluating():
            check()
        torch.testing.assert_close(vae.posterior(x).mean, refined)
        assert vae.beta == 1
    assert vae.trained_beta is None
    vae.beta = 2.0  # a step of a warm-up
    with vae.evaluating():
        expected = vae.log_lik(z, x) / 2 + prior - q.log_prob(z)
        check()


# The pair


@over_likelihoods
@over_networks
def test_sites_are_z_and_x_in_the_plate_data(make_vae, likelihood, network):
    vae = make_vae(SHAPE, likelihood=likelihood, network=network, latent_dim=3, **SMALL[network])
    x = observations(vae)
    for program, sites in ((vae.model, {"z": 3, "x": 60}), (vae.guide, {"z": 3})):
        nodes = poutine.trace(program).get_trace(x).nodes
        found = {n for n, node in nodes.items() if node["type"] == "sample" and n != "data"}
        assert found == set(sites)
        for name, size in sites.items():
            assert [(frame.name, frame.size) for frame in nodes[name]["cond_indep_stack"]] == [("data", 5)]
            assert (nodes[name]["fn"].batch_shape, nodes[name]["fn"].event_shape) == ((5,), (size,))
            assert nodes[name]["is_observed"] == (name == "x")


def test_the_model_is_the_prior_times_the_likelihood(make_vae):
    vae = make_vae(SHAPE, likelihood="gaussian", c=0.1).double()
    x = images().flatten(1).double()
    trace = poutine.trace(vae.pair[0]).get_trace(x)
    z = trace.nodes["z"]["value"]
    decoded = vae.decoder(z).squeeze(-1).sigmoid()
    one, c = torch.ones((), dtype=F64), torch.tensor(0.1, dtype=F64)
    expected = normal_log_prob(z, 0, one).sum() + normal_log_prob(x, decoded, c).sum()
    torch.testing.assert_close(trace.log_prob_sum(), expected)


@pytest.mark.parametrize("beta", [0.25, 1.0, 4.0])
def test_beta_weighs_the_terms_of_the_kl_alone(make_vae, beta):
    vae = make_vae(SHAPE, beta=beta)
    x = observations(vae)
    q = poutine.trace(vae.guide).get_trace(x)
    p = poutine.trace(poutine.replay(vae.model, q)).get_trace(x)
    z = q.nodes["z"]["value"]
    prior = normal_log_prob(z, 0, torch.ones(())).sum()
    scored = vae.posterior(vae.likelihood.to_pixels(x)).log_prob(z).sum()
    reconstruction = p.nodes["x"]["fn"].log_prob(x).sum()
    torch.testing.assert_close(p.log_prob_sum(), beta * prior + reconstruction)
    torch.testing.assert_close(q.log_prob_sum(), beta * scored)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("beta", 0.0), ("beta", -1.0), ("beta", float("nan")), ("latent_dim", 0)],
)
def test_refuses_bad_settings(setting, value):
    family = MLP(hidden=(4,))
    parts = {"decoder": family.decoder(2, SHAPE, 1), "guide": MeanField(family.encoder(SHAPE), 2)}
    with pytest.raises(ValueError, match=f"expected {setting}"):
        VAE(likelihood=Bernoulli(), **parts, **{"latent_dim": 2, setting: value})


@over_likelihoods
@over_networks
def test_every_parameter_gets_gradient(make_vae, likelihood, network):
    # In evaluation mode: batch norm in training mode cancels the bias of the convolution before it.
    learned = {"c": "learned"} if likelihood == "gaussian" else {}
    vae = make_vae(SHAPE, likelihood=likelihood, network=network, **SMALL[network], **learned).eval()
    Trace_ELBO().differentiable_loss(*vae.pair, observations(vae)).backward()
    assert not missing_gradient(vae)


def test_a_learned_c_is_the_vaes_own(make_vae):
    a, b = (make_vae(SHAPE, likelihood="gaussian", c="learned", hidden=(8,), seed=seed) for seed in (0, 1))
    assert "learned.log_c" in a.state_dict()
    x = observations(a)
    a.model(x)  # leaves its parameters in Pyro's global store
    with torch.no_grad():
        b.learned["log_c"].fill_(1.0)
    trace = poutine.trace(b.model).get_trace(x)
    scale = trace.nodes["x"]["fn"].base_dist.scale
    torch.testing.assert_close(scale, torch.full_like(scale, 0.5).exp())
    trace.log_prob_sum().backward()
    assert b.learned["log_c"].grad.abs() > 0
    assert a.learned["log_c"].grad is None


# The grid


@pytest.mark.parametrize("side", [1, 2, 7, 20])
def test_prior_grid_lies_at_even_quantiles(side):
    z, quantiles = prior_grid(side)
    assert z.shape == (side, side, 2)
    torch.testing.assert_close(quantiles, (2 * torch.arange(side) + 1) / (2 * side))
    cdf = 0.5 * (1 + torch.erf(z / 2**0.5))
    for k in range(side):
        torch.testing.assert_close(cdf[:, k, 0], quantiles[k].expand(side))  # [i, j]: j along z1
        torch.testing.assert_close(cdf[k, :, 1], quantiles[k].expand(side))  # and i along z2


# Guides


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("head", SCALE_HEADS)
def test_mean_field_is_the_diagonal_gaussian_of_its_head(head, dtype):
    loc, h = torch.tensor([0.3, -2.0, 0.0], dtype=dtype), torch.tensor([-30.0, 0.5, 4.0], dtype=dtype)
    variance = {"exp": h.exp(), "softplus": (1 + h.exp()).log() + 1e-8}[head]
    guide = MeanField(MLP(hidden=(4,)).encoder(SHAPE), 3, scale_head=head).to(dtype)
    with torch.no_grad():  # the same Gaussian for all images
        guide.head.weight.zero_()
        guide.head.bias.copy_(torch.cat([loc, h]))
    q = guide(torch.rand(2, 5, 60, dtype=dtype))
    torch.testing.assert_close(q.mean, loc.expand(2, 5, 3))
    torch.testing.assert_close(q.variance, variance.expand(2, 5, 3))
    z = loc + torch.randn(2, 5, 3, dtype=dtype) * variance.sqrt()
    torch.testing.assert_close(q.log_prob(z), normal_log_prob(z, loc, variance).sum(-1))


@pytest.mark.parametrize("head", SCALE_HEADS)
def test_mean_field_is_finite_for_large_features(head):
    h = torch.tensor([-80.0, 0.0, 80.0], requires_grad=True)
    scale = SCALE_HEADS[head](h)
    scale.log().sum().backward()
    assert ((scale > 0) & scale.isfinite()).all()
    assert h.grad.isfinite().all()


def test_mean_field_refuses_an_unknown_head():
    with pytest.raises(ValueError, match="expected scale_head"):
        MeanField(MLP().encoder(SHAPE), 2, scale_head="relu")


class FullCovariance(Guide):  # an extension, in fewer than ten lines
    def __init__(self, encoder, latent_dim):
        super().__init__()
        self.loc = nn.Sequential(encoder, nn.Linear(encoder.out_features, latent_dim))
        self.factor = nn.Parameter(torch.eye(latent_dim))

    def forward(self, x):
        return dist.MultivariateNormal(self.loc(x), scale_tril=self.factor.tril())


@over_networks
def test_a_guide_of_ones_own_needs_only_forward(network):
    family = NETWORKS[network](**SMALL[network])
    vae = VAE(
        likelihood=Bernoulli(),
        decoder=family.decoder(3, SHAPE, 1),
        guide=FullCovariance(family.encoder(SHAPE), 3),
        latent_dim=3,
    ).eval()
    Trace_ELBO().differentiable_loss(*vae.pair, observations(vae)).backward()
    assert not missing_gradient(vae)
    assert vae.reconstruct(images()).shape == (5, *SHAPE)

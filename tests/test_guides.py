"""Guides: their shapes, their priors, the z that stands for an image, and the parts of their parameters."""

import math

import pytest
import torch
from torch import nn

from pyrovae.data import Images
from pyrovae.estimators import Elbo, Enumerate, Rloo
from pyrovae.guides import GUIDES, BernoulliCode, Guide, MeanField
from pyrovae.networks import MLP, NETWORKS
from pyrovae.training import fit

SHAPE = (1, 4, 4)

over_guides = pytest.mark.parametrize("name", GUIDES)


def make_guide(name: str, latent_dim: int = 3) -> Guide:
    return GUIDES[name](MLP(hidden=(6,)).encoder(SHAPE), latent_dim)


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


@over_guides
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

"""Antithetic samples: mirrored pair by pair, and each of them a sample of its distribution."""

from statistics import NormalDist

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import transforms

from pyrovae.estimators.antithetic import antithetic_pairs

F64 = torch.float64
LIMIT = -NormalDist().inv_cdf(2e-5 / 800)  # in standard errors, as in test_estimators
K, N = 6, 5_000  # particles and data: 15,000 independent pairs
LOC, SCALE = torch.tensor([0.5, -1.0], dtype=F64), torch.tensor([0.7, 1.5], dtype=F64)
TANH = transforms.TanhTransform()
TRIL = torch.tensor([[0.9, 0.0], [-0.6, 0.4]], dtype=F64)


def many(fn):
    """The distribution for each of K particles of N data."""
    return fn.expand((K, N))


def flow(*moves, narrow=1.0):
    base = dist.Normal(narrow * LOC.expand(K, N, 2), narrow * SCALE).to_event(1)
    return dist.TransformedDistribution(base, list(moves))


# A distribution, and the noise that its samples are made of: with loc and scale taken out, symmetric about 0.
MIRRORED = {
    "normal": (many(dist.Normal(LOC, SCALE).to_event(1)), lambda z: (z - LOC) / SCALE),
    "no event": (many(dist.Normal(LOC[0], SCALE[0])).mask(True), lambda z: (z - LOC[0]) / SCALE[0]),
    "laplace": (many(dist.Laplace(LOC, SCALE).to_event(1)), lambda z: (z - LOC) / SCALE),
    "student": (many(dist.StudentT(5.0, LOC, SCALE).to_event(1)), lambda z: (z - LOC) / SCALE),
    "full": (
        many(dist.MultivariateNormal(LOC, scale_tril=TRIL)),
        lambda z: torch.linalg.solve_triangular(TRIL, (z - LOC).unsqueeze(-1), upper=False).squeeze(-1),
    ),
    "low rank": (many(dist.LowRankMultivariateNormal(LOC, TRIL[:, :1], SCALE)), lambda z: z - LOC),
    "flow": (
        flow(transforms.AffineTransform(1.0, 0.5), transforms.ExpTransform()),
        lambda z: ((z.log() - 1) / 0.5 - LOC) / SCALE,
    ),
    "flow of a flow": (  # narrow, as tanh loses digits near 1 and -1
        dist.TransformedDistribution(flow(transforms.AffineTransform(-0.2, 3.0), narrow=0.1), [TANH]),
        lambda z: ((z.atanh() + 0.2) / 3 - 0.1 * LOC) / (0.1 * SCALE),
    ),
}


@pytest.mark.parametrize("name", MIRRORED)
def test_particles_2j_and_2j_plus_1_have_opposite_noise(name):
    fn, noise_of = MIRRORED[name]
    noise = noise_of(antithetic_pairs(fn))
    torch.testing.assert_close(noise[1::2], -noise[::2], rtol=1e-9, atol=1e-9)
    assert (noise[0] - noise[2]).abs().min() > 0
    assert (noise[:, 0] - noise[:, 1]).abs().min() > 0


@pytest.mark.parametrize("name", MIRRORED)
def test_each_particle_is_a_sample_of_the_distribution(name):
    """The first and second moments of its noise, against those of as many independent samples."""
    # Power: the limit is 4 % of a standard deviation of the noise and of its square.
    fn, noise_of = MIRRORED[name]
    mine, independent = noise_of(antithetic_pairs(fn)), noise_of(fn.sample())
    for power in (1, 2):
        for particle in (0, 1):
            a, b = mine[particle::2] ** power, independent[particle::2] ** power
            error = ((a.var((0, 1)) + b.var((0, 1))) / (K * N / 2)).sqrt()
            assert ((a.mean((0, 1)) - b.mean((0, 1))).abs() < LIMIT * error).all()
    if noise_of(fn.sample()).dim() == 3:  # what the dimensions have to do with each other
        a, b = mine[::2].prod(-1), independent[::2].prod(-1)
        assert (a.mean() - b.mean()).abs() < LIMIT * ((a.var() + b.var()) / (K * N / 2)).sqrt()


@pytest.mark.parametrize("transformed", [True, False])
def test_gradients_go_through_both_of_a_pair(transformed):
    loc, scale = LOC.clone().requires_grad_(), SCALE.clone().requires_grad_()
    fn = dist.Normal(loc.expand(4, 3, 2), scale.expand(4, 3, 2)).to_event(1)
    z = antithetic_pairs(dist.TransformedDistribution(fn, [transforms.ExpTransform()]) if transformed else fn)
    noise = ((z.log() if transformed else z).detach() - LOC) / SCALE
    slope = z.detach() if transformed else torch.ones_like(z)
    for half in (slice(0, None, 2), slice(1, None, 2)):
        mine = torch.autograd.grad(z[half].sum(), (loc, scale), retain_graph=True)
        expected = slope[half].sum((0, 1)), (slope * noise)[half].sum((0, 1))
        torch.testing.assert_close(mine, expected)


def test_bits_of_a_pair_are_one_at_opposite_uniforms():
    probs = torch.tensor([0.2, 0.5, 0.9], dtype=F64)
    bits = antithetic_pairs(many(dist.Bernoulli(probs).to_event(1)))
    first, second = bits[::2], bits[1::2]
    # u < p and 1 - u < p hold together with chance max(2 p - 1, 0).
    both = (first * second).mean((0, 1))
    expected = (2 * probs - 1).clamp(min=0)
    error = (expected * (1 - expected) / (K * N / 2)).sqrt()
    assert ((both - expected).abs() <= LIMIT * error + 1e-12).all()
    for part in (first, second):
        error = (probs * (1 - probs) / (K * N / 2)).sqrt()
        assert ((part.mean((0, 1)) - probs).abs() < LIMIT * error).all()


def test_a_point_is_its_own_mirror_image():
    point = torch.arange(6.0).reshape(2, 3)
    assert torch.equal(antithetic_pairs(dist.Delta(point).to_event(1)), point)

"""The mixture's pathwise gradients and the flow's moments, each against an independent twin."""

import math

import pytest
import torch
from pyro.distributions.transforms import AffineTransform
from scipy.optimize import brentq
from torch import Tensor
from torch.distributions import ExpTransform, Independent, Normal

from pyrovae.guides.distributions import Flow, GaussianMixture

F64 = torch.float64


def conditional_cdf(value: float, before: list[float], logits, loc, scale) -> float:
    """F(z_l | z_1, ..., z_(l-1)) of a mixture, in plain numbers, for parameters (C,), (C, L) and (C, L)."""
    at, total, below = len(before), 0.0, 0.0
    for c, logit in enumerate(logits):
        weight = math.exp(logit)
        for i, z in enumerate(before):
            weight *= math.exp(-0.5 * ((z - loc[c][i]) / scale[c][i]) ** 2) / scale[c][i]
        total += weight
        below += weight * 0.5 * math.erfc((loc[c][at] - value) / (scale[c][at] * math.sqrt(2)))
    return below / total


def moved(z: list[float], old: tuple, new: tuple) -> list[float]:
    """The z with the same conditional distribution functions under new parameters, by bisection."""
    found: list[float] = []
    for i, value in enumerate(z):
        u = conditional_cdf(value, z[:i], *old)
        found.append(
            brentq(lambda v, u=u: conditional_cdf(v, found, *new) - u, value - 1, value + 1, xtol=1e-15)
        )
    return found


@pytest.mark.parametrize("seed", range(3))
def test_a_samples_gradient_is_that_of_its_distribution_functions(seed):
    """Against central differences of the z that keeps its distribution functions, in three dimensions."""
    torch.manual_seed(seed)
    parameters = [torch.randn(3, dtype=F64), torch.randn(3, 3, dtype=F64), 0.5 + torch.rand(3, 3, dtype=F64)]
    for parameter in parameters:
        parameter.requires_grad_()
    z = GaussianMixture(*parameters).rsample()
    values, step = [parameter.tolist() for parameter in parameters], 1e-5
    for i in range(3):
        gradients = torch.autograd.grad(z[i], parameters, retain_graph=True)
        for which, gradient in enumerate(gradients):
            for index in (
                [(c,) for c in range(3)] if which == 0 else [(c, d) for c in range(3) for d in range(3)]
            ):
                sides = []
                for sign in (1, -1):
                    new = [torch.tensor(value, dtype=F64) for value in values]
                    new[which][index] += sign * step
                    sides.append(moved(z.tolist(), values, [each.tolist() for each in new])[i])
                expected = (sides[0] - sides[1]) / (2 * step)
                assert gradient[index].item() == pytest.approx(expected, abs=1e-8)


def test_the_gradients_of_moments_are_known():
    """E[z_1 z_2^2] of a mixture in closed form; the mean of 50,000 gradients within 4.9 standard errors."""
    torch.manual_seed(0)
    n, logits = 50_000, torch.tensor([0.3, -0.4], dtype=F64)
    loc = torch.tensor([[0.5, -1.0], [-0.7, 0.2]], dtype=F64)
    scale = torch.tensor([[0.6, 1.1], [1.3, 0.8]], dtype=F64)
    own = [t.expand(n, *t.shape).clone().requires_grad_() for t in (logits, loc, scale)]
    z = GaussianMixture(*own).rsample()
    draws = torch.autograd.grad((z[:, 0] * z[:, 1] ** 2).sum(), own)
    given = [t.clone().requires_grad_() for t in (logits, loc, scale)]
    w = given[0].softmax(-1)
    moment = (w * given[1][:, 0] * (given[1][:, 1] ** 2 + given[2][:, 1] ** 2)).sum()
    for found, expected in zip(draws, torch.autograd.grad(moment, given), strict=True):
        error = found.std(0) / math.sqrt(n)
        assert ((found.mean(0) - expected).abs() <= 4.9 * error).all()
        assert (error < 0.05).all()


def test_components_are_drawn_with_their_weights():
    """They are so far apart that each sample's component is known. Within 4.9 standard errors."""
    torch.manual_seed(0)
    weights = torch.tensor([0.1, 0.6, 0.3, 0.0], dtype=F64)
    loc = torch.tensor([[0.0], [100.0], [200.0], [300.0]], dtype=F64)
    drawn = GaussianMixture(weights.log(), loc, torch.ones_like(loc)).sample((20_000,)).squeeze(-1)
    for c, weight in enumerate(weights.tolist()):
        fraction = ((drawn - loc[c]).abs() < 50).double().mean().item()
        assert abs(fraction - weight) <= 4.9 * math.sqrt(weight * (1 - weight) / 20_000)


def test_a_mixtures_moments_are_those_of_its_samples():
    """Within 4.9 standard errors of 100,000 samples, in more than one batch shape."""
    torch.manual_seed(0)
    q = GaussianMixture(
        torch.randn(2, 3, dtype=F64), torch.randn(2, 3, 2, dtype=F64), 0.5 + torch.rand(2, 3, 2, dtype=F64)
    )
    z = q.sample((100_000,))
    for found, values in ((q.mean, z), (q.variance, (z - q.mean) ** 2)):
        assert ((values.mean(0) - found).abs() < 4.9 * values.std(0) / math.sqrt(len(z))).all()


def flow(*transforms, loc: Tensor, scale: Tensor) -> Flow:
    return Flow(Independent(Normal(loc, scale), 1), list(transforms))


def test_a_flows_moments_are_exact_for_affine_transforms():
    loc, scale = torch.tensor([[1.0, -2.0, 0.5]] * 4, dtype=F64), torch.tensor([[0.5, 2.0, 1.5]] * 4, dtype=F64)
    q = flow(AffineTransform(3.0, -2.0), loc=loc, scale=scale)
    torch.testing.assert_close(q.mean, 3 - 2 * loc)
    torch.testing.assert_close(q.variance, 4 * scale**2)


@pytest.mark.parametrize("latent_dim", [2, 200])
def test_a_flows_moments_are_near_those_of_a_log_normal(latent_dim):
    """E[exp(s e)] = exp(s^2 / 2) and the variance exp(s^2) (exp(s^2) - 1), over points off by a tenth or so."""
    zeros, scale = torch.zeros(latent_dim, dtype=F64), torch.full((latent_dim,), 0.4, dtype=F64)
    q, s2 = flow(ExpTransform(), loc=zeros, scale=scale), 0.16
    variance = math.exp(s2) * (math.exp(s2) - 1)
    assert (q.mean - math.exp(s2 / 2)).abs().max() < 5 * math.sqrt(variance / 256)
    assert q.variance.mean().item() == pytest.approx(variance, rel=0.2)
    assert torch.equal(q.mean, q.mean)
    assert not q.mean.requires_grad

"""What guides need and Pyro lacks: a mixture with pathwise gradients, a flow with moments, KLs to a normal."""

import math
from functools import cached_property, lru_cache

import numpy as np
import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import (
    Independent,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    StudentT,
    constraints,
    register_kl,
)

POINTS, POINTS_AT_A_TIME = 256, 32  # of a flow's base, from which its moments are estimated


class GaussianMixture(dist.TorchDistribution):
    """sum_c w_c N(loc_c, diag(scale_c^2)), with samples that carry pathwise gradients.

    A sample's conditional distribution functions u_l = F(z_l | z_1, ..., z_(l-1)) are uniform whatever
    the parameters are. So it moves with them as u stays: dz = -J^-1 du with the lower triangular
    J = du/dz, in any number of dimensions (Implicit Reparameterization Gradients, Figurnov, Mohamed &
    Mnih, 2018, https://arxiv.org/abs/1805.08498, eq. 6; for mixtures, Stochastic Backpropagation
    through Mixture Density Distributions, Graves, 2016, https://arxiv.org/abs/1607.05690). First
    derivatives only.

    Args:
        logits: (..., C), the weights' logarithms, up to a constant.
        loc: (..., C, L).
        scale: (..., C, L), standard deviations.

    Example:
        >>> two = GaussianMixture(torch.zeros(2), torch.tensor([[-1.0], [1.0]]), torch.ones(2, 1))
        >>> two.mean, two.variance
        (tensor([0.]), tensor([2.]))
    """

    arg_constraints = {
        "logits": constraints.real_vector,
        "loc": constraints.independent(constraints.real, 2),
        "scale": constraints.independent(constraints.positive, 2),
    }
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self,
        logits: Float[Tensor, "*batch C"],
        loc: Float[Tensor, "*batch C L"],
        scale: Float[Tensor, "*batch C L"],
        validate_args: bool | None = None,
    ):
        self.logits, self.loc, self.scale = logits, loc, scale
        super().__init__(logits.shape[:-1], loc.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape, _instance=None):
        shape = torch.Size(batch_shape)
        own = (t.expand(shape + t.shape[-n:]) for t, n in ((self.logits, 1), (self.loc, 2), (self.scale, 2)))
        return GaussianMixture(*own, validate_args=False)

    @property
    def weights(self) -> Float[Tensor, "*batch C 1"]:
        """w_c, which sum to 1."""
        return self.logits.softmax(-1).unsqueeze(-1)

    @property
    def mean(self) -> Tensor:
        return (self.weights * self.loc).sum(-2)

    @property
    def variance(self) -> Tensor:
        around = self.loc - self.mean.unsqueeze(-2)
        return (self.weights * (self.scale**2 + around**2)).sum(-2)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        terms, _ = self._terms(value)
        return (self.logits.log_softmax(-1) + terms.sum(-1)).logsumexp(-1)

    def _terms(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """log N(z_l; loc_cl, scale_cl) and (z_l - loc_cl) / scale_cl, (..., C, L)."""
        e = (z.unsqueeze(-2) - self.loc) / self.scale
        return -0.5 * e**2 - self.scale.log() - 0.5 * math.log(2 * math.pi), e

    def rsample(self, sample_shape=()) -> Tensor:
        many = self.expand(torch.Size(sample_shape) + self.batch_shape)
        with torch.no_grad():
            u = torch.rand_like(many.logits[..., :1])
            which = (u > many.logits.softmax(-1).cumsum(-1)[..., :-1]).sum(-1)
            index = which[..., None, None].expand(*which.shape, 1, many.loc.shape[-1])
            loc, scale = (t.gather(-2, index).squeeze(-2) for t in (many.loc, many.scale))
            z = loc + scale * torch.randn_like(loc)
        return many._moving(z) if torch.is_grad_enabled() else z

    def _moving(self, z: Tensor) -> Tensor:
        """The same z, with its gradient in the parameters."""
        terms, e = self._terms(z)
        before = torch.cat([torch.zeros_like(terms[..., :1]), terms[..., :-1].cumsum(-1)], -1)
        posterior = (self.logits.unsqueeze(-1) + before).softmax(-2)  # of the component, given z_1..z_(l-1)
        u = (posterior * torch.special.ndtr(e)).sum(-2)
        with torch.no_grad():
            density = (posterior * terms.exp()).sum(-2)
            excess = posterior * (torch.special.ndtr(e) - u.unsqueeze(-2))
            jacobian = excess.transpose(-1, -2) @ (-e / self.scale) / density.unsqueeze(-1)
        change = ((u - u.detach()) / density).unsqueeze(-1)
        moved = torch.linalg.solve_triangular(jacobian, change, upper=False, unitriangular=True)
        return z - moved.squeeze(-1)


class Flow(dist.TransformedDistribution):
    """A transformed diagonal Gaussian, with a mean and a variance.

    No closed form is known. They are averages over POINTS fixed points of the base (more in more than
    POINTS / 2 dimensions), in opposite pairs whose covariance is exactly the base's: exact for affine
    transforms, else off by about a standard deviation over sqrt(POINTS); always the same, without gradients.
    """

    def __repr__(self) -> str:
        return f"Flow({self.base_dist}, {[type(transform).__name__ for transform in self.transforms]})"

    def sample(self, sample_shape=()) -> Tensor:
        # A copy: transforms remember how they made their last value, here without its gradients.
        return super().sample(torch.Size(sample_shape)).clone()

    @property
    def mean(self) -> Tensor:
        return self._moments[0]

    @property
    def variance(self) -> Tensor:
        return self._moments[1]

    @cached_property
    @torch.no_grad()
    def _moments(self) -> tuple[Tensor, Tensor]:
        loc, scale = self.base_dist.mean, self.base_dist.stddev
        points = torch.as_tensor(_points(loc.shape[-1])).to(loc)
        center, first, second = self._image(loc), torch.zeros_like(loc), torch.zeros_like(loc)
        for some in points.split(POINTS_AT_A_TIME):
            z = self._image(loc + scale * some.reshape(len(some), *[1] * (loc.dim() - 1), -1)) - center
            first, second = first + z.sum(0) / len(points), second + z.square().sum(0) / len(points)
        return center + first, second - first**2

    def _image(self, noise: Tensor) -> Tensor:
        for transform in self.transforms:
            noise = transform(noise)
        return noise


@lru_cache
def _points(latent_dim: int) -> Float[np.ndarray, "M L"]:
    """Like a sample of the standard normal, but with exactly its mean and covariance."""
    half = max(POINTS // 2, latent_dim)
    noise, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((half, latent_dim)))
    noise *= math.sqrt(half)
    return np.concatenate([noise, -noise])


def _from_normal(q, normal: Normal) -> Tensor:
    """-E_q[log N(z; ...)] of each dimension, which takes no more than q's means and variances."""
    spread = (q.variance + (q.mean - normal.mean) ** 2) / normal.variance
    return 0.5 * (spread + (2 * math.pi * normal.variance).log())


@register_kl(MultivariateNormal, Independent)
@register_kl(LowRankMultivariateNormal, Independent)
def _kl_correlated(q, p) -> Tensor:
    if not isinstance(p.base_dist, Normal) or p.event_shape != q.event_shape:
        raise NotImplementedError
    return _from_normal(q, p.base_dist).sum(-1) - q.entropy()


@register_kl(StudentT, Normal)
def _kl_student(q, p) -> Tensor:
    """Infinite at two degrees of freedom or fewer, as E_q[z^2] is."""
    return _from_normal(q, p) - q.entropy()

"""What is wrong with a guide, in words: its shapes, its gradients, and its density against its samples."""

import contextlib
import math
from collections.abc import Iterator
from statistics import NormalDist

import pyro
import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Bernoulli, Chi2, Distribution, Independent

from pyrovae.guides.base import Guide
from pyrovae.runtime.errors import FieldError
from pyrovae.runtime.inputs import check_pixels
from pyrovae.runtime.random_states import seeded

FALSE_ALARM = 1e-6  # the probability that a correct density is called wrong, over all its tests
PARTICLES, DATA = 3, 4  # for shapes and gradients; and at most so many data for the density
LEAST_EFFECTIVE = 500  # samples, below which an integral is not judged


def check_guide(
    guide: Guide,
    x: Float[Tensor, "B D"],
    *,
    latent_dim: int | None = None,
    use_rep: bool | None = None,
    draws: int = 4000,
    seed: int = 0,
) -> list[str]:
    """What keeps a guide from working here, a sentence each; an empty list if nothing was found.

    It is looked at in evaluation mode, and it and the random states are left as they were. Shapes come
    first, for one batch and over particles; then whether every parameter receives a gradient; then
    whether log_prob is the density of what is sampled, at no more than DATA data. That is tested by

    - its integral: E_r[q/r] = 1 under a wide multivariate t with r's covariance from q's samples, or
      under independent bits. Not judged where fewer than 500 of `draws` count, as with modes far apart
      in many dimensions.
    - its shape: E_q[(z - m) d log q/dz^T] = -I and E_q[d log q/dz] = 0, in any dimension; of bits,
      E_q[z_l - q(z_l = 1 | the others)] = 0.

    A correct density fails in about FALSE_ALARM of all calls. With 4,000 draws, a scale that is wrong
    by a tenth is found practically always in ten dimensions, a forgotten factor of the density wherever
    the integral is judged, at 1.2 or more.

    Args:
        guide: In a VAE already (`vae.posterior`) if it needs one.
        x: Pixels, as the guide sees them; two rows or more that differ.
        latent_dim: L, if it should be a certain number.
        use_rep: Whether it is to be trained by pathwise gradients; if None, where z is not discrete.
        draws: Samples per datum of the tests of the density.
        seed: Of all samples.

    Raises:
        TypeError: It is no Guide.
        ValueError: x is not a batch of pixels in [0, 1], or there are fewer than LEAST_EFFECTIVE draws.

    Example:
        >>> import pyro.distributions as dist
        >>> class Wide(Guide):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.loc, self.unused = torch.nn.Linear(64, 2), torch.nn.Linear(64, 2)
        ...
        ...     def forward(self, x):
        ...         return dist.Normal(self.loc(x), 2.0)
        >>> check_guide(Wide(), torch.rand(5, 64))
        ['expected event shape (L,), got (): declare the latent dimension with .to_event(1)']
    """
    if not isinstance(guide, Guide):
        raise TypeError(f"expected a Guide, got {type(guide).__name__}: of a VAE, its vae.posterior")
    if draws < LEAST_EFFECTIVE:
        raise FieldError(f"expected draws >= {LEAST_EFFECTIVE}, got {draws}", field="draws")
    if x.dim() != 2 or len(x) < 2:
        remedy = ": flatten images with images.flatten(1)" if x.dim() == 4 else ""
        raise ValueError(f"expected x of shape (B, D), B >= 2, got {tuple(x.shape)}{remedy}")
    check_pixels(x, "x")
    use_rep = not guide.discrete if use_rep is None else use_rep
    with _undisturbed(guide, seed, x.device):
        for problems in (
            lambda: _shapes(guide, x, latent_dim),
            lambda: _gradients(guide, x, use_rep),
            lambda: _density(guide, x[:DATA], draws) if guide.density else [],
        ):
            found = _in_words(problems)
            if found:  # what follows would only say it again
                return found
    return []


@contextlib.contextmanager
def _undisturbed(guide: Guide, seed: int, device: torch.device) -> Iterator[None]:
    modes = {module: module.training for module in guide.modules()}
    guide.eval()
    try:
        with seeded(seed, device), pyro.validation_enabled(False), torch.enable_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def _in_words(problems) -> list[str]:
    try:
        return problems()
    except Exception as error:  # whatever a foreign guide raises
        return [f"expected a guide that runs, got {' '.join(f'{type(error).__name__}: {error}'.split())}"]


def _shapes(guide: Guide, x: Tensor, latent_dim: int | None) -> list[str]:
    q, batch = guide(x), x.shape[:-1]
    if not isinstance(q, Distribution):
        return [f"expected forward to return a distribution, got {type(q).__name__}"]
    if len(q.event_shape) != 1:
        remedy = "declare the latent dimension with .to_event(1)"
        return [f"expected event shape (L,), got {tuple(q.event_shape)}: {remedy}"]
    if latent_dim not in (None, q.event_shape[0]):
        return [f"expected event shape ({latent_dim},), got {tuple(q.event_shape)}"]
    if q.batch_shape != batch:
        return [f"expected batch shape {tuple(batch)}, one q(z|x) for each x, got {tuple(q.batch_shape)}"]
    found = []
    many = guide(x.expand(2, *x.shape)).batch_shape
    if many != (2, *batch):
        found.append(f"expected batch shape {(2, *batch)} for x of shape {(2, *x.shape)}, got {tuple(many)}")
    over = q.expand((PARTICLES, *batch))
    z = over.rsample() if over.has_rsample else over.sample()
    for what, got, shape in (
        ("a sample", z.shape, (PARTICLES, *batch, *q.event_shape)),
        ("log_prob", over.log_prob(z).shape, (PARTICLES, *batch)),
        ("log_prob of given z", over.log_prob(z.detach().clone()).shape, (PARTICLES, *batch)),
    ):
        if got != shape:
            found.append(f"expected {what} of shape {shape} over {PARTICLES} particles, got {tuple(got)}")
    one = z[0].detach().clone()
    if guide.density and not found:
        few = range(min(len(x), 5))  # one alone may agree by chance
        alone = torch.cat([guide(x[i : i + 1]).log_prob(one[i : i + 1]) for i in few])
        if not torch.allclose(alone, q.log_prob(one)[: len(few)], rtol=1e-3, atol=1e-3, equal_nan=True):
            found.append("expected q(z|x) of a datum to depend on that datum alone, got others in a batch")
    return found


def _gradients(guide: Guide, x: Tensor, use_rep: bool) -> list[str]:
    q = guide(x).expand((PARTICLES, len(x)))
    if use_rep and not q.has_rsample:
        return [f"expected rsample with use_rep=True, got {q}, which has none: use the score function"]
    ways = {}
    if guide.density:
        z = q.sample().detach().clone()
        ways["use_rep=False, the density of given z"] = q.log_prob(z)
        if not ways["use_rep=False, the density of given z"].isfinite().all():
            return ["expected a finite log_prob of its own samples, got others"]
    if use_rep:
        z = guide(x).expand((PARTICLES, len(x))).rsample()
        ways["use_rep=True, through rsample"] = (z + 0.5 * z**2).sum(-1)
    without = {way: _without_gradient(guide, value) for way, value in ways.items()}
    nowhere = set.intersection(*map(set, without.values())) if without else set()
    unused = set(nowhere)
    if nowhere:  # what q(z|x) does not use may be the prior's
        p = guide.prior(x.new_zeros(q.event_shape))
        unused &= set(_without_gradient(guide, p.log_prob(p.sample((PARTICLES,)))))
    found = [
        f"expected a gradient to {name!r}, got none: neither q(z|x) nor p(z) uses it" for name in sorted(unused)
    ]
    for way, names in without.items():
        found += [
            f"expected a gradient to {name!r} by {way}, got none" for name in names if name not in nowhere
        ]
    return found


def _without_gradient(guide: Guide, value: Tensor) -> list[str]:
    parameters = {name: p for name, p in guide.named_parameters() if p.requires_grad}
    if not value.requires_grad or not parameters:
        return list(parameters)
    weights = torch.randn_like(value)
    gradients = torch.autograd.grad((weights * value).sum(), [*parameters.values()], allow_unused=True)
    return [
        name
        for name, g in zip(parameters, gradients, strict=True)
        if g is None or not (g.any() and g.isfinite().all())
    ]


def _density(guide: Guide, x: Tensor, draws: int) -> list[str]:
    q = guide(x)
    with torch.no_grad():
        z = (q.rsample if q.has_rsample else q.sample)((draws,)).clone()
    latent_dim = z.shape[-1]
    discrepancy = _of_bits if guide.discrete else _of_gradients
    shape = discrepancy(q, z)  # (N, B, tests), each with mean 0
    integral = _integral(q, z, guide.discrete)
    tests = shape[0].numel() + len(x)
    limit = -NormalDist().inv_cdf(FALSE_ALARM / (2 * tests))
    found = []
    value, error, judged = integral
    wrong = judged & ((value - 1).abs() > limit * error + 1e-3)
    if wrong.any():
        n = int(wrong.nonzero()[0])
        found.append(
            f"expected a density that integrates to 1, got {value[n]:.4g} +- {error[n]:.2g} for datum {n}: "
            "log_prob forgets a factor, such as a determinant"
        )
    mean, error = shape.mean(0), shape.std(0) / math.sqrt(draws)
    wrong = mean.abs() > limit * error + 1e-3
    if wrong.any() and not found:
        n, number = wrong.nonzero()[0].tolist()
        found.append(
            f"expected log_prob to be the density of the samples, got samples of another in dimension "
            f"{number % latent_dim} of datum {n} ({(mean / error)[n, number].abs():.0f} standard errors)"
        )
    return found


def _of_gradients(q: Distribution, z: Float[Tensor, "N B L"]) -> Float[Tensor, "N B tests"]:
    """(z - m) d log q/dz^T + I and d log q/dz at samples: of mean 0 where they are q's own."""
    z = z.requires_grad_()
    (slope,) = torch.autograd.grad(q.log_prob(z).sum(), z)
    around = z.detach() - z.detach().mean(0)
    products = around.unsqueeze(-2) * slope.unsqueeze(-1) + torch.eye(
        z.shape[-1], dtype=z.dtype, device=z.device
    )
    return torch.cat([slope, products.flatten(-2)], dim=-1)


@torch.no_grad()
def _of_bits(q: Distribution, z: Float[Tensor, "N B L"]) -> Float[Tensor, "N B tests"]:
    """z_l - q(z_l = 1 | the other bits)."""
    parts = []
    for number in range(z.shape[-1]):
        one, zero = z.clone(), z.clone()
        one[..., number], zero[..., number] = 1.0, 0.0
        parts.append(z[..., number] - (q.log_prob(one) - q.log_prob(zero)).sigmoid())
    return torch.stack(parts, dim=-1)


@torch.no_grad()
def _integral(q: Distribution, z: Float[Tensor, "N B L"], discrete: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The integral of exp log_prob per datum, its standard error, and whether it can be judged, (B,) each."""
    draws = len(z)
    mean = z.detach().mean(0)
    if discrete:
        wide: Distribution = Independent(Bernoulli(0.9 * mean + 0.05), 1)
        proposed = wide.sample((draws,))
        log_r = wide.log_prob(proposed)
    else:
        proposed, log_r = _wide(z.detach(), mean)
    log_weight = (q.log_prob(proposed) - log_r).double()
    weight = log_weight.exp()
    effective = (2 * log_weight.logsumexp(0) - (2 * log_weight).logsumexp(0)).exp()
    return weight.mean(0), weight.std(0) / math.sqrt(draws), effective > LEAST_EFFECTIVE


def _wide(z: Float[Tensor, "N B L"], mean: Float[Tensor, "B L"]) -> tuple[Tensor, Tensor]:
    """Samples of a multivariate t with 5 degrees of freedom around those given, and their log density."""
    df, latent_dim = 5.0, z.shape[-1]
    around = (z - mean).transpose(0, 1)
    covariance = around.transpose(-1, -2) @ around / len(z)
    floor = 1e-6 * covariance.diagonal(dim1=-2, dim2=-1).diag_embed()
    tril = torch.linalg.cholesky(1.2 * covariance + floor)
    noise = torch.randn_like(z)
    chi2 = Chi2(z.new_tensor(df)).sample(z.shape[:-1])
    proposed = mean + (tril @ (noise * (df / chi2).sqrt().unsqueeze(-1)).unsqueeze(-1)).squeeze(-1)
    squares = (
        torch.linalg.solve_triangular(tril, (proposed - mean).unsqueeze(-1), upper=False).square().sum((-1, -2))
    )
    constant = (
        math.lgamma((df + latent_dim) / 2) - math.lgamma(df / 2) - latent_dim / 2 * math.log(df * math.pi)
    )
    log_r = (
        constant
        - tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        - (df + latent_dim) / 2 * (squares / df).log1p()
    )
    return proposed, log_r

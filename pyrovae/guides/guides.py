"""Guides q(z|x): the extension point, and its families."""

import abc
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro.distributions import transforms
from pyro.nn import ConditionalAutoRegressiveNN, ConditionalDenseNN
from torch import Tensor, nn
from torch.distributions import Distribution, Transform
from torch.nn.functional import softplus

from pyrovae.guides.distributions import Flow, GaussianMixture
from pyrovae.networks.networks import Encoder
from pyrovae.runtime import parts
from pyrovae.runtime.buffers import kept_buffers
from pyrovae.runtime.inputs import check_above

SCALE_HEADS: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": lambda h: (0.5 * h).exp(),
    "softplus": lambda h: (softplus(h) + 1e-8).sqrt(),
}


class Guide(nn.Module, abc.ABC):
    """An approximate posterior q(z|x), and the prior it belongs to. To write one, give `forward`.

    A guide made by name is constructed as `Family(encoder, latent_dim, **settings)`; one of your own
    may take anything, as long as the VAE is given the finished module.

    Example:
        >>> class Fixed(Guide):  # one Gaussian for all data
        ...     def __init__(self, latent_dim):
        ...         super().__init__()
        ...         self.loc = nn.Parameter(torch.zeros(latent_dim))
        ...
        ...     def forward(self, x):
        ...         return dist.Normal(self.loc.expand(*x.shape[:-1], -1), 1.0).to_event(1)
        >>> Fixed(2)(torch.zeros(5, 64)).batch_shape
        torch.Size([5])
    """

    discrete: ClassVar[bool] = False  # whether z is a code of zeros and ones
    density: ClassVar[bool] = True  # whether q(z|x) has a density, without which there is no ELBO

    @abc.abstractmethod
    def forward(self, x: Float[Tensor, "*batch D"]) -> Distribution:
        """q(z|x) for pixels x in [0, 1]: batch shape that of x, event shape (latent_dim,)."""

    def prior(self, zeros: Float[Tensor, " L"]) -> Distribution:
        """p(z), event shape (L,): the standard normal, or fair bits for a discrete guide."""
        family = dist.Bernoulli(logits=zeros) if self.discrete else dist.Normal(zeros, torch.ones_like(zeros))
        return family.to_event(1)

    def point(self, q: Distribution) -> Float[Tensor, "*batch L"]:
        """The one z that stands for q(z|x): its mean, or for a discrete guide its most probable code."""
        return q.mean.round() if self.discrete else q.mean

    def attach(self, log_weight: Callable[[Tensor, Distribution, Tensor], Tensor]) -> None:
        """Told once by the VAE that it becomes part of how well some z explain pixels; most need not know.

        Args:
            log_weight: Of pixels x (..., D), some q(z|x) and M samples z (M, ..., L): log p(x|z) / beta +
                log p(z) - log q(z|x), (M, ...), nats.
        """

    def parts(self) -> dict[str, dict[str, slice]]:
        """Its parameters in named groups: for each, the rows of each parameter that belong to it."""
        return {"encoder": dict.fromkeys(dict(self.named_parameters()), slice(None))}


class Headed(Guide):
    """An encoder, and one linear layer on its features with a head for each parameter of q(z|x).

    A scale head makes its output h a variance: `exp`, variance = exp(h), or `softplus`, variance =
    softplus(h) + 1e-8.

    Args:
        encoder: Pixels (..., D) to features (..., encoder.out_features).
        heads: How many numbers each head gives.
        scale_head: A name in SCALE_HEADS.

    Raises:
        ValueError: An unknown scale head.
    """

    def __init__(self, encoder: Encoder, heads: dict[str, int], scale_head: str = "exp"):
        super().__init__()
        if scale_head not in SCALE_HEADS:
            raise ValueError(f"expected scale_head in {', '.join(SCALE_HEADS)}, got {scale_head!r}")
        self.encoder = encoder
        self.heads = heads
        self.head = nn.Linear(encoder.out_features, sum(heads.values()))
        self.scale_head = scale_head

    def outputs(self, features: Float[Tensor, "*batch H"]) -> tuple[Tensor, ...]:
        """What each head gives, (..., its numbers); of one that is called `scale`, standard deviations."""
        parts = self.head(features).split(list(self.heads.values()), dim=-1)
        to_scale = SCALE_HEADS[self.scale_head]
        return tuple(
            to_scale(part) if name == "scale" else part for name, part in zip(self.heads, parts, strict=True)
        )

    def parts(self) -> dict[str, dict[str, slice]]:
        groups, start = {"trunk": _trunk(self)}, 0
        for name, rows in self.heads.items():
            here = slice(start, start + rows)
            groups[f"{name} head"] = {"head.weight": here, "head.bias": here}
            start += rows
        return groups


class MeanField(Headed):
    """A Gaussian with diagonal covariance, N(loc(x), diag(scale(x)^2)).

    Args:
        encoder: Pixels (..., D) to features (..., encoder.out_features).
        latent_dim: L.
        scale_head: How a network output becomes a variance; a name in SCALE_HEADS.

    Raises:
        ValueError: An unknown scale head.

    Source: Auto-Encoding Variational Bayes, Kingma & Welling, 2014,
    https://arxiv.org/abs/1312.6114, eq. 9 (there with the `exp` head).
    """

    def __init__(self, encoder: Encoder, latent_dim: int, *, scale_head: str = "exp"):
        super().__init__(encoder, {"loc": latent_dim, "scale": latent_dim}, scale_head)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Distribution:
        loc, scale = self.outputs(self.encoder(x))
        return dist.Normal(loc, scale).to_event(1)


class FullCovariance(Headed):
    """A Gaussian with any covariance, N(loc(x), T(x) T(x)^T), T lower triangular.

    T's diagonal comes from the scale head, as squared numbers; below it stands a head of L (L - 1) / 2.

    Args:
        encoder: Pixels (..., D) to features (..., encoder.out_features).
        latent_dim: L.
        scale_head: A name in SCALE_HEADS.

    Source: Automatic Differentiation Variational Inference, Kucukelbir et al., 2017,
    https://arxiv.org/abs/1603.00788, there without an encoder.
    """

    def __init__(self, encoder: Encoder, latent_dim: int, *, scale_head: str = "exp"):
        below = latent_dim * (latent_dim - 1) // 2
        super().__init__(encoder, {"loc": latent_dim, "scale": latent_dim, "factor": below}, scale_head)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Distribution:
        loc, scale, factor = self.outputs(self.encoder(x))
        rows, columns = torch.tril_indices(loc.shape[-1], loc.shape[-1], -1, device=loc.device)
        tril = scale.diag_embed()
        tril[..., rows, columns] = factor
        return dist.MultivariateNormal(loc, scale_tril=tril)


class LowRank(Headed):
    """A Gaussian whose covariance is diagonal plus of low rank, N(loc(x), F(x) F(x)^T + diag(scale(x)^2)).

    Args:
        encoder: Pixels (..., D) to features (..., encoder.out_features).
        latent_dim: L.
        rank: R, the columns of F (L, R).
        scale_head: A name in SCALE_HEADS.

    Raises:
        ValueError: rank < 1.

    Source: Gaussian Variational Approximation with a Factor Covariance Structure, Ong, Nott & Smith,
    2018, https://arxiv.org/abs/1701.03208, there without an encoder.
    """

    def __init__(self, encoder: Encoder, latent_dim: int, *, rank: int = 2, scale_head: str = "exp"):
        _check_positive(rank=rank)
        heads = {"loc": latent_dim, "scale": latent_dim, "factor": latent_dim * rank}
        super().__init__(encoder, heads, scale_head)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Distribution:
        loc, scale, factor = self.outputs(self.encoder(x))
        return dist.LowRankMultivariateNormal(loc, factor.unflatten(-1, (loc.shape[-1], -1)), scale**2)


class StudentT(Headed):
    """Independent Student's t of given degrees of freedom, of heavier tails than Gaussians.

    The scale head gives t's scale, not its standard deviation, scale * sqrt(df / (df - 2)).

    Args:
        encoder: Pixels (..., D) to features (..., encoder.out_features).
        latent_dim: L.
        df: Degrees of freedom, more than 2: with fewer the KL to the normal prior is infinite.
        scale_head: A name in SCALE_HEADS.

    Raises:
        ValueError: df <= 2.

    Source: Variational Inference with Tail-adaptive f-Divergence, Wang, Liu & Liu, 2018,
    https://arxiv.org/abs/1810.11943, on why a proposal's tails should be heavy.
    """

    def __init__(self, encoder: Encoder, latent_dim: int, *, df: float = 5.0, scale_head: str = "exp"):
        check_above("df", df, 2, ", where the KL to a normal prior is finite")
        super().__init__(encoder, {"loc": latent_dim, "scale": latent_dim}, scale_head)
        self.df = df

    def forward(self, x: Float[Tensor, "*batch D"]) -> Distribution:
        loc, scale = self.outputs(self.encoder(x))
        return dist.StudentT(torch.full_like(loc, self.df), loc, scale).to_event(1)


class Mixture(Headed):
    """A mixture of Gaussians with diagonal covariances, sum_c w_c(x) N(loc_c(x), diag(scale_c(x)^2)).

    Its samples carry pathwise gradients by implicit reparameterization (see GaussianMixture), so that
    it takes every estimator but those of a closed-form KL or of opposite noise. Such gradients tell the
    weights of components that lie far apart next to nothing: there, train with `rloo`.

    Args:
        encoder: Pixels (..., D) to features (..., encoder.out_features).
        latent_dim: L.
        components: C.
        scale_head: A name in SCALE_HEADS.

    Raises:
        ValueError: components < 1.

    Source: Automatic Differentiation Variational Inference with Mixtures, Morningstar et al., 2021,
    https://arxiv.org/abs/2003.01687, there with stratified samples.
    """

    def __init__(self, encoder: Encoder, latent_dim: int, *, components: int = 5, scale_head: str = "exp"):
        _check_positive(components=components)
        heads = {"loc": components * latent_dim, "scale": components * latent_dim, "weights": components}
        super().__init__(encoder, heads, scale_head)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Distribution:
        loc, scale, logits = self.outputs(self.encoder(x))
        shape = logits.shape[-1], -1
        return GaussianMixture(logits, loc.unflatten(-1, shape), scale.unflatten(-1, shape))


class NormalizingFlow(Headed):
    """A diagonal Gaussian moved by invertible transforms that see the encoder's features.

    To write one, give the network of a step and the transforms that it makes.

    Args:
        encoder: Pixels (..., D) to features (..., encoder.out_features).
        latent_dim: L, 2 or more: a single dimension is moved by nothing that its own Gaussian lacks.
        flow_depth: Steps.
        flow_width: Hidden units of each step's network.
        scale_head: A name in SCALE_HEADS, of the Gaussian.

    Raises:
        ValueError: latent_dim < 2, flow_depth < 1 or flow_width < 1.
    """

    def __init__(
        self,
        encoder: Encoder,
        latent_dim: int,
        *,
        flow_depth: int = 4,
        flow_width: int = 64,
        scale_head: str = "exp",
    ):
        if latent_dim < 2:
            raise ValueError(
                f"expected latent_dim >= 2 for {type(self).__name__}, got {latent_dim}: use mean-field"
            )
        _check_positive(flow_depth=flow_depth, flow_width=flow_width)
        super().__init__(encoder, {"loc": latent_dim, "scale": latent_dim}, scale_head)
        sizes = latent_dim, encoder.out_features, flow_width
        self.steps = nn.ModuleList(self.network(*sizes, backward=bool(n % 2)) for n in range(flow_depth))

    @abc.abstractmethod
    def network(self, latent_dim: int, context: int, width: int, backward: bool) -> nn.Module:
        """Of a step, given the features' number; `backward` for every other one."""

    @abc.abstractmethod
    def transforms(self, network: nn.Module, features: Float[Tensor, "*batch H"]) -> list[Transform]:
        """What a step does, for these features."""

    def forward(self, x: Float[Tensor, "*batch D"]) -> Distribution:
        features = self.encoder(x)
        loc, scale = self.outputs(features)
        moves = [move for network in self.steps for move in self.transforms(network, features)]
        return Flow(dist.Normal(loc, scale).to_event(1), moves)

    def parts(self) -> dict[str, dict[str, slice]]:
        steps = dict.fromkeys((f"steps.{name}" for name, _ in self.steps.named_parameters()), slice(None))
        return super().parts() | {"flow": steps}


class InverseAutoregressive(NormalizingFlow):
    """Inverse autoregressive flow: z_l <- s_l z_l + (1 - s_l) m_l, s and m of z_1, ..., z_(l-1) and x.

    The order of the dimensions is reversed at each step. A sample and its density cost one pass of each
    step's network; the density of a given z takes L, one after the other, as the score function, `stl`
    and `dreg` need it.

    Raises:
        ValueError: flow_width < latent_dim, besides what NormalizingFlow refuses.

    Source: Improving Variational Inference with Inverse Autoregressive Flow, Kingma et al., 2016,
    https://arxiv.org/abs/1606.04934, algorithm 1; its context h is the encoder's features.
    """

    def network(self, latent_dim: int, context: int, width: int, backward: bool) -> nn.Module:
        if width < latent_dim:
            raise ValueError(
                f"expected flow_width >= latent_dim, {latent_dim}, for an autoregressive network, got {width}"
            )
        order = list(range(latent_dim))[:: -1 if backward else 1]
        made = ConditionalAutoRegressiveNN(latent_dim, context, [width], permutation=torch.tensor(order))
        made.order = order  # as numbers: the buffer's would be read back from a GPU
        return made

    def transforms(self, network: nn.Module, features: Float[Tensor, "*batch H"]) -> list[Transform]:
        conditioned = partial(network, context=features)
        conditioned.permutation = network.order
        return [transforms.AffineAutoregressive(conditioned, stable=True)]


class Coupling(NormalizingFlow):
    """Affine coupling layers: one half of z is scaled and shifted by a network of the other half and x.

    The halves take turns. The logarithm of a scale is 2 tanh(h / 2), from -2 to 2. The density of a
    given z costs no more than that of a sample.

    Source: Density estimation using Real NVP, Dinh, Sohl-Dickstein & Bengio, 2017,
    https://arxiv.org/abs/1605.08803, eqs. 7 and 8.
    """

    def network(self, latent_dim: int, context: int, width: int, backward: bool) -> nn.Module:
        half = latent_dim // 2
        return ConditionalDenseNN(half, context, [width], [latent_dim - half] * 2)

    def transforms(self, network: nn.Module, features: Float[Tensor, "*batch H"]) -> list[Transform]:
        def shift_and_log_scale(half: Tensor) -> tuple[Tensor, Tensor]:
            shift, h = network(half, context=features)
            return shift, 2 * torch.tanh(h / 2)

        latent_dim = self.heads["loc"]
        turn = torch.arange(latent_dim - 1, -1, -1, device=features.device)
        coupling = transforms.AffineCoupling(network.input_dim, shift_and_log_scale)
        return [coupling, transforms.Permute(turn)]


class Refined(Headed):
    """A diagonal Gaussian that the encoder starts, and a few gradient steps on each datum's ELBO improve.

    A step is a natural gradient's, held within one standard deviation: with g the gradients of the ELBO
    (over beta) in loc and rho = log scale, loc <- loc + scale tanh(lr scale g_loc) and rho <- rho +
    tanh(lr g_rho / 2). The ELBO is averaged over NOISE fixed points in opposite pairs, so that q(z|x) is
    one function of x. With batch norm in the decoder, steps in training mode use the statistics of their
    own batch and leave the running ones alone; with dropout, each step draws its own.

    Args:
        encoder: Pixels (..., D) to features (..., encoder.out_features).
        latent_dim: L.
        refine_steps: Gradient steps per datum.
        refine_lr: lr. Large ones overshoot where dimensions are correlated a posteriori.
        refine_through: Whether gradients go through the steps, as the ELBO's true gradient does, also to
            the decoder by way of q. If not, the steps count as constants added to where they started.
        scale_head: A name in SCALE_HEADS.

    Raises:
        ValueError: refine_steps < 1 or refine_lr <= 0; on use, where it belongs to no VAE.

    Source: Semi-Amortized Variational Autoencoders, Kim, Wiseman, Miller, Sontag & Rush, 2018,
    https://arxiv.org/abs/1802.02550, algorithm 1, there with plain gradients and momentum.
    """

    NOISE: ClassVar = 8

    def __init__(
        self,
        encoder: Encoder,
        latent_dim: int,
        *,
        refine_steps: int = 5,
        refine_lr: float = 0.5,
        refine_through: bool = True,
        scale_head: str = "exp",
    ):
        _check_positive(refine_steps=refine_steps, refine_lr=refine_lr)
        super().__init__(encoder, {"loc": latent_dim, "scale": latent_dim}, scale_head)
        self.refine_steps, self.refine_lr, self.refine_through = refine_steps, refine_lr, refine_through
        noise = torch.randn(self.NOISE // 2, latent_dim, generator=torch.Generator().manual_seed(0))
        noise = noise / noise.square().mean(0).sqrt()
        self.register_buffer("noise", torch.cat([noise, -noise]))
        self.log_weight: Callable[[Tensor, Distribution, Tensor], Tensor] | None = None

    def attach(self, log_weight: Callable[[Tensor, Distribution, Tensor], Tensor]) -> None:
        self.log_weight = log_weight

    def forward(self, x: Float[Tensor, "*batch D"]) -> Distribution:
        if self.log_weight is None:
            raise ValueError(
                "expected a Refined guide in a VAE, whose ELBO it climbs, got it alone: VAE(guide=...)"
            )
        loc, scale = self.outputs(self.encoder(x))
        start = here = loc, scale.log()
        wanted = torch.is_grad_enabled()
        through = wanted and self.refine_through
        with torch.enable_grad(), kept_buffers():
            for _ in range(self.refine_steps):
                if not (through and all(t.requires_grad for t in here)):
                    here = tuple(t.detach().requires_grad_() for t in here)
                here = self._step(x, *here, create_graph=through)
        if wanted and not through:
            here = tuple(a + (b - a).detach() for a, b in zip(start, here, strict=True))
        loc, rho = here if wanted else (t.detach() for t in here)
        return dist.Normal(loc, rho.exp()).to_event(1)

    def _step(self, x: Tensor, loc: Tensor, rho: Tensor, create_graph: bool) -> tuple[Tensor, Tensor]:
        scale = rho.exp()
        q = dist.Normal(loc, scale).to_event(1)
        z = loc + scale * self.noise.reshape(self.NOISE, *[1] * (loc.dim() - 1), -1)
        elbo = self.log_weight(x, q, z).mean(0).sum()
        in_loc, in_rho = torch.autograd.grad(elbo, (loc, rho), create_graph=create_graph)
        up = scale * torch.tanh(self.refine_lr * scale * in_loc)
        return loc + up, rho + torch.tanh(0.5 * self.refine_lr * in_rho)


class BernoulliCode(Headed):
    """A code of independent bits, z in {0, 1}^L, whose prior is fair bits.

    One linear layer on the encoder's features gives the bits' logits. There is no reparameterized
    sampler: train it with a score-function estimator.

    Args:
        encoder: Pixels (..., D) to features (..., encoder.out_features).
        latent_dim: L.

    Source: Neural Variational Inference and Learning in Belief Networks, Mnih & Gregor, 2014,
    https://arxiv.org/abs/1402.0030, with one layer.
    """

    discrete: ClassVar = True

    def __init__(self, encoder: Encoder, latent_dim: int):
        super().__init__(encoder, {"logits": latent_dim})

    def forward(self, x: Float[Tensor, "*batch D"]) -> Distribution:
        (logits,) = self.outputs(self.encoder(x))
        return dist.Bernoulli(logits=logits).to_event(1)


class PointMass(Headed):
    """A point: the code loc(x) with certainty, which makes a VAE the plain autoencoder.

    It has no density, so no KL and no ELBO: train it with the estimator `reconstruction`. Its prior
    is what decoded draws come from, though nothing draws the codes toward it.

    Args:
        encoder: Pixels (..., D) to features (..., encoder.out_features).
        latent_dim: L.

    Source: Reducing the Dimensionality of Data with Neural Networks, Hinton & Salakhutdinov, 2006,
    https://doi.org/10.1126/science.1127647, without its pretraining.
    """

    density: ClassVar = False

    def __init__(self, encoder: Encoder, latent_dim: int):
        super().__init__(encoder, {"loc": latent_dim})

    def forward(self, x: Float[Tensor, "*batch D"]) -> Distribution:
        (loc,) = self.outputs(self.encoder(x))
        return dist.Delta(loc).to_event(1)


def _trunk(guide: Guide) -> dict[str, slice]:
    return {f"encoder.{name}": slice(None) for name, _ in guide.encoder.named_parameters()}


def _check_positive(**settings: int | float) -> None:
    for name, value in settings.items():
        if isinstance(value, int) and value < 1:
            raise ValueError(f"expected {name} >= 1, got {value}")
        check_above(name, value)


GUIDES: dict[str, type[Guide]] = {
    "mean-field": MeanField,
    "full-covariance": FullCovariance,
    "low-rank": LowRank,
    "student-t": StudentT,
    "mixture": Mixture,
    "iaf": InverseAutoregressive,
    "coupling": Coupling,
    "refined": Refined,
    "bernoulli-code": BernoulliCode,
    "point": PointMass,
}


def guide_class(name: str, *, trust: bool = False) -> type[Guide]:
    """A family by its name in GUIDES, or one of your own by `package.module:Class`.

    The module is one that is installed, or lies in the current directory. See `parts` for when it is imported.

    Args:
        trust: Whether a module may be imported that only a file names.

    Raises:
        TrustError: A file names the module, and nobody has consented to import it.
        ValueError: There is no such family, module or class, or the class is no guide.

    Example:
        >>> guide_class("pyrovae.guides:MeanField") is guide_class("mean-field")
        True
    """
    if name in GUIDES:
        return GUIDES[name]
    if ":" not in name:
        raise ValueError(
            f"expected guide in {', '.join(GUIDES)}, or package.module:Class of your own, got {name!r}"
        )
    return parts.find("guide", name, Guide, trust=trust)


def make_guide(name: str, encoder: Encoder, latent_dim: int, **settings: Any) -> Guide:
    """The guide that `guide_class` names, made as `Class(encoder, latent_dim, **settings)`.

    Raises:
        ValueError: It refuses its settings, or cannot be made in this way.
    """
    family = guide_class(name)
    if name in GUIDES:
        return family(encoder, latent_dim, **settings)
    try:
        return family(encoder, latent_dim, **settings)
    except Exception as error:  # whatever a foreign class raises
        made = ", ".join(["encoder", "latent_dim", *settings])
        raise ValueError(
            f"expected guide {name!r} to be made as {family.__name__}({made}), got {parts.in_a_line(error)}"
        ) from error

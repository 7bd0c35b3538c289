"""A guide that gradient steps on each datum's ELBO improve."""

from collections.abc import Callable
from typing import ClassVar

import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution

from pyrovae.guides.base import Headed, check_positive
from pyrovae.networks import Encoder
from pyrovae.runtime.buffers import kept_buffers


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
        check_positive(refine_steps=refine_steps, refine_lr=refine_lr)
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

"""Normalizing flows: a Gaussian that invertible networks move."""

import abc
from functools import partial

import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro.distributions import transforms
from pyro.nn import ConditionalAutoRegressiveNN, ConditionalDenseNN
from torch import Tensor, nn
from torch.distributions import Distribution, Transform

from pyrovae.guides.base import Headed, check_positive
from pyrovae.guides.distributions import Flow
from pyrovae.networks import Encoder
from pyrovae.runtime.errors import FieldError


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
            raise FieldError(
                f"expected latent_dim >= 2 for {type(self).__name__}, got {latent_dim}: use mean-field",
                field="latent_dim",
            )
        check_positive(flow_depth=flow_depth, flow_width=flow_width)
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
            raise FieldError(
                f"expected flow_width >= latent_dim, {latent_dim}, for an autoregressive network, got {width}",
                field="flow_width",
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

"""The extension point `Network`, and the halves that it builds.

Encoders and decoders take any leading batch dimensions: (..., D) pixels, (..., L) latents. A network family is
a frozen dataclass of settings that builds both halves of a VAE. Images are (C, H, W), flattened to D = C * H *
W pixels in that order.
"""

import abc
import math

from jaxtyping import Float
from torch import Tensor, nn

from pyrovae.runtime.errors import FieldError

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "elu": nn.ELU,
    "relu": nn.ReLU,
    "leaky-relu": nn.LeakyReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}
ImageShape = tuple[int, int, int]


class Encoder(nn.Module):
    """Pixels to features: (..., D) -> (..., out_features).

    Args:
        body: A module from (N, *in_shape) to (N, out_features).
        in_shape: The shape of one input to the body.
        out_features: The number of features.
    """

    def __init__(self, body: nn.Module, in_shape: tuple[int, ...], out_features: int):
        super().__init__()
        self.body = body
        self.in_shape = in_shape
        self.out_features = out_features

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch H"]:
        return self.body(x.reshape(-1, *self.in_shape)).reshape(*x.shape[:-1], self.out_features)


class Decoder(nn.Module):
    """Latents to the likelihood's parameters: (..., L) -> (..., D, outputs).

    Args:
        body: A module from (N, L) to (N, C * outputs * H * W), any trailing shape.
        shape: One image, (C, H, W).
        outputs: The numbers per pixel that the likelihood asks for.
    """

    def __init__(self, body: nn.Module, shape: ImageShape, outputs: int):
        super().__init__()
        self.body = body
        self.shape = shape
        self.outputs = outputs

    def forward(self, z: Float[Tensor, "*batch L"]) -> Float[Tensor, "*batch D outputs"]:
        channels, height, width = self.shape
        eta = self.body(z.reshape(-1, z.shape[-1])).reshape(-1, channels, self.outputs, height * width)
        return eta.transpose(-1, -2).reshape(*z.shape[:-1], math.prod(self.shape), self.outputs)


class Network(abc.ABC):
    """A family of encoder and decoder. To add one, write both methods and a line in NETWORKS."""

    @abc.abstractmethod
    def encoder(self, shape: ImageShape, classes: int = 0) -> Encoder:
        """From images of this shape (C, H, W) to features; a guide's head follows.

        Of a conditional VAE, from the pixels with the one-hot class behind them, (..., D + classes).
        """

    @abc.abstractmethod
    def decoder(self, latent_dim: int, shape: ImageShape, outputs: int) -> Decoder:
        """From a latent vector to `outputs` numbers per pixel of images of this shape.

        Of a conditional VAE, `latent_dim` counts the one-hot class behind the latents as well.
        """


def check_widths(name: str, widths: tuple[int, ...]) -> None:
    """Checks at the door that layers have widths, each from 1 on."""
    if not widths or min(widths) < 1:
        raise FieldError(f"expected {name} to be one or more widths >= 1, got {widths}", field=name)


def check_activation(name: str) -> None:
    """Checks at the door that an activation has a name in ACTIVATIONS."""
    if name not in ACTIVATIONS:
        raise FieldError(f"expected activation in {', '.join(ACTIVATIONS)}, got {name!r}", field="activation")

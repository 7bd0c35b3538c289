"""Encoders and decoders, with any leading batch dimensions: (..., D) pixels, (..., L) latents.

A network family is a frozen dataclass of settings that builds both halves of a VAE. Images are
(C, H, W), flattened to D = C * H * W pixels in that order.
"""

import abc
import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

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


class ClassPlanes(nn.Module):
    """Pixels and a one-hot class, (N, D + classes), to an image with one more constant plane per class."""

    def __init__(self, shape: ImageShape):
        super().__init__()
        self.shape = shape

    def forward(self, x: Float[Tensor, "N D_and_classes"]) -> Float[Tensor, "N C_and_classes H W"]:
        pixels, classes = x[:, : math.prod(self.shape)], x[:, math.prod(self.shape) :]
        planes = classes[:, :, None, None].expand(-1, -1, *self.shape[1:])
        return torch.cat([pixels.reshape(-1, *self.shape), planes], 1)


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


@dataclass(frozen=True, kw_only=True)
class MLP(Network):
    """Fully connected layers: D - hidden - features, and the mirror image of it as decoder.

    Args:
        hidden: The widths of the encoder's hidden layers, in order.
        activation: A name in ACTIVATIONS, after each hidden layer.

    Raises:
        ValueError: A width below 1 or an unknown activation.

    Example:
        >>> MLP(hidden=(300, 100, 10)).encoder((1, 28, 28)).out_features
        10
    """

    hidden: tuple[int, ...] = (300, 100, 10)
    activation: str = "elu"

    def __post_init__(self):
        _check_widths("hidden", self.hidden)
        _check_activation(self.activation)

    def encoder(self, shape: ImageShape, classes: int = 0) -> Encoder:
        size = math.prod(shape) + classes
        return Encoder(self._layers((size, *self.hidden)), (size,), self.hidden[-1])

    def decoder(self, latent_dim: int, shape: ImageShape, outputs: int) -> Decoder:
        body = self._layers((latent_dim, *reversed(self.hidden)))
        body.append(nn.Linear(self.hidden[0], math.prod(shape) * outputs))
        return Decoder(body, shape, outputs)

    def _layers(self, widths: tuple[int, ...]) -> nn.Sequential:
        layers = nn.Sequential()
        for fan_in, fan_out in pairwise(widths):
            layers.extend([nn.Linear(fan_in, fan_out), ACTIVATIONS[self.activation]()])
        return layers


@dataclass(frozen=True, kw_only=True)
class CNN(Network):
    """Convolutions that halve the image, each with batch norm, and transposed ones that undo them.

    Every convolution has kernel 3, stride 2 and padding 1, so a side n becomes ceil(n / 2); the
    decoder chooses its output padding to return to n, for any image size. Its last transposed
    convolution keeps the first width, and a plain 3x3 convolution gives the outputs.

    Args:
        channels: The encoder's channels after each convolution.
        activation: A name in ACTIVATIONS, after each batch norm.

    Raises:
        ValueError: A width below 1 or an unknown activation.

    Example:
        >>> CNN(channels=(32, 64, 32)).encoder((1, 28, 28)).out_features
        512
    """

    channels: tuple[int, ...] = (32, 64, 32)
    activation: str = "elu"

    def __post_init__(self):
        _check_widths("channels", self.channels)
        _check_activation(self.activation)

    def encoder(self, shape: ImageShape, classes: int = 0) -> Encoder:
        body = nn.Sequential(*([ClassPlanes(shape)] if classes else []))
        for fan_in, fan_out in pairwise((shape[0] + classes, *self.channels)):
            body.append(nn.Conv2d(fan_in, fan_out, 3, stride=2, padding=1))
            body.extend(self._norm(fan_out))
        body.append(nn.Flatten())
        height, width = self._sizes(shape)[-1]
        in_shape = (math.prod(shape) + classes,) if classes else shape
        return Encoder(body, in_shape, self.channels[-1] * height * width)

    def decoder(self, latent_dim: int, shape: ImageShape, outputs: int) -> Decoder:
        sizes = self._sizes(shape)[::-1]
        widths = (*reversed(self.channels), self.channels[0])
        body = nn.Sequential(
            nn.Linear(latent_dim, math.prod(sizes[0]) * widths[0]), nn.Unflatten(1, (widths[0], *sizes[0]))
        )
        for (fan_in, fan_out), (small, large) in zip(pairwise(widths), pairwise(sizes), strict=True):
            padding = tuple(b - (2 * a - 1) for a, b in zip(small, large, strict=True))
            body.append(nn.ConvTranspose2d(fan_in, fan_out, 3, stride=2, padding=1, output_padding=padding))
            body.extend(self._norm(fan_out))
        body.append(nn.Conv2d(widths[-1], shape[0] * outputs, 3, padding=1))
        return Decoder(body, shape, outputs)

    def _norm(self, width: int) -> list[nn.Module]:
        return [nn.BatchNorm2d(width), ACTIVATIONS[self.activation]()]

    def _sizes(self, shape: ImageShape) -> list[tuple[int, int]]:
        """The (height, width) before the first convolution and after each."""
        sizes = [shape[1:]]
        for _ in self.channels:
            height, width = sizes[-1]
            sizes.append(((height + 1) // 2, (width + 1) // 2))
        return sizes


def _check_widths(name: str, widths: tuple[int, ...]) -> None:
    if not widths or min(widths) < 1:
        raise ValueError(f"expected {name} to be one or more widths >= 1, got {widths}")


def _check_activation(name: str) -> None:
    if name not in ACTIVATIONS:
        raise ValueError(f"expected activation in {', '.join(ACTIVATIONS)}, got {name!r}")


NETWORKS: dict[str, type[Network]] = {
    "mlp": MLP,
    "cnn": CNN,
}

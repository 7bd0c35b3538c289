"""Convolutional networks."""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pyrovae.networks.base import (
    ACTIVATIONS,
    Decoder,
    Encoder,
    ImageShape,
    Network,
    check_activation,
    check_widths,
)


class ClassPlanes(nn.Module):
    """Pixels and a one-hot class, (N, D + classes), to an image with one more constant plane per class."""

    def __init__(self, shape: ImageShape):
        super().__init__()
        self.shape = shape

    def forward(self, x: Float[Tensor, "N D_and_classes"]) -> Float[Tensor, "N C_and_classes H W"]:
        pixels, classes = x[:, : math.prod(self.shape)], x[:, math.prod(self.shape) :]
        planes = classes[:, :, None, None].expand(-1, -1, *self.shape[1:])
        return torch.cat([pixels.reshape(-1, *self.shape), planes], 1)


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
        check_widths("channels", self.channels)
        check_activation(self.activation)

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

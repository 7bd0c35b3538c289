"""Fully connected networks."""

import math
from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from pyrovae.networks.base import (
    ACTIVATIONS,
    Decoder,
    Encoder,
    ImageShape,
    Network,
    check_activation,
    check_widths,
)


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
        check_widths("hidden", self.hidden)
        check_activation(self.activation)

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

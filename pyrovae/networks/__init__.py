"""Networks that encode and decode images."""

from pyrovae.networks.base import ACTIVATIONS, Decoder, Encoder, ImageShape, Network
from pyrovae.networks.cnn import CNN, ClassPlanes
from pyrovae.networks.mlp import MLP

NETWORKS: dict[str, type[Network]] = {
    "mlp": MLP,
    "cnn": CNN,
}

__all__ = [
    "ACTIVATIONS",
    "CNN",
    "MLP",
    "NETWORKS",
    "ClassPlanes",
    "Decoder",
    "Encoder",
    "ImageShape",
    "Network",
]

"""Networks that encode and decode images."""

from pyrovae.networks.networks import (
    ACTIVATIONS,
    CNN,
    MLP,
    NETWORKS,
    ClassPlanes,
    Decoder,
    Encoder,
    ImageShape,
    Network,
)

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

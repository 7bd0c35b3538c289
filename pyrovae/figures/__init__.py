"""Results in, matplotlib's Figures out. Knows no files and no models."""

from pyrovae.figures.figures import (
    MAX_CLASSES,
    MAX_NAMED,
    TERMS,
    cloud,
    curves,
    grid,
    latent_cloud,
    latent_histogram,
    manifold,
    overlaid_curves,
    reconstructions,
    side_by_side,
    variance,
    variance_over_training,
)

__all__ = [
    "MAX_CLASSES",
    "MAX_NAMED",
    "TERMS",
    "cloud",
    "curves",
    "grid",
    "latent_cloud",
    "latent_histogram",
    "manifold",
    "overlaid_curves",
    "reconstructions",
    "side_by_side",
    "variance",
    "variance_over_training",
]

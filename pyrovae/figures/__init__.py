"""Results in, matplotlib's Figures out. Knows no files and no models."""

from pyrovae.figures.comparisons import variance, variance_over_training
from pyrovae.figures.histories import MAX_NAMED, TERMS, curves, overlaid_curves
from pyrovae.figures.images import grid, manifold, reconstructions
from pyrovae.figures.latents import MAX_CLASSES, cloud, latent_cloud, latent_histogram, side_by_side

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

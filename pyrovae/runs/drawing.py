"""The figures of a finished run."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure

from pyrovae import figures
from pyrovae.data.datasets import Dataset
from pyrovae.runs.loading import load_best
from pyrovae.runtime.schemas import State
from pyrovae.runtime.whole_files import save_figure
from pyrovae.training.checkpoints import load_checkpoint, read_metrics
from pyrovae.vae import VAE, prior_grid

PICTURED = 20  # images in a figure of reconstructions or samples
ENCODED = 5000  # images at a time
LAST_FIGURE = "curves"  # the last that is drawn: with it a finished run is complete
MOST_ROWS = 50  # classes in a figure of samples
GRID_SIDE = 20  # decoded points per side of the manifold


def draw_figures(directory: Path, dataset: Dataset, vae: VAE) -> None:
    """Draws the figures that a finished run lacks, of its best parameters and validation images, never test."""
    load_best(directory, vae)
    images = dataset.validation
    first = images[:PICTURED]

    def codes() -> Figure:
        parts = (images[start : start + ENCODED] for start in range(0, len(images), ENCODED))
        z = torch.cat([vae.encode(part.pixels, part.labels) for part in parts])
        return figures.latent_cloud(z, images.labels)

    def manifold() -> Figure:
        z, quantiles = prior_grid(GRID_SIDE)
        rows = torch.stack([vae.decode(row) for row in z])  # at once they may not fit in memory
        return figures.manifold(rows, quantiles)

    def reconstructions() -> Figure:
        shown = vae.reconstruct(first.pixels, first.labels)
        return figures.reconstructions(first.pixels, shown, "validation images and their reconstructions")

    plane = vae.latent_dim == 2 and not vae.posterior.discrete
    drawn: dict[str, Callable[[], Figure]] = {
        "reconstructions": reconstructions,
        "samples": lambda: samples(vae, 5 * PICTURED),
        **({"manifold": manifold} if plane and not vae.classes else {}),
        **({"latent": codes} if plane else {}),
        LAST_FIGURE: lambda: figures.curves(read_metrics(directory)),
    }
    for name, draw in drawn.items():
        if not _is_drawn(directory, name):
            save_figure(draw(), directory / "figures" / f"{name}.png")


def is_complete(directory: Path) -> bool:
    """Whether a run has finished, and has its figures.

    Raises:
        CheckpointError: It has no checkpoint, or a damaged one.
    """
    progress = load_checkpoint(directory / "checkpoint.pt", "cpu", holds=State)["progress"]
    return bool(progress["finished"]) and _is_drawn(directory, LAST_FIGURE)


def _is_drawn(directory: Path, name: str) -> bool:
    """Whether this figure is there and shows the last checkpoint, not an earlier end of the run."""
    try:
        drawn = (directory / "figures" / f"{name}.png").stat().st_mtime_ns
    except FileNotFoundError:
        return False
    return drawn >= (directory / "checkpoint.pt").stat().st_mtime_ns


def samples(vae: VAE, n: int = 100, *, seed: int = 0, label: int | None = None) -> Figure:
    """Pictures the expected images of n draws from the prior, in a grid that is as square as n allows.

    A conditional VAE without a label gets a row for each class, at most MOST_ROWS of them, and each column has
    one z. The picture then has n images, or as few more as make all rows equally long.
    """
    if not vae.classes or label is not None:
        labels = None if label is None else torch.tensor([label])
        side = math.ceil(math.sqrt(n))
        rows = [
            list(vae.decode(z, None if labels is None else labels.expand(len(z))).cpu())
            for z in vae.draw(n, seed=seed).split(side)
        ]
        given = "z" if label is None else f"z, y = {label}"
        return figures.grid(rows, f"E[x|{given}] for z from the prior")
    shown = min(vae.classes, MOST_ROWS)
    z = vae.draw(math.ceil(n / shown), seed=seed)
    rows = [list(vae.decode(z, torch.full((len(z),), y)).cpu()) for y in range(shown)]
    title = "E[x|z, y]: a class y in each row, a z from the prior in each column"
    if shown < vae.classes:
        title += f"; the first {shown} of {vae.classes:,} classes"
    return figures.grid(rows, title, row_names=[str(y) for y in range(shown)])

"""Figures of images: in a grid, beside their reconstructions, or decoded over a latent plane."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from pyrovae.runtime.texts import in_figure


def reconstructions(
    images: Float[Tensor, "N C H W"], reconstructed: Float[Tensor, "N C H W"], title: str = ""
) -> Figure:
    """Images above their reconstructions, in pairs of rows of ten."""
    rows = []
    for original, copy in zip(images.split(10), reconstructed.split(10), strict=True):
        rows += [list(original), list(copy)]
    return grid(rows, title)


def grid(
    rows: Sequence[Sequence[Float[Tensor, "C H W"]]],
    title: str = "",
    *,
    row_names: Sequence[str] = (),
    column_names: Sequence[str] = (),
) -> Figure:
    """Images of one shape in rows and columns, a white pixel apart, from 0 (black) to 1 (white).

    Args:
        row_names: To stand left of the rows; none if empty.
        column_names: To stand below the columns; none if empty.
    """
    _, height, width = rows[0][0].shape
    columns = max(len(row) for row in rows)
    wide = max(0.8 * columns, 0.08 * len(title))  # inches: room for the title
    figure = Figure(figsize=(wide, 0.8 * len(rows) * height / width + 0.3), layout="constrained")
    axes = figure.subplots()
    axes.set_title(in_figure(title), fontsize="medium")
    show(axes, canvas(rows))
    axes.set_frame_on(False)
    axes.tick_params(length=0, labelsize="small")
    axes.set_xticks(
        [j * (width + 1) + width / 2 for j in range(len(column_names))], map(in_figure, column_names)
    )
    axes.set_yticks([i * (height + 1) + height / 2 for i in range(len(row_names))], map(in_figure, row_names))
    if not (row_names or column_names):
        axes.set_axis_off()
    return figure


def canvas(rows: Sequence[Sequence[Float[Tensor, "C H W"]]]) -> Float[Tensor, "C rows columns"]:
    """Lays images out in rows, a white pixel apart, as one image."""
    channels, height, width = rows[0][0].shape
    columns = max(len(row) for row in rows)
    canvas = torch.ones(channels, len(rows) * (height + 1) - 1, columns * (width + 1) - 1)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            canvas[:, i * (height + 1) :, j * (width + 1) :][:, :height, :width] = image
    return canvas


def manifold(
    images: Float[Tensor, "side side C H W"],
    quantiles: Sequence[float] | Float[Tensor, " side"],
    title: str = "decoded grid over the prior's quantiles",
) -> Figure:
    """Decoded points of a 2-d latent space as one picture; z1 rises to the right, z2 upwards.

    Args:
        images: At [i, j], the decoded point whose z2 is the prior's i-th quantile and z1 its j-th.
        quantiles: The prior's probabilities at the rows, and at the columns, ascending.
    """
    side, _, channels, height, width = images.shape
    canvas = images.flip(0).permute(2, 0, 3, 1, 4).reshape(channels, side * height, side * width)
    figure = Figure(figsize=(6, 6 * height / width + 0.3), layout="constrained")
    axes = figure.subplots()
    show(axes, canvas)
    shown = range(0, side, max(1, side // 5))
    names = [f"{quantiles[k]:.2f}" for k in shown]
    axes.set_xticks([(j + 0.5) * width for j in shown], names)
    axes.set_yticks([(side - i - 0.5) * height for i in shown], names)
    axes.set(title=in_figure(title), xlabel="quantile of z1", ylabel="quantile of z2")
    return figure


def show(axes: Axes, image: Float[Tensor, "C H W"]) -> None:
    """Draws one image: in grey if it has one channel, otherwise with the first three as colours."""
    pixels = image.detach().cpu().numpy().transpose(1, 2, 0)
    axes.imshow(
        pixels[..., 0] if pixels.shape[-1] < 3 else pixels[..., :3],
        cmap="gray",
        vmin=0,
        vmax=1,
        extent=(0, pixels.shape[1], pixels.shape[0], 0),
        interpolation="nearest",
    )

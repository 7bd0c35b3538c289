"""Figures of latent codes: clouds and histograms, coloured by class, and models side by side."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from pyrovae.figures.images import canvas, show
from pyrovae.runtime.texts import in_figure

MAX_CLASSES = 20  # colours that can be told apart in a legend


def latent_cloud(z: Float[Tensor, "N 2"], labels: Int[Tensor, " N"] | None) -> Figure:
    """Encoded images as points, coloured by class where there are labels; circles mark the prior."""
    figure = cloud(z, labels, "means of q(z|x); dashed: one and two scales of p(z)")
    _mark_prior(figure.axes[0])
    return figure


def _mark_prior(axes: Axes) -> None:
    angle = np.linspace(0, 2 * np.pi, 200)
    for radius in (1, 2):
        axes.plot(radius * np.cos(angle), radius * np.sin(angle), "--", color="0.5", linewidth=0.8)


def cloud(
    points: Float[Tensor, "N 2"],
    labels: Int[Tensor, " N"] | None,
    title: str,
    names: Sequence[str] = ("z1", "z2"),
) -> Figure:
    """Points on two axes of one scale and these names, coloured by class where there are labels."""
    figure = Figure(figsize=(6.4, 5.4), layout="constrained")
    axes = figure.subplots()
    size = _scatter(axes, points, labels)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(title="class", markerscale=(30 / size) ** 0.5, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set(title=in_figure(title), xlabel=in_figure(names[0]), ylabel=in_figure(names[1]))
    axes.set_aspect("equal", adjustable="datalim")
    return figure


def _scatter(axes: Axes, points: Float[Tensor, "N 2"], labels: Int[Tensor, " N"] | None) -> float:
    """Draws points in the colours of their classes, and gives the size of a point."""
    size = float(np.clip(4000 / len(points), 3, 20))
    values = points.detach().cpu().numpy()
    for chosen, style in _classes(labels, len(points)):
        axes.scatter(*values[chosen].T, s=size, alpha=0.7, linewidths=0, **style)
    return size


def side_by_side(
    clouds: Mapping[str, Float[Tensor, "N 2"]],
    labels: Int[Tensor, " N"] | None,
    samples: Sequence[Sequence[Sequence[Float[Tensor, "C H W"]]]],
    errors: Mapping[str, float],
) -> Figure:
    """Models in columns: where they encode images, on one scale, and what they decode from prior draws.

    Args:
        clouds: By the model's name, its codes.
        samples: For each model, rows of decoded images.
        errors: Squared errors of reconstruction per image, by name, also of what has no column.
    """
    columns = len(clouds)
    figure = Figure(figsize=(4.2 * columns + 0.6, 10), layout="constrained")
    spaces = figure.add_gridspec(3, columns, height_ratios=[4, 4, 0.5 + 0.25 * len(errors)])
    everything = torch.cat([torch.tensor([[-2.0, -2.0], [2.0, 2.0]]), *(z.float() for z in clouds.values())])
    left, bottom = (1.05 * everything.amin(0)).tolist()
    right, top = (1.05 * everything.amax(0)).tolist()
    for i, (name, points) in enumerate(clouds.items()):
        axes = figure.add_subplot(spaces[0, i], xlim=(left, right), ylim=(bottom, top), aspect="equal")
        _scatter(axes, points, labels)
        _mark_prior(axes)
        axes.set_title(f"{in_figure(name)}: codes\ndashed: one and two scales of p(z)", fontsize="medium")
        decoded = figure.add_subplot(spaces[1, i])
        show(decoded, canvas(samples[i]))
        decoded.set_title("decoded from draws of p(z)", fontsize="medium")
        decoded.set_axis_off()
    bars = figure.add_subplot(spaces[2, :])
    drawn = bars.barh(
        list(map(in_figure, errors)), list(errors.values()), color=[f"C{i}" for i in range(len(errors))]
    )
    bars.bar_label(drawn, fmt="%.2f", padding=3)
    bars.invert_yaxis()
    bars.margins(x=0.12)
    bars.set_title("squared error of reconstruction, per image", fontsize="medium")
    return figure


def latent_histogram(z: Float[Tensor, " N"], labels: Int[Tensor, " N"] | None, *, prior: bool = True) -> Figure:
    """Encoded images on a latent line: how many lie where, one class upon another where there are labels.

    Args:
        prior: Whether to draw the standard normal's density, to the histogram's scale.
    """
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    values = z.detach().cpu().numpy()
    classes = list(_classes(labels, len(z)))
    bins = int(np.clip(2 * len(z) ** 0.5, 10, 60))
    styles = {key: [style[key] for _, style in classes] for key in classes[0][1]}
    _, edges, _ = axes.hist([values[chosen] for chosen, _ in classes], bins=bins, stacked=True, **styles)
    if prior:
        line = np.linspace(min(-3, edges[0]), max(3, edges[-1]), 300)
        density = np.exp(-(line**2) / 2) / np.sqrt(2 * np.pi)
        axes.plot(line, len(z) * (edges[1] - edges[0]) * density, "--", color="0.3", linewidth=1)
    if "label" in styles:
        axes.legend(title="class", loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set(title="means of q(z|x)" + "; dashed: p(z)" * prior, xlabel="z1", ylabel="images")
    return figure


def _classes(labels: Int[Tensor, " N"] | None, n: int) -> Iterator[tuple[np.ndarray, dict]]:
    """Selects the points of each class, with its colour and label; all n points if classes tell nothing."""
    classes = [] if labels is None else labels.unique().tolist()
    if not 1 < len(classes) <= MAX_CLASSES:
        yield np.ones(n, dtype=bool), {"color": "C0"}
        return
    colours = colormaps["tab10" if len(classes) <= 10 else "tab20"].colors
    for label, colour in zip(classes, colours, strict=False):
        yield (labels == label).cpu().numpy(), {"color": colour, "label": str(label)}

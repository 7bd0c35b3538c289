"""Results in, matplotlib Figures out. Nothing here reads or writes a file, or computes a result."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from pyrovae.runtime.texts import in_figure, in_legend
from pyrovae.variance.intervals import Slope
from pyrovae.variance.results import Row

MAX_CLASSES = 20  # colours that can be told apart in a legend
MAX_NAMED = 100  # runs that a legend names
TERMS = {"elbo": "ELBO", "reconstruction": "reconstruction, E log p(x|z)", "kl": "KL(q(z|x) || p(z))"}


def curves(history: Sequence[dict]) -> Figure:
    """ELBO, reconstruction and KL over epochs, training beside validation, in nats per image.

    Args:
        history: Rows of `metrics.jsonl`, one per epoch; a term that the run does not have has no panel.
    """
    terms = {term: title for term, title in TERMS.items() if history[0][term] is not None}
    figure = Figure(figsize=(max(5, 10 / 3 * len(terms)), 3.2), layout="constrained")
    epochs = [row["epoch"] for row in history]
    marker = "o" if len(epochs) < 3 else None
    every = figure.subplots(1, len(terms), squeeze=False)[0]
    for axes, (term, title) in zip(every, terms.items(), strict=True):
        axes.plot(epochs, [row[term] for row in history], label="training", marker=marker)
        axes.plot(epochs, [row[f"validation_{term}"] for row in history], label="validation", marker=marker)
        axes.set(title=title, xlabel="epoch", ylabel="nats per image")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()
        _focus(axes, [row[f"{prefix}{term}"] for row in history for prefix in ("", "validation_")])
    return figure


def overlaid_curves(histories: Mapping[str, Sequence[dict]]) -> Figure:
    """ELBO, reconstruction and KL of several runs, each in its colour, in nats per image.

    Args:
        histories: By the run's name in the legend, its rows of `metrics.jsonl`.
    """
    named = min(len(histories), MAX_NAMED)
    figure = Figure(figsize=(13, max(3.6, 0.2 * named + 1)), layout="constrained")
    figure.suptitle("solid: validation; dashed: training", fontsize="medium")
    every = figure.subplots(1, 3)
    for axes, (term, title) in zip(every, TERMS.items(), strict=True):
        rows = [row for history in histories.values() for row in history if row[term] is not None]
        if not rows:
            axes.set_axis_off()
            continue
        for i, (name, history) in enumerate(histories.items()):
            if history[0][term] is None:
                continue
            epochs = [row["epoch"] for row in history]
            style = {
                "color": colormaps["tab20"](2 * i % 20 + i // 10 % 2),
                "marker": "o" if len(epochs) < 3 else None,
            }
            axes.plot(epochs, [row[f"validation_{term}"] for row in history], label=in_legend(name), **style)
            axes.plot(epochs, [row[term] for row in history], linestyle="--", linewidth=0.8, **style)
        axes.set(title=title, xlabel="epoch", ylabel="nats per image")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _focus(axes, [row[f"{prefix}{term}"] for row in rows for prefix in ("", "validation_")])
    # Every run has a reconstruction, whatever else it has.
    handles, names = every[1].get_legend_handles_labels()
    title = f"the first {named} of {len(names)} runs" if len(names) > named else None
    figure.legend(handles[:named], names[:named], title=title, loc="outside right center", fontsize="small")
    return figure


def _focus(axes: Axes, values: list[float]) -> None:
    """Leaves the first epochs' plunge out of the view where it would flatten all that follows."""
    low, high = np.percentile([v for v in values if np.isfinite(v)] or [0.0], [5, 95])
    margin = 0.5 * (high - low)
    bottom, top = axes.get_ylim()
    if margin > 0:
        axes.set_ylim(max(bottom, low - margin), min(top, high + margin))


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
    _show(axes, _canvas(rows))
    axes.set_frame_on(False)
    axes.tick_params(length=0, labelsize="small")
    axes.set_xticks(
        [j * (width + 1) + width / 2 for j in range(len(column_names))], map(in_figure, column_names)
    )
    axes.set_yticks([i * (height + 1) + height / 2 for i in range(len(row_names))], map(in_figure, row_names))
    if not (row_names or column_names):
        axes.set_axis_off()
    return figure


def _canvas(rows: Sequence[Sequence[Float[Tensor, "C H W"]]]) -> Float[Tensor, "C rows columns"]:
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
    _show(axes, canvas)
    shown = range(0, side, max(1, side // 5))
    names = [f"{quantiles[k]:.2f}" for k in shown]
    axes.set_xticks([(j + 0.5) * width for j in shown], names)
    axes.set_yticks([(side - i - 0.5) * height for i in shown], names)
    axes.set(title=in_figure(title), xlabel="quantile of z1", ylabel="quantile of z2")
    return figure


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
    """Points in the colours of their classes; gives their size."""
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
        _show(decoded, _canvas(samples[i]))
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
    """Which of n points belong to each class, with its colour and label; all of them if that tells nothing."""
    classes = [] if labels is None else labels.unique().tolist()
    if not 1 < len(classes) <= MAX_CLASSES:
        yield np.ones(n, dtype=bool), {"color": "C0"}
        return
    colours = colormaps["tab10" if len(classes) <= 10 else "tab20"].colors
    for label, colour in zip(classes, colours, strict=False):
        yield (labels == label).cpu().numpy(), {"color": colour, "label": str(label)}


def variance(rows: Sequence[Row], slopes: dict[str, dict[str, Slope]], title: str = "") -> Figure:
    """Estimators compared: variance and signal-to-noise against K, what precision costs, and where noise lies.

    Args:
        rows: As `compare` gives them.
        slopes: Of log SNR in log K, by estimator and "encoder" or "decoder".
    """
    figure = Figure(figsize=(13, 11), layout="constrained")
    figure.suptitle(in_figure(title), fontsize="medium")
    (of_variance, of_work), (of_encoder, of_decoder), (of_layers, of_legend) = figure.subplots(3, 2)
    of_legend.set_axis_off()
    labels = list(dict.fromkeys(row.estimator for row in rows))
    styles = {
        label: {"color": colormaps["tab20"](i % 20), "marker": "osD^v<>P*X"[i % 10], "markersize": 5}
        for i, label in enumerate(labels)
    }
    for label in labels:
        own = [row for row in rows if row.estimator == label and row.tr_cov > 0]
        particles = [row.particles for row in own]
        if own:  # a gradient without noise has no place on a logarithmic axis
            low, high = zip(*(row.tr_cov_interval for row in own), strict=True)
            of_variance.fill_between(particles, low, high, color=styles[label]["color"], alpha=0.2, linewidth=0)
        of_variance.plot(particles, [row.tr_cov for row in own], label=in_legend(label), **styles[label])
        for axes, group in ((of_encoder, "encoder"), (of_decoder, "decoder")):
            slope = slopes.get(label, {}).get(group)
            resolved = slope is not None and not slope.unresolved
            name = f"{in_legend(label)}: slope {slope.value:+.2f}" if resolved else None
            ratios = [max(getattr(row, f"snr_{group}"), row.noise_floor / 10) for row in own]
            axes.plot(particles, ratios, label=name, **styles[label])
    of_variance.set(title="tr Cov of the gradient, all parameters", ylabel="tr Cov")
    for axes, group in ((of_encoder, "encoder"), (of_decoder, "decoder")):
        floor = rows[0].noise_floor
        axes.axhspan(floor / 10, floor, color="0.9", zorder=0, label="below the noise floor")
        axes.set(title=f"signal-to-noise ratio, {group}", ylabel="||mean|| / sqrt(tr Cov)")
        axes.legend(fontsize="xx-small", ncols=2)
    scale = "log" if any(row.tr_cov > 0 for row in rows) else "linear"  # nothing is noisy: nothing to scale
    for axes in (of_variance, of_encoder, of_decoder):
        axes.set(xscale="log", yscale=scale, xlabel="particles K")
        ticks = sorted({row.particles for row in rows})
        axes.set_xticks(ticks, map(str, ticks), minor=False)
        axes.minorticks_off()
    _work_bars(of_work, rows, labels, styles)
    _layer_map(of_layers, rows, labels)
    handles, names = of_variance.get_legend_handles_labels()
    of_legend.legend(handles, names, loc="center", ncols=2, title="estimators", fontsize="small")
    return figure


def _work_bars(axes: Axes, rows: Sequence[Row], labels: Sequence[str], styles: dict[str, dict]) -> None:
    """For each estimator, tr Cov times seconds at each K, the lighter the more particles."""
    particles = sorted({row.particles for row in rows})
    height = 0.8 / len(particles)
    for row in rows:
        if row.work > 0:
            rank = particles.index(row.particles)
            axes.barh(
                labels.index(row.estimator) + (rank - (len(particles) - 1) / 2) * height,
                row.work,
                height=height,
                color=styles[row.estimator]["color"],
                alpha=1 - 0.7 * rank / len(particles),
            )
    axes.set_yticks(range(len(labels)), map(in_figure, labels), fontsize="small")
    axes.invert_yaxis()
    axes.set(
        xscale="log" if any(row.work > 0 for row in rows) else "linear",
        title=f"work-normalised variance, K = {', '.join(map(str, particles))} (downwards)",
        xlabel="tr Cov x seconds per draw",
    )


def _layer_map(axes: Axes, rows: Sequence[Row], labels: Sequence[str]) -> None:
    """tr Cov by parameter for each estimator, at the K that most of them were measured with."""
    particles = [row.particles for row in rows]
    common = max(sorted(set(particles)), key=particles.count)
    chosen = [row for label in labels for row in rows if (row.estimator, row.particles) == (label, common)]
    names = list(chosen[0].by_parameter)
    values = np.array([[row.by_parameter[name] for name in names] for row in chosen])
    values = np.log10(np.where(values > 0, values, np.nan))
    finite = values[np.isfinite(values)]
    low, top = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=max(low, top - 8), vmax=top)
    axes.set_xticks(range(len(names)), map(in_figure, names), rotation=90, fontsize="xx-small")
    axes.set_yticks(range(len(chosen)), [in_figure(row.estimator) for row in chosen], fontsize="small")
    axes.set_title(f"log10 tr Cov by parameter, K = {common}")
    axes.figure.colorbar(image, ax=axes)


def variance_over_training(rows: dict[int, Sequence[Row]], title: str = "") -> Figure:
    """tr Cov of each estimator at epochs of one training run, a panel for each K.

    Args:
        rows: As `compare` gives them, by epoch.
    """
    epochs = sorted(rows)
    keys = list(dict.fromkeys((row.estimator, row.particles) for epoch in epochs for row in rows[epoch]))
    labels = list(dict.fromkeys(label for label, _ in keys))
    particles = sorted({k for _, k in keys})
    figure = Figure(figsize=(4.5 * len(particles) + 2, 4.5), layout="constrained")
    figure.suptitle(in_figure(title), fontsize="medium")
    every = figure.subplots(1, len(particles), sharey=True, squeeze=False)[0]
    for axes, k in zip(every, particles, strict=True):
        for label in (label for label, own in keys if own == k):
            found = {e: row for e in epochs for row in rows[e] if (row.estimator, row.particles) == (label, k)}
            i = labels.index(label)
            low, high = zip(*(row.tr_cov_interval for row in found.values()), strict=True)
            colour = colormaps["tab20"](i % 20)
            axes.fill_between(list(found), low, high, color=colour, alpha=0.2, linewidth=0)
            values = [row.tr_cov for row in found.values()]
            axes.plot(
                list(found),
                values,
                label=in_legend(label),
                color=colour,
                marker="osD^v<>P*X"[i % 10],
                markersize=5,
            )
        axes.set(title=f"K = {k}", xlabel="epoch", yscale="log")
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xlim(epochs[0] - 0.2, epochs[-1] * 1.3 + 0.2)
        axes.set_xticks(epochs, map(str, epochs))
        axes.minorticks_off()
    every[0].set_ylabel("tr Cov of the gradient, all parameters")
    handles = {name: h for axes in every for h, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside right center", fontsize="small")
    return figure


def _show(axes: Axes, image: Float[Tensor, "C H W"]) -> None:
    """One image: grey for one channel, the first three as colours otherwise."""
    pixels = image.detach().cpu().numpy().transpose(1, 2, 0)
    axes.imshow(
        pixels[..., 0] if pixels.shape[-1] < 3 else pixels[..., :3],
        cmap="gray",
        vmin=0,
        vmax=1,
        extent=(0, pixels.shape[1], pixels.shape[0], 0),
        interpolation="nearest",
    )

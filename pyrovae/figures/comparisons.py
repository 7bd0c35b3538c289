"""Figures of gradient estimators: variance, signal-to-noise ratio and cost, at one state or over training."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pyrovae.runtime.texts import in_figure, in_legend


@runtime_checkable
class Measured(Protocol):
    """The part of a `variance.Row` that is drawn: one estimator with K particles."""

    estimator: str
    particles: int
    tr_cov: float
    tr_cov_interval: tuple[float, float]
    snr_encoder: float
    snr_decoder: float
    noise_floor: float
    work: float
    by_parameter: dict[str, float]


@runtime_checkable
class Fitted(Protocol):
    """The part of a slope, of log SNR in log K, that is drawn; `unresolved` is empty if it has a value."""

    value: float
    unresolved: tuple[int, ...]


def variance(rows: Sequence[Measured], slopes: dict[str, dict[str, Fitted]], title: str = "") -> Figure:
    """Estimators compared: variance and signal-to-noise against K, what precision costs, and where noise lies.

    Args:
        rows: As `compare` gives them.
        slopes: The slopes of log SNR in log K, by estimator and "encoder" or "decoder".
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
    for axes in (of_variance, of_encoder, of_decoder):
        _scale_particles(axes, rows)
    _work_bars(of_work, rows, labels, styles)
    _layer_map(of_layers, rows, labels)
    handles, names = of_variance.get_legend_handles_labels()
    of_legend.legend(handles, names, loc="center", ncols=2, title="estimators", fontsize="small")
    return figure


def _scale_particles(axes: Axes, rows: Sequence[Measured]) -> None:
    """Makes both axes logarithmic, with a tick at each number of particles."""
    scale = "log" if any(row.tr_cov > 0 for row in rows) else "linear"  # nothing is noisy: nothing to scale
    axes.set(xscale="log", yscale=scale, xlabel="particles K")
    ticks = sorted({row.particles for row in rows})
    axes.set_xticks(ticks, map(str, ticks), minor=False)
    axes.minorticks_off()


def _work_bars(axes: Axes, rows: Sequence[Measured], labels: Sequence[str], styles: dict[str, dict]) -> None:
    """Draws tr Cov times seconds for each estimator and K; more particles have a lighter bar."""
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


def _layer_map(axes: Axes, rows: Sequence[Measured], labels: Sequence[str]) -> None:
    """Draws tr Cov by parameter for each estimator, at the K with which most of them were measured."""
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


def variance_over_training(rows: dict[int, Sequence[Measured]], title: str = "") -> Figure:
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

"""Figures of training: the bound's terms over epochs, of one run or of several."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pyrovae.runtime.texts import in_legend

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

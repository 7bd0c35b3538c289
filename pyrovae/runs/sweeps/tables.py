"""The results of a sweep as a table: mean and spread over seeds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pyrovae.runs.sweeps.cells import Settings
from pyrovae.runtime.texts import in_markdown
from pyrovae.training.checkpoints import read_metrics

METRICS = {
    "loss_without_constant": "final training loss, SSE/(2c) + KL",
    "elbo": "final training ELBO",
    "validation_elbo": "best validation ELBO",
    "validation_reconstruction": "best validation reconstruction",  # of an autoencoder, which has no ELBO
}  # columns of the table, in nats per image


def to_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table for reading: mean, and the spread over seeds behind it, in nats per image."""
    shown = [metric for metric in METRICS if any(row[metric] is not None for row in rows)]
    plain = [
        n for n in dict.fromkeys(n for row in rows for n in row) if n.removesuffix("_spread") not in METRICS
    ]
    lines = [[*plain, *(METRICS[metric] for metric in shown)]]
    for row in rows:
        cells = [in_markdown(str(row.get(name, ""))) for name in plain]
        for metric in shown:
            mean, spread = row[metric], row[f"{metric}_spread"]
            cells.append(
                "" if mean is None else f"{mean:.2f}" if spread is None else f"{mean:.2f} ± {spread:.2f}"
            )
        lines.append(cells)
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def metrics_of(run: Path) -> Settings:
    """A finished run's values of METRICS."""
    rows = read_metrics(run)
    best, last = max(rows, key=lambda row: row["validation_bound"]), rows[-1]
    objective = last["reconstruction"] if last["elbo"] is None else last["elbo"]
    loss = last["loss_without_constant"]
    return {
        "loss_without_constant": None if loss == -objective else loss,  # None: nothing was left out
        "elbo": last["elbo"],
        "validation_elbo": best["validation_elbo"],
        "validation_reconstruction": best["validation_reconstruction"] if last["elbo"] is None else None,
    }

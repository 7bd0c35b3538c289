"""Pictures of a run's training, from its metrics."""

from pathlib import Path

from matplotlib.figure import Figure

from pyrovae import figures
from pyrovae.runs.directories import RunError, read_config
from pyrovae.training.checkpoints import read_metrics


def curves(*several: str | Path) -> Figure:
    """The bound's terms over epochs: of one run, or of several laid over one another."""
    histories = [history(Path(run)) for run in several]
    if len(histories) == 1:
        return figures.curves(histories[0])
    names = [Path(run).resolve().name for run in several]
    if len(set(names)) < len(names):
        names = [str(run) for run in several]
    if not histories or len(set(names)) < len(names):
        raise ValueError(f"expected at least one run, and none twice, got {', '.join(names) or 'none'}")
    return figures.overlaid_curves(dict(zip(names, histories, strict=True)))


def history(run: Path) -> list[dict]:
    """A run's metrics, of one epoch at least."""
    read_config(run)
    rows = read_metrics(run)
    needed = {"epoch", *(prefix + term for prefix in ("", "validation_") for term in figures.TERMS)}
    if not rows or not all(isinstance(row, dict) and needed <= row.keys() for row in rows):
        raise RunError(f"expected the metrics of at least one epoch in {run / 'metrics.jsonl'}, got none")
    return rows

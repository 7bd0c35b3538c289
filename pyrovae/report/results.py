"""The sections with results: curves of training, the evaluation, and the noise of gradients."""

from pyrovae import figures
from pyrovae.report.elements import Picture, Section, Table
from pyrovae.report.subjects import Subject
from pyrovae.report.words import NONE, number, outdated, to_do
from pyrovae.runs import assessment, laboratory, pictures
from pyrovae.variance.results import Comparison


def curves(s: Subject) -> Section:
    """The bound's terms over epochs."""
    epochs = {row["epoch"]: row for row in (s.best, s.history[-1])}
    columns = {
        f"{split}, epoch {epoch}": (row, prefix)
        for epoch, row in epochs.items()
        for split, prefix in {"training": "", "validation": "validation_"}.items()
    }
    rows = {
        title: [number(row[prefix + term]) for row, prefix in columns.values()]
        for term, title in ({"bound": "bound, as it is trained"} | figures.TERMS).items()
    }
    if rows["bound, as it is trained"] == rows[figures.TERMS["elbo"]]:
        del rows["bound, as it is trained"]
    return Section(
        name="curves",
        title="Curves",
        pictures=[
            Picture.of(
                pictures.curves(s.run),
                "Training is averaged over an epoch, as the parameters move; validation is at its end.",
                f"Line charts of the bound's terms over {len(s.history)} epochs, training beside validation.",
            )
        ],
        tables=[
            Table(
                "At the best epoch, and at the last",
                [["nats per image", *columns], *([title, *cells] for title, cells in rows.items())],
            )
        ],
    )


def evaluation(s: Subject) -> Section:
    """The results of `evaluate`, or how to get them."""
    found = s.evaluation
    if found is None:
        return Section(name="evaluation", title="Evaluation", **to_do(s, "evaluated", "evaluate"))
    return Section(
        name="evaluation",
        title="Evaluation",
        warnings=[*found.notes, *outdated(s, found.settings)],
        text=assessment.title(found),
        tables=[
            Table(
                "Standard errors are over images. ESS is the effective sample size, and k-hat tells how heavy "
                "the tail of the weights is.",
                assessment.rows(found),
            )
        ],
        notes=assessment.remarks(found),
    )


def variance(s: Subject) -> Section:
    """The results of `variance`, or how to get them."""
    section = {"name": "variance", "title": "Gradient variance"}
    found = s.variance
    if found is None:
        return Section(**section, **to_do(s, "measured", "variance"))
    return Section(
        **section,
        warnings=outdated(s, found.settings),
        pictures=[
            Picture.of(
                figures.variance(found.rows, found.slopes, laboratory.title(found)),
                "The noise of gradient estimators at these parameters, on one batch of validation images.",
                "Charts of variance, signal-to-noise ratio and cost by estimator and K, and a map by layer.",
            )
        ],
        tables=[_estimators(found)],
        notes=laboratory.notes(found),
    )


def variance_over_training(s: Subject) -> Section | None:
    """The results of `variance --along`; None if there are none."""
    found = s.along
    if found is None:
        return None
    last = found[max(found)]
    rows = {epoch: comparison.rows for epoch, comparison in found.items()}
    return Section(
        name="variance-over-training",
        title="Gradient variance over training",
        pictures=[
            Picture.of(
                figures.variance_over_training(rows, laboratory.title(last, over_training=True)),
                "The noise of gradient estimators at epochs of a training run with these settings.",
                "Line charts of variance over epochs by estimator, a panel for each K.",
            )
        ],
        tables=[_estimators(last)],
        notes=laboratory.notes(last),
    )


def _estimators(found: Comparison) -> Table:
    cells = [[NONE if cell.startswith("nan") else cell for cell in row] for row in laboratory.rows(found)]
    return Table(laboratory.title(found), cells, words=(0, 2))

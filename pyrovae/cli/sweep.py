"""`pyrovae sweep`: trains a grid of runs."""

import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from pyrovae import figures, runs
from pyrovae.cli.going_on import same_again
from pyrovae.cli.group import SUMMARIES
from pyrovae.cli.messages import EXIT_FAILED, fail, one_line_errors, say
from pyrovae.cli.options import AUTOENCODER, SHORTHAND, TRUST, given_in, option_of, with_shorthand
from pyrovae.runs import sweeps
from pyrovae.runs.config import Config
from pyrovae.runtime.signals import StoppingSignals
from pyrovae.runtime.texts import printable, to_csv
from pyrovae.runtime.whole_files import save_figure, write_atomically


def _sweep(
    over: tuple[str, ...],
    recipe: str | None,
    autoencoder: bool,
    jobs: int,
    out: str | None,
    quiet: bool,
    trust: bool,
    **settings: Any,
) -> None:
    ctx = click.get_current_context()
    with one_line_errors(), StoppingSignals():
        given = with_shorthand(given_in(ctx, settings), autoencoder)
        plan = _planned(over, recipe, given)
        typed = "guide" in given or any(text.partition("=")[0].strip() == "guide" for text in over)
        trust = plan.admit(trust=trust or typed)
        for name in AUTOENCODER if autoencoder else ():
            if {cell.get(name, AUTOENCODER[name]) for cell in plan.cells} != {AUTOENCODER[name]}:
                raise sweeps.SweepError(
                    f"expected {name} {AUTOENCODER[name]} with --autoencoder, got others", field=name
                )
        directory = Path(out) if out else runs.new_directory(Path("runs") / "sweep", None)
        sweep = sweeps.Sweep(directory, plan, trust)
        bar = tqdm(total=len(plan.cells), unit="run", disable=quiet, dynamic_ncols=True)

        def report(cell: str, outcome: str) -> None:
            bar.update()
            if not quiet or outcome not in ("finished", "skipped"):
                bar.write(printable(f"{cell or 'the run'}: {outcome}"), file=sys.stderr)

        with same_again(ctx, directory, out):
            with bar:
                failed = sweep.run(jobs, report)
            rows = _results(sweep)
        if rows:
            say(sweeps.to_markdown(rows), nl=False)
        left = "results.csv, results.md and curves.png" if rows else "No run has finished"
        say(f"{left}: {directory}")
        if failed:
            fail(f"{len(failed)} of {len(plan.cells)} runs failed; see {directory / 'cells'}", EXIT_FAILED)


def _results(sweep: sweeps.Sweep) -> list[dict[str, Any]]:
    """Writes the table and the curves of a sweep in its directory, if a run has finished; gives the table."""
    rows = sweep.table()
    if rows:
        write_atomically(sweep.directory / "results.csv", to_csv(rows))
        write_atomically(sweep.directory / "results.md", sweeps.to_markdown(rows))
        save_figure(figures.overlaid_curves(sweep.histories()), sweep.directory / "curves.png")
    return rows


def _planned(over: tuple[str, ...], recipe: str | None, given: dict[str, Any]) -> sweeps.Recipe:
    """The cells of a recipe or of nothing, times the values to go over."""
    base = sweeps.read_recipe(recipe) if recipe else sweeps.Recipe(({},), {})
    values: dict[str, list[Any]] = {}
    by_name = {field.name: field for field in fields(Config)}
    for text in over:
        name, _, listed = text.partition("=")
        field = by_name.get(name.strip().replace("-", "_"))
        if field is None or not listed:
            raise sweeps.SweepError(f"expected over as NAME=VALUE,VALUE,... of a train option, got {text!r}")
        option = option_of(field)
        parts = listed.split(";" if ";" in listed else ",")
        try:
            values[field.name] = [option.type.convert(part.strip(), option, None) for part in parts]
        except click.BadParameter as error:
            raise sweeps.SweepError(f"expected over {field.name} with its values: {error.message}") from None
    given = {name: value for name, value in given.items() if name not in values}
    cells = sweeps.without_repeats(base.cells, given | values)
    return sweeps.Recipe(sweeps.grid(values, cells), base.shared | given, base.description)


_OPTIONS = [
    *(option_of(field) for field in fields(Config)),
    click.Option(
        ["--over"],
        multiple=True,
        metavar="NAME=V,V,...",
        help="Go over these values of a train option; several times for a grid. Values with commas: V;V.",
    ),
    click.Option(
        ["--recipe"], metavar="NAME|FILE", help=f"A TOML file, or one of {', '.join(sweeps.recipes())}."
    ),
    SHORTHAND,
    TRUST,
    click.Option(
        ["--jobs", "-j"], type=click.IntRange(min=1), default=1, show_default=True, help="Runs at a time."
    ),
    click.Option(
        ["--out", "-o"],
        metavar="DIR",
        show_default="runs/sweep-<n>",
        help="A directory for the runs; one of the same sweep is continued.",
    ),
    click.Option(["--quiet"], is_flag=True, help="Print the table only."),
]


sweep_command = click.Command("sweep", callback=_sweep, help=SUMMARIES["sweep"], params=_OPTIONS)

"""`pyrovae variance`: compares the noise of gradient estimators."""

import dataclasses
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from pyrovae import runs
from pyrovae.cli.group import SUMMARIES
from pyrovae.cli.messages import one_line_errors, say
from pyrovae.cli.options import TRUST, Parsed, counts, given_in, option_of
from pyrovae.runs.config import Config
from pyrovae.runs.laboratory import TESTBEDS, Measurement, results_directory, table, write
from pyrovae.runtime.errors import FieldError
from pyrovae.variance.names import every_estimator
from pyrovae.variance.results import Comparison

# Options of a measurement, not of the model.
_MEASURED = "batch_size", "seed", "cuda", "alpha", "data_dir", "compile"


def _names(text: str) -> tuple[str, ...]:
    return tuple(every_estimator() if text == "all" else text.split(","))


def _variance(run: str | None, fresh: bool, testbed: str | None, along: bool, at: Any, **settings: Any) -> None:
    ctx = click.get_current_context()
    own = {name: settings.pop(name) for name in ("estimators", "particles", "draws", "batches")}
    trust = settings.pop("trust")
    out, quiet, as_json = settings.pop("out"), settings.pop("quiet"), settings.pop("as_json")
    with one_line_errors():
        _check_call(ctx, run, fresh, testbed, along, at, settings, own)
        own = {name: value for name, value in own.items() if value is not None}
        if testbed:
            own = {"particles": (1, 2, 4), "draws": 4096} | own
        of_batch = {name: settings.pop(name) for name in ("batch_size", "alpha", "compile")}
        measurement = Measurement(**own, **of_batch, seed=settings["seed"], quiet=quiet or as_json)
        with results_directory(run, out) as directory:
            if testbed:
                found = measurement.of_testbed(TESTBEDS[testbed]())
            elif along:
                found = _along(measurement, run, at, settings, trust)
            elif fresh:
                found = measurement.of_config(Config(**settings))
            else:
                found = measurement.of_run(run, _of_run(run, settings), trust=trust)
            write(directory, found)
        by_epoch = found if along else {None: found}
        if as_json:
            say((directory / "variance.json").read_text(), nl=False)
        elif quiet:
            say(directory)
        else:
            say("\n\n".join(table(comparison) for comparison in by_epoch.values()))
            say(f"variance.json, variance.csv and figures: {directory}")


def _check_call(
    ctx: click.Context,
    run: str | None,
    fresh: bool,
    testbed: str | None,
    along: bool,
    at: Any,
    settings: dict[str, Any],
    own: dict[str, Any],
) -> None:
    """Checks that the options on the command line go together.

    Raises:
        ValueError: They do not.
    """
    if (run is not None) + fresh + (testbed is not None) != 1:
        raise ValueError("expected one of RUN, --fresh and --testbed: see --help")
    of_model = given_in(ctx, {name: value for name, value in settings.items() if name not in _MEASURED})
    if of_model and not fresh:
        raise FieldError(f"expected {next(iter(of_model))} with --fresh only", field=next(iter(of_model)))
    if (along or at) and testbed:
        raise FieldError(
            "expected along with RUN or --fresh, got --testbed, which is not trained", field="along"
        )
    about_images = given_in(
        ctx, {n: settings[n] for n in ("batch_size", "cuda", "data_dir")} | {"batches": own["batches"]}
    )
    if testbed and about_images:
        raise FieldError(
            f"expected {next(iter(about_images))} with RUN or --fresh, got it with --testbed",
            field=next(iter(about_images)),
        )
    if at and not along:
        raise FieldError("expected at with --along only", field="at")


def _along(
    measurement: Measurement, run: str | None, at: Any, settings: dict[str, Any], trust: bool
) -> dict[int, Comparison]:
    """Measures at epochs of a training run, which is that of `run` or, without one, of the settings."""
    config = Config(**settings) if run is None else _of_run(run, settings)
    if run is not None:
        runs.admit(Path(run), config, trust=trust)
    epochs = at or (*(e for e in (0, 1, 10, 100) if e < config.epochs), config.epochs)
    return measurement.along(config, epochs)


def _of_run(run: str, settings: dict[str, Any]) -> Config:
    """A run's settings, but with the device and the place of the data that were asked for."""
    config, _ = runs.read_config(Path(run))
    place = {"data_dir": settings["data_dir"]} if settings["data_dir"] else {}
    return dataclasses.replace(config, cuda=settings["cuda"], **place)


_DEFAULTS = Measurement()
of_train = [option_of(field) for field in fields(Config) if field.name not in ("particles", "batch_size")]
_OPTIONS = [
    click.Argument(["run"], required=False, metavar="[RUN]"),
    click.Option(["--fresh"], is_flag=True, help="A model of these train options, at initialisation."),
    click.Option(
        ["--testbed"], type=click.Choice(list(TESTBEDS)), help="A model whose truth is known exactly."
    ),
    click.Option(["--along"], is_flag=True, help="Train the run again, and measure at some epochs of it."),
    click.Option(
        ["--at"],
        type=Parsed(counts),
        metavar="N,N,...",
        show_default="0,1,10,100 and the last",
        help="Which epochs.",
    ),
    click.Option(
        ["--estimators"],
        type=Parsed(_names),
        default=",".join(_DEFAULTS.estimators),
        metavar="NAME,...|all",
        show_default="the usual ones",
        help="Names of `list`; with :score, :pathwise or :antithetic for what is not their default.",
    ),
    click.Option(
        ["--particles", "-K"],
        type=Parsed(counts),
        metavar="K,K,...",
        show_default="1,4,16,64, and 1,2,4 on a test-bed",
        help="Monte Carlo samples per image.",
    ),
    click.Option(
        ["--draws"],
        type=int,
        metavar="N",
        show_default=f"{_DEFAULTS.draws:,}, and 4,096 on a test-bed",
        help="Gradients drawn of each.",
    ),
    click.Option(
        ["--batch-size", "-b"],
        default=_DEFAULTS.batch_size,
        show_default=True,
        help="Images in the batch measured on.",
    ),
    click.Option(
        ["--batches"],
        default=_DEFAULTS.batches,
        show_default=True,
        help="Batches over which means are compared.",
    ),
    click.Option(["--json", "as_json"], is_flag=True, help="Print variance.json instead of a table."),
    click.Option(
        ["--out", "-o"],
        metavar="DIR",
        show_default="RUN/variance-<n> or runs/variance-<n>",
        help="A new or empty directory for the results.",
    ),
    click.Option(["--quiet"], is_flag=True, help="Print the directory only."),
    TRUST,
    *of_train,
]


variance_command = click.Command(
    "variance",
    callback=_variance,
    help=SUMMARIES["variance"] + "\n\nAll numbers are conditional on the parameters and one batch.",
    params=_OPTIONS,
)

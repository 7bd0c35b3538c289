"""The commands: parse, call the package, print. Their options are made from Config and the registries."""

import contextlib
import dataclasses
import inspect
import math
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

import click

from pyrovae import runs
from pyrovae.cli import SUMMARIES
from pyrovae.comparison import every_estimator
from pyrovae.config import Config
from pyrovae.data import DATASETS
from pyrovae.estimators import ESTIMATORS
from pyrovae.evaluation import bits_per_dim
from pyrovae.guides import GUIDES
from pyrovae.laboratory import TESTBEDS, Measurement, directory_for, table, write
from pyrovae.likelihoods import LIKELIHOODS
from pyrovae.networks import NETWORKS
from pyrovae.training import DivergedError, Fit, describe

EXIT_WRONG_CALL, EXIT_FAILED = 2, 1


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


class _Parsed(click.ParamType):
    """A click type from a parser that raises ValueError."""

    name = "value"

    def __init__(self, parse):
        self.parse = parse

    def convert(self, value, param, ctx):
        try:
            return self.parse(value) if isinstance(value, str) else value
        except ValueError:
            self.fail(f"{value!r} is not {param.metavar or param.type.name}", param, ctx)


def _option(field: Field) -> click.Option:
    """The option of a Config field: its flags, type, default and help."""
    meta = field.metadata
    flags = [_flag(field.name)]
    kind: Any = click.Choice(list(meta["choices"])) if meta["choices"] else meta["parse"]
    if meta["parse"] is bool:
        flags[0] += f"/{_flag('no_' + field.name)}"
    elif kind not in (int, float, str) and not meta["choices"]:
        kind = _Parsed(meta["parse"])
    if meta["short"]:
        flags.append(f"-{meta['short']}")
    return click.Option(
        flags,
        type=kind,
        default=field.default,
        metavar=meta.get("metavar"),
        show_default=meta.get("shown", True),
        help=meta["help"],
    )


def _given(ctx: click.Context, values: dict[str, Any]) -> dict[str, Any]:
    """The options that were on the command line."""
    return {
        name: value
        for name, value in values.items()
        if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    }


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """A wrong call or file as one line and exit code 2, a failed run as one line and exit code 1."""
    try:
        yield
    except ValueError as error:
        _fail(_with_flags(str(error)), EXIT_WRONG_CALL)
    except (DivergedError, OSError) as error:
        _fail(str(error), EXIT_FAILED)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("out of memory|allocate memory", str(error)):
            raise
        _fail(f"out of memory ({error}): try a smaller network or --batch-size", EXIT_FAILED)


def _with_flags(message: str) -> str:
    """`expected batch_size ...` as `expected --batch-size ...`, where that is an option."""
    names = "|".join(field.name for field in fields(Config)) + "|out|which|estimators|draws|batches|at|along"
    return re.sub(rf"^expected ({names})\b", lambda match: f"expected {_flag(match[1])}", message)


def _fail(message: str, code: int) -> None:
    click.echo(f"Error: {' '.join(message.split())}", err=True)
    raise click.exceptions.Exit(code)


def _train(out: str | None, resume: str | None, quiet: bool, **settings: Any) -> None:
    ctx = click.get_current_context()
    with _one_line_errors():
        if resume is None:
            run, result = runs.train(Config(**settings), out=out, quiet=quiet)
        elif out is not None:
            raise runs.RunError("expected out without --resume, which continues in the run's own directory")
        else:
            run, result = runs.resume(resume, changes=_given(ctx, settings), quiet=quiet)
        if result.stopped_by is not None and not result.progress.finished:
            click.echo(
                f"Stopped in epoch {result.progress.epoch + 1}; nothing is lost. To go on:\n"
                f"  {_program(ctx)} train --resume {shlex.quote(str(run))}",
                err=True,
            )
            raise click.exceptions.Exit(128 + result.stopped_by)
        click.echo(str(run) if quiet else _summary(run, result))


def _program(ctx: click.Context) -> str:
    """What to type for this program: a script by the interpreter that runs it."""
    if not sys.argv[0].endswith("cli.py"):
        return ctx.find_root().info_name
    on_path = shutil.which("python") == sys.executable
    return shlex.join(["python" if on_path else os.path.relpath(sys.executable), sys.argv[0]])


def _summary(run: Path, result: Fit) -> str:
    best, last = result.history[result.progress.best_epoch - 1], result.history[-1]
    config, data = runs.read_config(run)
    likelihood, pixels = config.make_likelihood(data["levels"]), math.prod(data["shape"])
    bound = best["validation_bound" if config.beta == 1 else "validation_elbo"]
    bits = bits_per_dim(likelihood, bound, pixels)
    lines = [
        f"Trained {result.progress.epoch} epochs; validation was best at epoch {best['epoch']}:",
        f"  {describe(best)} nats per image",
    ]
    if not likelihood.normalised:
        lines.append("  under a pseudo-likelihood, which is not normalised: its ELBO bounds nothing")
    if bits is not None:
        lines.append(f"  validation: at most {bits:.4f} bits per dimension")
    if likelihood.log_constant(pixels):
        lines.append(f"  final training loss SSE/(2c) + KL: {last['loss_without_constant']:.1f} nats per image")
    return "\n".join([*lines, f"Figures and checkpoints: {run}"])


train_command = click.Command(
    "train",
    callback=_train,
    help=SUMMARIES["train"],
    params=[
        *(_option(field) for field in fields(Config)),
        click.Option(
            ["--out", "-o"],
            metavar="DIR",
            show_default="runs/<dataset>-<likelihood>-<n>",
            help="A new or empty directory for the run.",
        ),
        click.Option(
            ["--resume"],
            metavar="RUN",
            help=f"Continue this run; only {', '.join(map(_flag, runs.MAY_CHANGE))} may differ.",
        ),
        click.Option(["--quiet"], is_flag=True, help="Print the run directory only."),
    ],
)


_MEASURED = ("batch_size", "seed", "cuda", "alpha", "data_dir")  # options of a measurement, not of the model


def _names(text: str) -> tuple[str, ...]:
    return tuple(every_estimator() if text == "all" else text.split(","))


def _counts(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _variance(run: str | None, fresh: bool, testbed: str | None, along: bool, at: Any, **settings: Any) -> None:
    ctx = click.get_current_context()
    own = {name: settings.pop(name) for name in ("estimators", "particles", "draws", "batches")}
    out, quiet, as_json = settings.pop("out"), settings.pop("quiet"), settings.pop("as_json")
    with _one_line_errors():
        if (run is not None) + fresh + (testbed is not None) != 1:
            raise ValueError("expected one of RUN, --fresh and --testbed: see --help")
        of_model = _given(ctx, {name: value for name, value in settings.items() if name not in _MEASURED})
        if of_model and not fresh:
            raise ValueError(f"expected {next(iter(of_model))} with --fresh only")
        if (along or at) and testbed:
            raise ValueError("expected along with RUN or --fresh, got --testbed, which is not trained")
        if at and not along:
            raise ValueError("expected at with --along only")
        own = {name: value for name, value in own.items() if value is not None}
        if testbed:
            own = {"particles": (1, 2, 4), "draws": 4096} | own
        of_batch = {name: settings.pop(name) for name in ("batch_size", "alpha")}
        measurement = Measurement(**own, **of_batch, seed=settings["seed"], quiet=quiet or as_json)
        directory = None
        if testbed:
            found = measurement.of_testbed(TESTBEDS[testbed]())
        elif fresh or along:
            config = Config(**settings) if fresh else _of_run(run, settings)
            if along:
                epochs = at or (*(e for e in (0, 1, 10, 100) if e < config.epochs), config.epochs)
                found = measurement.along(config, epochs)
            else:
                found = measurement.of_config(config)
        else:
            found = measurement.of_run(run, _of_run(run, settings).device())
        directory = directory_for(run, out)
        write(directory, found)
        by_epoch = found if along else {None: found}
        if as_json:
            click.echo((directory / "variance.json").read_text(), nl=False)
        elif quiet:
            click.echo(directory)
        else:
            click.echo("\n\n".join(table(comparison) for comparison in by_epoch.values()))
            click.echo(f"variance.json, variance.csv and figures: {directory}")


def _of_run(run: str, settings: dict[str, Any]) -> Config:
    """A run's settings, on the device and with the data's place that were asked for."""
    config, _ = runs.read_config(Path(run))
    place = {"data_dir": settings["data_dir"]} if settings["data_dir"] else {}
    return dataclasses.replace(config, cuda=settings["cuda"], **place)


def _variance_options() -> list[click.Parameter]:
    defaults = Measurement()
    of_train = [_option(field) for field in fields(Config) if field.name not in ("particles", "batch_size")]
    return [
        click.Argument(["run"], required=False, metavar="[RUN]"),
        click.Option(["--fresh"], is_flag=True, help="A model of these train options, at initialisation."),
        click.Option(
            ["--testbed"], type=click.Choice(list(TESTBEDS)), help="A model whose truth is known exactly."
        ),
        click.Option(["--along"], is_flag=True, help="Train the run again, and measure at some epochs of it."),
        click.Option(
            ["--at"],
            type=_Parsed(_counts),
            metavar="N,N,...",
            show_default="0,1,10,100 and the last",
            help="Which epochs.",
        ),
        click.Option(
            ["--estimators"],
            type=_Parsed(_names),
            default=",".join(defaults.estimators),
            metavar="NAME,...|all",
            show_default="the usual ones",
            help="Names of `list`; with :score, :pathwise or :antithetic for what is not their default.",
        ),
        click.Option(
            ["--particles", "-K"],
            type=_Parsed(_counts),
            metavar="K,K,...",
            show_default="1,4,16,64, and 1,2,4 on a test-bed",
            help="Monte Carlo samples per image.",
        ),
        click.Option(
            ["--draws"],
            type=int,
            metavar="N",
            show_default=f"{defaults.draws:,}, and 4,096 on a test-bed",
            help="Gradients drawn of each.",
        ),
        click.Option(
            ["--batch-size", "-b"],
            default=defaults.batch_size,
            show_default=True,
            help="Images in the batch measured on.",
        ),
        click.Option(
            ["--batches"],
            default=defaults.batches,
            show_default=True,
            help="Batches over which means are compared.",
        ),
        click.Option(["--json", "as_json"], is_flag=True, help="Print variance.json instead of a table."),
        click.Option(
            ["--out", "-o"],
            metavar="DIR",
            show_default="RUN/variance or runs/variance-<n>",
            help="A new or empty directory for the results.",
        ),
        click.Option(["--quiet"], is_flag=True, help="Print the directory only."),
        *of_train,
    ]


variance_command = click.Command(
    "variance",
    callback=_variance,
    help=SUMMARIES["variance"] + "\n\nAll numbers are conditional on the parameters and one batch.",
    params=_variance_options(),
)


def _list() -> None:
    registries = {
        "likelihoods": LIKELIHOODS,
        "networks": NETWORKS,
        "guides": GUIDES,
        "estimators": ESTIMATORS,
        "datasets": DATASETS,
    }
    for title, registry in registries.items():
        click.echo(f"{title}:")
        for name, entry in registry.items():
            click.echo(f"  {name:<22}{inspect.getdoc(entry).splitlines()[0]}")


list_command = click.Command("list", callback=_list, help=SUMMARIES["list"])

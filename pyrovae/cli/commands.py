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
import warnings
from collections.abc import Iterator
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from pyrovae.cli.group import SUMMARIES
from pyrovae.data.datasets import DATASETS
from pyrovae.data.folders import DataWarning
from pyrovae.estimators import ESTIMATORS
from pyrovae.evaluation.bounds import bits_per_dim
from pyrovae.figures import figures
from pyrovae.guides.guides import GUIDES
from pyrovae.likelihoods.likelihoods import LIKELIHOODS
from pyrovae.networks.networks import NETWORKS
from pyrovae.programs.graphs import CaptureWarning, start_workers
from pyrovae.report import page as reports
from pyrovae.runs import assessment, pictures, sweeps
from pyrovae.runs import training as runs
from pyrovae.runs.assessment import Examination
from pyrovae.runs.config import Config, flag
from pyrovae.runs.laboratory import TESTBEDS, Measurement, results_directory, table, write
from pyrovae.runtime import distributed
from pyrovae.runtime.locks import LockWarning
from pyrovae.runtime.parts import TrustWarning, is_foreign
from pyrovae.runtime.signals import Interrupted, StoppingSignals
from pyrovae.runtime.texts import printable, to_csv
from pyrovae.runtime.whole_files import save_figure, write_atomically
from pyrovae.training import DivergedError, Fit, describe
from pyrovae.variance.comparison import every_estimator

EXIT_WRONG_CALL, EXIT_FAILED = 2, 1
_NO_MEMORY = "out of memory|allocate memory|calculation overflowed"  # of sizes in bytes
_OURS = CaptureWarning, DataWarning, LockWarning, TrustWarning


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
    flags = [flag(field.name)]
    kind: Any = click.Choice(list(meta["choices"])) if meta["choices"] else meta["parse"]
    if meta["parse"] is bool:
        flags[0] += f"/{flag('no_' + field.name)}"
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
    """A wrong call or file as one line and exit code 2, a failed run as one line and exit code 1.

    Warnings of this package are a line each as well.
    """
    try:
        with _plain_warnings():
            yield
    except ValueError as error:
        _fail(_with_flags(str(error)), EXIT_WRONG_CALL)
    except (DivergedError, OSError) as error:
        _fail(str(error), EXIT_FAILED)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search(_NO_MEMORY, str(error)):
            raise
        _fail(f"out of memory ({error}){_less_memory()}", EXIT_FAILED)


def _less_memory() -> str:
    """Which options of the command at hand ask for less memory."""
    options = [option for param in click.get_current_context().command.params for option in param.opts]
    fewer = [option for option in ("--batch-size", "--images", "-n", "--limit", "--ais") if option in options]
    return f": lower {' or '.join(fewer)}" if fewer else ""


def _with_flags(message: str) -> str:
    """`expected batch_size ...` as `expected --batch-size ...`, where that is an option."""
    names = "|".join(field.name for field in fields(Config)) + "|out|which|estimators|draws|batches|at|along"
    names += "|ais|ais_steps|ais_chains|bidirectional|between|corners|steps|split|dims|tsne|digit|dpi"
    names += "|images(?= from)|image(?= from| without)|data(?= to be)"
    return re.sub(
        rf"^expected ({names})\b(?! most| least)", lambda match: f"expected {flag(match[1])}", message
    )


def _say(text: str | Path, **where: Any) -> None:
    """Prints text as `click.echo` does, without the control characters of a name from outside."""
    click.echo(printable(str(text), keep="\n"), **where)


def _fail(message: str, code: int) -> None:
    if distributed.first_to_say("what failed"):
        _say(f"Error: {' '.join(message.split())}", err=True)
    raise click.exceptions.Exit(code)


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Says in one line, and once, what runs uncompiled or without a lock, and which data were left out."""
    with warnings.catch_warnings():
        for category in _OURS:
            warnings.simplefilter("always", category)
        shown, said = warnings.showwarning, set()

        def show(message, category, *args, **kwargs) -> None:
            if not issubclass(category, _OURS):
                shown(message, category, *args, **kwargs)
            elif str(message) not in said:
                said.add(str(message))
                if distributed.first_to_say(str(message)):
                    _say(f"Warning: {message}", err=True)

        warnings.showwarning = show
        yield


def _train(
    out: str | None,
    resume: str | None,
    recipe: str | None,
    autoencoder: bool,
    quiet: bool,
    trust: bool,
    **settings: Any,
) -> None:
    ctx = click.get_current_context()
    trust = trust or is_foreign(_given(ctx, settings).get("guide", ""))  # who types it consents to it
    start_workers()
    with _one_line_errors(), StoppingSignals(), distributed.joined(), _way_on(ctx, trust):
        given = _with_shorthand(_given(ctx, settings), autoencoder)
        if recipe is not None and resume is not None:
            raise runs.RunError("expected recipe without --resume, which continues with the run's own settings")
        if recipe is not None:
            run, result = runs.train(_of_recipe(recipe, given), out=out, quiet=quiet, trust=trust)
        elif resume is None:
            run, result = runs.train(Config(**settings | given), out=out, quiet=quiet)
        elif out is not None:
            raise runs.RunError("expected out without --resume, which continues in the run's own directory")
        else:
            run, result = runs.resume(resume, changes=given, quiet=quiet, trust=trust)
        stopped = result.stopped_by if not result.progress.finished else None
        if distributed.rank() == 0:
            if stopped is None:
                _say(str(run) if quiet else _summary(run, result))
            else:
                _say(
                    f"Stopped in epoch {result.progress.epoch + 1}; nothing is lost. To go on:\n"
                    f"  {_resuming(ctx, run, trust)}",
                    err=True,
                )
        distributed.wait()  # a launcher ends all when one ends with an exit code
    if stopped is not None:
        raise click.exceptions.Exit(128 + stopped)


@contextlib.contextmanager
def _way_on(ctx: click.Context, trust: bool) -> Iterator[None]:
    """A run that the system has stopped is one line, which ends with the command that goes on."""
    try:
        yield
    except runs.StoppedError as error:
        if not (error.run / "config.json").exists():  # the directory was deleted: there is no way on
            raise
        again = _resuming(ctx, error.run, trust)
        _fail(f"{error}; nothing before is lost. When that is mended, go on: {again}", EXIT_FAILED)


def _resuming(ctx: click.Context, run: Path, trust: bool) -> str:
    """What to type to go on with a run."""
    return f"{_program(ctx)} train --resume {shlex.quote(str(run))}{' --trust' if trust else ''}"


def _with_shorthand(given: dict[str, Any], autoencoder: bool) -> dict[str, Any]:
    """Options with what --autoencoder stands for.

    Raises:
        ValueError: They say something else.
    """
    for name, value in _AUTOENCODER.items() if autoencoder else ():
        if given.get(name, value) != value:
            raise ValueError(f"expected {name} {value} with --autoencoder, got {given[name]}")
    return given | (_AUTOENCODER if autoencoder else {})


def _of_recipe(name: str, given: dict[str, Any]) -> Config:
    """The settings of a recipe's one run, with what was given in their place."""
    recipe = sweeps.read_recipe(name)
    cells = sweeps.without_repeats(recipe.cells, given)
    if len(cells) > 1:
        raise sweeps.SweepError(f"expected recipe of one run, got {len(cells)}: use sweep --recipe {name}")
    return recipe.config(cells[0] | given)


def _program(ctx: click.Context) -> str:
    """What to type for this program: a script by the interpreter that runs it, or by torchrun."""
    launcher = distributed.launcher()
    if not sys.argv[0].endswith("cli.py"):
        name = ctx.find_root().info_name
        return f"{shlex.join(launcher)} --no-python {name}" if launcher else name
    if launcher:
        return shlex.join([*launcher, sys.argv[0]])
    on_path = shutil.which("python") == sys.executable
    return shlex.join(["python" if on_path else os.path.relpath(sys.executable), sys.argv[0]])


def _summary(run: Path, result: Fit) -> str:
    best, last = result.history[result.progress.best_epoch - 1], result.history[-1]
    config, data = runs.read_config(run)
    likelihood, pixels = config.make_likelihood(data["levels"]), math.prod(data["shape"])
    of_bound = config.beta == 1 and config.make_estimator().needs_density
    bound = best["validation_bound" if of_bound else "validation_elbo"]
    bits = None if bound is None else bits_per_dim(likelihood, bound, pixels)
    loss = "SSE/(2c)" if best["elbo"] is None else "SSE/(2c) + KL"
    lines = [
        f"Trained {result.progress.epoch} epochs; validation was best at epoch {best['epoch']}:",
        f"  {describe(best)} nats per image",
    ]
    if best["elbo"] is None:
        lines.append("  an autoencoder: no density q(z|x), so no KL and no ELBO")
    elif not likelihood.normalised:
        lines.append("  under a pseudo-likelihood, which is not normalised: its ELBO bounds nothing")
    if bits is not None:
        lines.append(f"  validation: at most {bits:.4f} bits per dimension")
    if likelihood.log_constant(pixels):
        lines.append(f"  final training loss {loss}: {last['loss_without_constant']:.1f} nats per image")
    return "\n".join([*lines, f"Figures and checkpoints: {run}"])


_TRUST = click.Option(
    ["--trust"],
    is_flag=True,
    help="Import a guide of one's own that only a file names, a run or a recipe. To import code is to run it.",
)
_AUTOENCODER = {"guide": "point", "estimator": "reconstruction"}
_SHORTHAND = click.Option(
    ["--autoencoder"],
    is_flag=True,
    help="The plain autoencoder: --guide point --estimator reconstruction; with -l gaussian its squared error.",
)

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
            help=f"Continue this run; only {', '.join(map(flag, runs.MAY_CHANGE))} may differ.",
        ),
        click.Option(
            ["--recipe"],
            metavar="NAME|FILE",
            help=f"Take settings from a TOML file, or from one of {', '.join(sweeps.recipes())}.",
        ),
        _SHORTHAND,
        _TRUST,
        click.Option(["--quiet"], is_flag=True, help="Print the run directory only."),
    ],
)


# Options of a measurement, not of the model.
_MEASURED = "batch_size", "seed", "cuda", "alpha", "data_dir", "compile"


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
    with _one_line_errors(), StoppingSignals():
        given = _with_shorthand(_given(ctx, settings), autoencoder)
        plan = _planned(over, recipe, given)
        typed = "guide" in given or any(text.partition("=")[0].strip() == "guide" for text in over)
        trust = plan.admit(trust=trust or typed)
        for name in _AUTOENCODER if autoencoder else ():
            if {cell.get(name, _AUTOENCODER[name]) for cell in plan.cells} != {_AUTOENCODER[name]}:
                raise sweeps.SweepError(f"expected {name} {_AUTOENCODER[name]} with --autoencoder, got others")
        directory = Path(out) if out else runs.new_directory(Path("runs") / "sweep", None)
        sweep = sweeps.Sweep(directory, plan, trust)
        bar = tqdm(total=len(plan.cells), unit="run", disable=quiet, dynamic_ncols=True)

        def report(cell: str, outcome: str) -> None:
            bar.update()
            if not quiet or outcome not in ("finished", "skipped"):
                bar.write(printable(f"{cell or 'the run'}: {outcome}"), file=sys.stderr)

        with _same_again(ctx, directory, out):
            with bar:
                failed = sweep.run(jobs, report)
            rows = sweep.table()
            if rows:
                write_atomically(directory / "results.csv", to_csv(rows))
                write_atomically(directory / "results.md", sweeps.to_markdown(rows))
                save_figure(figures.overlaid_curves(sweep.histories()), directory / "curves.png")
        if rows:
            _say(sweeps.to_markdown(rows), nl=False)
        left = "results.csv, results.md and curves.png" if rows else "No run has finished"
        _say(f"{left}: {directory}")
        if failed:
            _fail(f"{len(failed)} of {len(plan.cells)} runs failed; see {directory / 'cells'}", EXIT_FAILED)


@contextlib.contextmanager
def _same_again(ctx: click.Context, directory: Path, out: str | None) -> Iterator[None]:
    """A sweep that a signal or the system has stopped says how it goes on: by the same command."""
    try:
        yield
    except (Interrupted, OSError) as error:
        same = ["--out", str(directory)] if out is None else []
        words = shlex.join([*ctx.find_root().meta.get("arguments", sys.argv[1:]), *same])
        again = f"{_program(ctx)} {words}"
        if isinstance(error, OSError):
            _fail(f"{error}; nothing before is lost. When that is mended, go on: {again}", EXIT_FAILED)
        _say(f"Stopped; nothing is lost. To go on:\n  {again}", err=True)
        raise click.exceptions.Exit(128 + error.number) from None


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
        option = _option(field)
        parts = listed.split(";" if ";" in listed else ",")
        try:
            values[field.name] = [option.type.convert(part.strip(), option, None) for part in parts]
        except click.BadParameter as error:
            raise sweeps.SweepError(f"expected over {field.name} with its values: {error.message}") from None
    given = {name: value for name, value in given.items() if name not in values}
    cells = sweeps.without_repeats(base.cells, given | values)
    return sweeps.Recipe(sweeps.grid(values, cells), base.shared | given, base.description)


def _sweep_options() -> list[click.Parameter]:
    return [
        *(_option(field) for field in fields(Config)),
        click.Option(
            ["--over"],
            multiple=True,
            metavar="NAME=V,V,...",
            help="Go over these values of a train option; several times for a grid. Values with commas: V;V.",
        ),
        click.Option(
            ["--recipe"], metavar="NAME|FILE", help=f"A TOML file, or one of {', '.join(sweeps.recipes())}."
        ),
        _SHORTHAND,
        _TRUST,
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


sweep_command = click.Command("sweep", callback=_sweep, help=SUMMARIES["sweep"], params=_sweep_options())


def _names(text: str) -> tuple[str, ...]:
    return tuple(every_estimator() if text == "all" else text.split(","))


def _counts(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _variance(run: str | None, fresh: bool, testbed: str | None, along: bool, at: Any, **settings: Any) -> None:
    ctx = click.get_current_context()
    own = {name: settings.pop(name) for name in ("estimators", "particles", "draws", "batches")}
    trust = settings.pop("trust")
    out, quiet, as_json = settings.pop("out"), settings.pop("quiet"), settings.pop("as_json")
    with _one_line_errors():
        if (run is not None) + fresh + (testbed is not None) != 1:
            raise ValueError("expected one of RUN, --fresh and --testbed: see --help")
        of_model = _given(ctx, {name: value for name, value in settings.items() if name not in _MEASURED})
        if of_model and not fresh:
            raise ValueError(f"expected {next(iter(of_model))} with --fresh only")
        if (along or at) and testbed:
            raise ValueError("expected along with RUN or --fresh, got --testbed, which is not trained")
        about_images = _given(
            ctx, {n: settings[n] for n in ("batch_size", "cuda", "data_dir")} | {"batches": own["batches"]}
        )
        if testbed and about_images:
            raise ValueError(f"expected {next(iter(about_images))} with RUN or --fresh, got it with --testbed")
        if at and not along:
            raise ValueError("expected at with --along only")
        own = {name: value for name, value in own.items() if value is not None}
        if testbed:
            own = {"particles": (1, 2, 4), "draws": 4096} | own
        of_batch = {name: settings.pop(name) for name in ("batch_size", "alpha", "compile")}
        measurement = Measurement(**own, **of_batch, seed=settings["seed"], quiet=quiet or as_json)
        with results_directory(run, out) as directory:
            if testbed:
                found = measurement.of_testbed(TESTBEDS[testbed]())
            elif along:
                config = Config(**settings) if fresh else _of_run(run, settings)
                if run is not None:
                    runs.admit(Path(run), config, trust=trust)
                epochs = at or (*(e for e in (0, 1, 10, 100) if e < config.epochs), config.epochs)
                found = measurement.along(config, epochs)
            elif fresh:
                found = measurement.of_config(Config(**settings))
            else:
                found = measurement.of_run(run, _of_run(run, settings), trust=trust)
            write(directory, found)
        by_epoch = found if along else {None: found}
        if as_json:
            _say((directory / "variance.json").read_text(), nl=False)
        elif quiet:
            _say(directory)
        else:
            _say("\n\n".join(table(comparison) for comparison in by_epoch.values()))
            _say(f"variance.json, variance.csv and figures: {directory}")


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
            show_default="RUN/variance-<n> or runs/variance-<n>",
            help="A new or empty directory for the results.",
        ),
        click.Option(["--quiet"], is_flag=True, help="Print the directory only."),
        _TRUST,
        *of_train,
    ]


variance_command = click.Command(
    "variance",
    callback=_variance,
    help=SUMMARIES["variance"] + "\n\nAll numbers are conditional on the parameters and one batch.",
    params=_variance_options(),
)


def _evaluate(
    run: str, which: str, cuda: bool, data_dir: str | None, as_json: bool, quiet: bool, trust: bool, **own: Any
) -> None:
    with _one_line_errors():
        device = Config(cuda=cuda).device()
        examination = Examination(**own, quiet=quiet or as_json)
        found = examination.of_run(run, which=which, device=device, data_dir=data_dir, trust=trust)
        path = assessment.write(Path(run), found)
        if as_json:
            _say(path.read_text(), nl=False)
        elif quiet:
            _say(path)
        else:
            _say(f"{assessment.table(found)}\n{path}")


def _evaluate_options() -> list[click.Parameter]:
    defaults = Examination()
    return [
        click.Argument(["run"], metavar="RUN"),
        click.Option(
            ["--which"],
            type=click.Choice(["best", "last"]),
            default="best",
            show_default=True,
            help="The parameters with the best validation objective, or the last.",
        ),
        click.Option(
            ["--particles", "-K"],
            default=defaults.particles,
            metavar="K",
            show_default=f"{defaults.particles:,}",
            help="Samples per image for log p(x), from q(z|x) and from the prior.",
        ),
        click.Option(
            ["--ais"],
            default=defaults.ais,
            metavar="N",
            show_default="none",
            help="Annealed importance sampling, slow and tight, of the first N images.",
        ),
        click.Option(
            ["--ais-steps"],
            default=defaults.ais_steps,
            metavar="N",
            show_default=True,
            help="Steps from the prior to the posterior.",
        ),
        click.Option(
            ["--ais-chains"],
            default=defaults.ais_chains,
            metavar="N",
            show_default=True,
            help="Chains per image.",
        ),
        click.Option(
            ["--bidirectional"],
            default=defaults.bidirectional,
            metavar="N",
            show_default="none",
            help="Bounds of log p(x) from both sides, for N images that the model makes: by the chains of "
            "--ais, and by such chains in reverse. The gap limits the error of annealing on these images.",
        ),
        click.Option(
            ["--limit"], type=int, metavar="N", show_default="all", help="The first N test images only."
        ),
        click.Option(
            ["--batch-size", "-b"],
            type=int,
            metavar="N",
            show_default="what keeps memory small",
            help="Images decoded at a time.",
        ),
        click.Option(["--seed", "-s"], default=defaults.seed, show_default=True, help="Of all noise."),
        *(_option(field) for field in fields(Config) if field.name in ("data_dir", "cuda")),
        click.Option(["--json", "as_json"], is_flag=True, help="Print evaluation.json instead of a table."),
        click.Option(["--quiet"], is_flag=True, help="Print the path of evaluation.json only."),
        _TRUST,
    ]


evaluate_command = click.Command(
    "evaluate", callback=_evaluate, help=SUMMARIES["evaluate"], params=_evaluate_options()
)


def _picture(run: str, out: str | None, dpi: int, cuda: bool, **settings: Any) -> None:
    name = click.get_current_context().command.name
    with _one_line_errors():
        path = pictures.path_for(run, name, out)
        pictures.save(getattr(pictures, name)(run, device=_device(cuda), **settings), path, dpi)
        _say(path)


def _curves(run: tuple[str, ...], out: str | None, dpi: int) -> None:
    with _one_line_errors():
        path = pictures.path_for(run[0], "curves" if len(run) == 1 else "curves-overlaid", out)
        pictures.save(pictures.curves(*run), path, dpi)
        _say(path)


def _side_by_side(run: tuple[str, ...], out: str | None, dpi: int, cuda: bool, **settings: Any) -> None:
    with _one_line_errors():
        path = pictures.path_for(run[0], "side-by-side", out)
        settings["device"] = _device(cuda)
        figure = pictures.side_by_side(*run, **settings)
        for name, error in pictures.reconstruction_errors(*run, **settings).items():
            _say(f"{error:8.2f}  {name}")
        _say("squared error of reconstruction per image")
        pictures.save(figure, path, dpi)
        _say(path)


def _encode(run: str, out: str | None, force: bool, cuda: bool, **settings: Any) -> None:
    with _one_line_errors():
        path = Path(run) / "latents.npz" if out is None else Path(out)
        if path.suffix.lower() != ".npz":
            raise ValueError(f"expected out with the suffix .npz, got {path}")
        if out is not None and path.exists() and not force:
            raise ValueError(f"expected out that is not there yet, or --force to replace it, got {path}")
        pictures.encode(run, device=_device(cuda), **settings).save(path)
        _say(path)


def _device(cuda: bool) -> str:
    return str(Config(cuda=cuda).device())


def _of_picture(name: str) -> list[click.Option]:
    """Where a picture goes, and how fine it is."""
    kinds = ", ".join(suffix.removeprefix(".") for suffix in pictures.SUFFIXES)
    return [
        click.Option(
            ["--out", "-o"],
            metavar="FILE",
            show_default=f"RUN/figures/{name}.png",
            help=f"The picture, in place of any that is there: {kinds}.",
        ),
        click.Option(
            ["--dpi"], type=click.IntRange(1, 1000), default=100, show_default=True, help="Dots per inch."
        ),
    ]


def _of_load() -> list[click.Option]:
    """Which parameters of a run, where they work, and whether its own code is trusted."""
    return [
        click.Option(
            ["--which"],
            type=click.Choice(["best", "last"]),
            default="best",
            show_default=True,
            help="The parameters of the best epoch, or of the last.",
        ),
        *(_option(field) for field in fields(Config) if field.name == "cuda"),
        _TRUST,
    ]


_RUN = click.Argument(["run"], metavar="RUN")
_DATA_DIR = _option(next(field for field in fields(Config) if field.name == "data_dir"))
_IMAGES = [
    click.Option(
        ["--split"],
        type=click.Choice(pictures.SPLITS),
        show_default="validation, or all with --data",
        help="Which images.",
    ),
    click.Option(
        ["--data"],
        metavar="SOURCE",
        show_default="the run's",
        help="Other images: what `train --dataset` reads.",
    ),
    _DATA_DIR,
]


_DIGIT = click.Option(
    ["--digit", "--class", "digit"], type=int, metavar="Y", help="Of a conditional VAE, this class."
)


def _picture_command(name: str, *own: click.Option) -> click.Command:
    """A command that calls the function of this name in `pictures`."""
    params = [_RUN, *own, *_of_load(), *_of_picture(name)]
    return click.Command(name, callback=_picture, help=SUMMARIES[name], params=params)


reconstruct_command = _picture_command(
    "reconstruct",
    click.Option(["--images"], default=runs.PICTURED, metavar="N", show_default=True, help="At most how many."),
    *_IMAGES,
)
sample_command = _picture_command(
    "sample",
    click.Option(["-n"], default=100, metavar="N", show_default=True, help="How many."),
    _DIGIT,
    click.Option(
        ["--seed", "-s"], type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Of the draws."
    ),
)
interpolate_command = _picture_command(
    "interpolate",
    click.Option(
        ["--between"],
        type=_Parsed(_counts),
        metavar="I,J",
        show_default="0,1",
        help="Indices of two validation images, the ends of a row.",
    ),
    click.Option(
        ["--corners"],
        type=_Parsed(_counts),
        metavar="I,J,K,L",
        help="Of four, the corners of a grid: top left, top right, bottom left, bottom right.",
    ),
    click.Option(["--steps"], default=10, show_default=True, help="Decoded points from end to end."),
    _DATA_DIR,
)
manifold_command = _picture_command(
    "manifold",
    click.Option(
        ["--steps"], type=int, show_default="20 in a grid, 11 in a traversal", help="Points along a dimension."
    ),
    click.Option(
        ["--dims"],
        type=int,
        metavar="N",
        show_default="all, at most 20",
        help="Of more than 2 dimensions, traverse the N that vary most with the image.",
    ),
    click.Option(
        ["--image"],
        type=int,
        metavar="I",
        show_default="zero",
        help="The validation image at whose code the other dimensions stay.",
    ),
    _DIGIT,
    _DATA_DIR,
)
latent_command = _picture_command(
    "latent",
    click.Option(
        ["--tsne"], is_flag=True, help="More than 2 dimensions by t-SNE, not by principal components."
    ),
    click.Option(["--limit"], type=int, metavar="N", show_default="all", help="At most this many images."),
    *_IMAGES,
)
curves_command = click.Command(
    "curves",
    callback=_curves,
    help=SUMMARIES["curves"],
    params=[click.Argument(["run"], nargs=-1, required=True, metavar="RUN..."), *_of_picture("curves")],
)
side_by_side_command = click.Command(
    "side-by-side",
    callback=_side_by_side,
    help=SUMMARIES["side-by-side"],
    params=[
        click.Argument(["run"], nargs=-1, required=True, metavar="RUN RUN..."),
        click.Option(
            ["--split"],
            type=click.Choice([split for split in pictures.SPLITS if split != "all"]),
            show_default="validation",
            help="Which images.",
        ),
        _DATA_DIR,
        *_of_load(),
        *_of_picture("side-by-side"),
    ],
)
encode_command = click.Command(
    "encode",
    callback=_encode,
    help=SUMMARIES["encode"],
    params=[
        _RUN,
        *_IMAGES,
        *_of_load(),
        click.Option(
            ["--out", "-o"],
            metavar="FILE",
            show_default="RUN/latents.npz",
            help="A new .npz, with q(z|x)'s mean and, where there are any, scale and labels.",
        ),
        click.Option(["--force"], is_flag=True, help="Replace the file if it is there."),
    ],
)


def _report(run: str, out: str | None, cuda: bool, data_dir: str | None, trust: bool) -> None:
    with _one_line_errors():
        path = reports.path_for(run, out)
        reports.save(reports.report(run, data_dir=data_dir, device=_device(cuda), trust=trust), path)
        _say(path)


report_command = click.Command(
    "report",
    callback=_report,
    help=SUMMARIES["report"],
    params=[
        _RUN,
        _DATA_DIR,
        *(_option(field) for field in fields(Config) if field.name == "cuda"),
        click.Option(
            ["--out", "-o"],
            metavar="FILE",
            show_default="RUN/report.html",
            help="The page, in place of any that is there.",
        ),
        _TRUST,
    ],
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
        _say(f"{title}:")
        for name, entry in registry.items():
            _say(f"  {name:<22}{inspect.getdoc(entry).splitlines()[0]}")


list_command = click.Command("list", callback=_list, help=SUMMARIES["list"])

"""`pyrovae train`: trains a run, or continues one."""

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from pyrovae import runs
from pyrovae.cli.going_on import resuming, way_on
from pyrovae.cli.group import SUMMARIES
from pyrovae.cli.messages import one_line_errors, say
from pyrovae.cli.options import SHORTHAND, TRUST, given_in, option_of, with_shorthand
from pyrovae.evaluation.bounds import bits_per_dim
from pyrovae.programs.graphs import start_workers
from pyrovae.runs import sweeps
from pyrovae.runs.config import Config, flag
from pyrovae.runtime import distributed
from pyrovae.runtime.parts import is_foreign
from pyrovae.runtime.signals import StoppingSignals
from pyrovae.training.progress import Fit, describe


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
    trust = trust or is_foreign(given_in(ctx, settings).get("guide", ""))  # who types it consents to it
    start_workers()
    with one_line_errors(), StoppingSignals(), distributed.joined(), way_on(ctx, trust):
        given = with_shorthand(given_in(ctx, settings), autoencoder)
        if recipe is not None and resume is not None:
            raise runs.RunError("expected recipe without --resume, which continues with the run's own settings")
        if recipe is not None:
            run, result = runs.train(_of_recipe(recipe, given), out=out, quiet=quiet, trust=trust)
        elif resume is None:
            run, result = runs.train(Config(**settings | given), out=out, quiet=quiet)
        elif out is not None:
            raise runs.RunError(
                "expected out without --resume, which continues in the run's own directory", field="out"
            )
        else:
            run, result = runs.resume(resume, changes=given, quiet=quiet, trust=trust)
        stopped = result.stopped_by if not result.progress.finished else None
        if distributed.rank() == 0:
            if stopped is None:
                say(str(run) if quiet else _summary(run, result))
            else:
                say(
                    f"Stopped in epoch {result.progress.epoch + 1}; nothing is lost. To go on:\n"
                    f"  {resuming(ctx, run, trust)}",
                    err=True,
                )
        distributed.wait()  # a launcher ends all when one ends with an exit code
    if stopped is not None:
        raise click.exceptions.Exit(128 + stopped)


def _of_recipe(name: str, given: dict[str, Any]) -> Config:
    """The settings of a recipe's only run; the given options replace those of the same name."""
    recipe = sweeps.read_recipe(name)
    cells = sweeps.without_repeats(recipe.cells, given)
    if len(cells) > 1:
        raise sweeps.SweepError(f"expected recipe of one run, got {len(cells)}: use sweep --recipe {name}")
    return recipe.config(cells[0] | given)


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


train_command = click.Command(
    "train",
    callback=_train,
    help=SUMMARIES["train"],
    params=[
        *(option_of(field) for field in fields(Config)),
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
        SHORTHAND,
        TRUST,
        click.Option(["--quiet"], is_flag=True, help="Print the run directory only."),
    ],
)

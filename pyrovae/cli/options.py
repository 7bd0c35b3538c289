"""Options that several commands have, and the types of their values."""

from dataclasses import Field, fields
from typing import Any

import click

from pyrovae.runs import pictures
from pyrovae.runs.config import Config, flag
from pyrovae.runtime.errors import FieldError


class Parsed(click.ParamType):
    """A click type from a parser that raises ValueError."""

    name = "value"

    def __init__(self, parse):
        self.parse = parse

    def convert(self, value, param, ctx):
        try:
            return self.parse(value) if isinstance(value, str) else value
        except ValueError:
            self.fail(f"{value!r} is not {param.metavar or param.type.name}", param, ctx)


def option_of(field: Field) -> click.Option:
    """The option of a Config field: its flags, type, default and help."""
    meta = field.metadata
    flags = [flag(field.name)]
    kind: Any = click.Choice(list(meta["choices"])) if meta["choices"] else meta["parse"]
    if meta["parse"] is bool:
        flags[0] += f"/{flag('no_' + field.name)}"
    elif kind not in (int, float, str) and not meta["choices"]:
        kind = Parsed(meta["parse"])
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


def given_in(ctx: click.Context, values: dict[str, Any]) -> dict[str, Any]:
    """The options that the user typed on the command line."""
    return {
        name: value
        for name, value in values.items()
        if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    }


def with_shorthand(given: dict[str, Any], autoencoder: bool) -> dict[str, Any]:
    """Adds the options that --autoencoder stands for.

    Raises:
        ValueError: The given options contradict them.
    """
    for name, value in AUTOENCODER.items() if autoencoder else ():
        if given.get(name, value) != value:
            raise FieldError(f"expected {name} {value} with --autoencoder, got {given[name]}", field=name)
    return given | (AUTOENCODER if autoencoder else {})


TRUST = click.Option(
    ["--trust"],
    is_flag=True,
    help="Import a guide of one's own that only a file names, a run or a recipe. To import code is to run it.",
)
AUTOENCODER = {"guide": "point", "estimator": "reconstruction"}
SHORTHAND = click.Option(
    ["--autoencoder"],
    is_flag=True,
    help="The plain autoencoder: --guide point --estimator reconstruction; with -l gaussian its squared error.",
)


def counts(text: str) -> tuple[int, ...]:
    """Reads whole numbers with commas between them."""
    return tuple(int(part) for part in text.split(","))


def device(cuda: bool) -> str:
    """The device that --cuda or --no-cuda asks for."""
    return str(Config(cuda=cuda).device())


def loading() -> list[click.Option]:
    """The options of a command that loads a run: its parameters, the device, and trust in its code."""
    return [
        click.Option(
            ["--which"],
            type=click.Choice(["best", "last"]),
            default="best",
            show_default=True,
            help="The parameters of the best epoch, or of the last.",
        ),
        CUDA,
        TRUST,
    ]


RUN = click.Argument(["run"], metavar="RUN")
DATA_DIR, CUDA = (option_of(field) for field in fields(Config) if field.name in ("data_dir", "cuda"))
IMAGES = [
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
    DATA_DIR,
]

"""The commands that go on with what has stopped, as the user would type them."""

import contextlib
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from pyrovae import runs
from pyrovae.cli.messages import EXIT_FAILED, fail, say
from pyrovae.runtime import distributed
from pyrovae.runtime.signals import Interrupted


@contextlib.contextmanager
def way_on(ctx: click.Context, trust: bool) -> Iterator[None]:
    """Ends the error of a run that the system has stopped with the command that continues it."""
    try:
        yield
    except runs.StoppedError as error:
        if not (error.run / "config.json").exists():  # the directory was deleted: there is no way on
            raise
        again = resuming(ctx, error.run, trust)
        fail(f"{error}; nothing before is lost. When that is mended, go on: {again}", EXIT_FAILED)


def resuming(ctx: click.Context, run: Path, trust: bool) -> str:
    """The command that continues a run."""
    return f"{program(ctx)} train --resume {shlex.quote(str(run))}{' --trust' if trust else ''}"


def program(ctx: click.Context) -> str:
    """How the user starts this program: by its name, or as a script of an interpreter or of torchrun."""
    launcher = distributed.launcher()
    if not sys.argv[0].endswith("cli.py"):
        name = ctx.find_root().info_name
        return f"{shlex.join(launcher)} --no-python {name}" if launcher else name
    if launcher:
        return shlex.join([*launcher, sys.argv[0]])
    on_path = shutil.which("python") == sys.executable
    return shlex.join(["python" if on_path else os.path.relpath(sys.executable), sys.argv[0]])


@contextlib.contextmanager
def same_again(ctx: click.Context, directory: Path, out: str | None) -> Iterator[None]:
    """Ends the message of a sweep that has been stopped with the command that continues it."""
    try:
        yield
    except (Interrupted, OSError) as error:
        same = ["--out", str(directory)] if out is None else []
        words = shlex.join([*ctx.find_root().meta.get("arguments", sys.argv[1:]), *same])
        again = f"{program(ctx)} {words}"
        if isinstance(error, OSError):
            fail(f"{error}; nothing before is lost. When that is mended, go on: {again}", EXIT_FAILED)
        say(f"Stopped; nothing is lost. To go on:\n  {again}", err=True)
        raise click.exceptions.Exit(128 + error.number) from None

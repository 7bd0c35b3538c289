"""The results, warnings and errors that commands print; each warning and each error takes one line."""

import contextlib
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from pyrovae.data.folders import DataWarning
from pyrovae.programs.graphs import CaptureWarning
from pyrovae.runtime import distributed
from pyrovae.runtime.locks import LockWarning
from pyrovae.runtime.parts import TrustWarning
from pyrovae.runtime.texts import printable
from pyrovae.training.progress import DivergedError

EXIT_WRONG_CALL, EXIT_FAILED = 2, 1
_NO_MEMORY = "out of memory|allocate memory|calculation overflowed"  # the last is of sizes in bytes
_OURS = CaptureWarning, DataWarning, LockWarning, TrustWarning


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Reports a wrong call or file in one line with exit code 2, and a failed run in one line with exit code 1.

    Each warning of this package takes one line as well.
    """
    try:
        with _plain_warnings():
            yield
    except ValueError as error:
        fail(_with_option(error), EXIT_WRONG_CALL)
    except (DivergedError, OSError) as error:
        fail(str(error), EXIT_FAILED)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search(_NO_MEMORY, str(error)):
            raise
        fail(f"out of memory ({error}){less_memory()}", EXIT_FAILED)


def less_memory() -> str:
    """Names the options of the current command by which it would need less memory."""
    options = [option for param in click.get_current_context().command.params for option in param.opts]
    fewer = [option for option in ("--batch-size", "--images", "-n", "--limit", "--ais") if option in options]
    return f": lower {' or '.join(fewer)}" if fewer else ""


def _with_option(error: ValueError) -> str:
    """What an error says, with the option of the current command in place of the field that it is about."""
    field = getattr(error, "field", None)
    for param in click.get_current_context().command.params:
        if param.name == field:
            return error.about(param.opts[0])
    return str(error)


def say(text: str | Path, **where: Any) -> None:
    """Prints text as `click.echo` does, without the control characters of a name from outside."""
    click.echo(printable(str(text), keep="\n"), **where)


def fail(message: str, code: int) -> None:
    """Prints an error in one line, and ends the command with this exit code."""
    if distributed.first_to_say("what failed"):
        say(f"Error: {' '.join(message.split())}", err=True)
    raise click.exceptions.Exit(code)


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Prints each of this package's warnings once and in one line."""
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
                    say(f"Warning: {message}", err=True)

        warnings.showwarning = show
        yield

"""The results, warnings and errors that commands print; each warning and each error takes one line."""

import contextlib
import re
import warnings
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from pyrovae.data.folders import DataWarning
from pyrovae.programs.graphs import CaptureWarning
from pyrovae.runs.config import Config, flag
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
        fail(with_flags(str(error)), EXIT_WRONG_CALL)
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


def with_flags(message: str) -> str:
    """Turns `expected batch_size ...` into `expected --batch-size ...`, where that is an option."""
    names = "|".join(field.name for field in fields(Config)) + "|out|which|estimators|draws|batches|at|along"
    names += "|ais|ais_steps|ais_chains|bidirectional|between|corners|steps|split|dims|tsne|digit|dpi"
    names += "|images(?= from)|image(?= from| without)|data(?= to be)"
    return re.sub(
        rf"^expected ({names})\b(?! most| least)", lambda match: f"expected {flag(match[1])}", message
    )


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

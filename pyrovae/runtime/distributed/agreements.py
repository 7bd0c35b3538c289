"""What all processes of a run know, and do together."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pyrovae.runtime import locks
from pyrovae.runtime.distributed.groups import LostProcess, rank, world
from pyrovae.runtime.texts import first_line
from pyrovae.runtime.whole_files import write_errors

T = TypeVar("T")


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """What PyTorch raises in here because another process is gone becomes one line.

    Raises:
        LostProcess: It does.
    """
    try:
        yield
    except RuntimeError as error:
        if world() == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        reason = first_line(error).split(". ")[0]
        raise LostProcess(
            f"lost another process of the run, so that this one cannot go on ({reason}): "
            "resume the run, whose last checkpoint is whole"
        ) from None


def gathered(value: T) -> list[T]:
    """The value of every process, by rank."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    with watched():
        dist.all_gather_object(values, value)
    return values


def broadcast(value: T) -> T:
    """The first process's value, on all."""
    if world() == 1:
        return value
    box = [value]
    with watched():
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def wait() -> None:
    """Until all processes are here."""
    gathered(None)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """An error that one process meets in here is raised on all; there is no communication in here."""
    if world() == 1:
        yield
        return
    met = None
    try:
        yield
    except (ValueError, ArithmeticError, OSError) as error:
        met = error
    errors = [error for error in gathered(met) if error is not None]
    if errors:
        raise met or errors[0]


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Holds the lock on a directory (see `locks`), by the first process for all.

    Raises:
        LockedError: Another run holds it.
        WriteError: The directory is not there, or cannot be written to.
    """
    with contextlib.ExitStack() as stack:
        with together():
            if rank() == 0:
                with write_errors(directory):
                    stack.enter_context(locks.held(directory))
        yield


def from_first(work: Callable[[], T]) -> T:
    """What the first process makes, or the error that it meets, on all."""
    made: Any = None
    with together():
        if rank() == 0:
            made = work()
    return broadcast(made)


def in_turn(work: Callable[[], T]) -> T:
    """What each process makes: the first, then one on each node, then the others.

    What one puts into a cache, a download say, those after it find there.
    """
    mine = 0 if rank() == 0 else 1 if os.environ.get("LOCAL_RANK") == "0" else 2
    made: Any = None
    for turn in range(3 if world() > 1 else 1):
        with together():
            if turn == mine:
                made = work()
    return made


class Agreement:
    """The largest number that any process brings, on all of them alike.

    Example:
        >>> Agreement().now(3)
        3
    """

    def __init__(self):
        self.pending: tuple[dist.Work, Tensor] | None = None

    def soon(self, number: int) -> int:
        """That of the last call, 0 at first; this call's travels meanwhile. With one process, this call's."""
        if world() == 1:
            return number
        with watched():
            last = self._arrived()
            box = torch.tensor([number])
            self.pending = dist.all_reduce(box, dist.ReduceOp.MAX, async_op=True), box
        return last

    def now(self, number: int) -> int:
        """That of this call."""
        self.soon(number)
        if world() == 1:
            return number
        with watched():
            return self._arrived()

    def _arrived(self) -> int:
        if self.pending is None:
            return 0
        work, box = self.pending
        work.wait()
        self.pending = None
        return int(box)

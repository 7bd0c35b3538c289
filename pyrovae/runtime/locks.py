"""One writer at a time: a lock on a directory, which a process loses when it ends, however it ends.

The lock is `flock` on the file `.lock` in the directory. The kernel frees it when the process that holds it
ends, by SIGKILL too, so that nobody has to clean up. The file itself stays, because a lock file that is
deleted could be locked twice. Its text says who holds the lock, for the message to whoever comes next.
Readers take no lock.

What is known over NFS: since version 2.6.12 Linux turns `flock` into a lock on the server. Processes on several
machines then exclude each other, if the server runs its lock service (NFS 3) or speaks NFS 4. With the
mount options `nolock` and `local_lock=flock`, locks hold on one machine only, and nothing says so. A machine
that loses its server for longer than the server's lease, often 90 s, may lose its locks. A file system
that knows no locks at all, such as Lustre without `-o flock`, is written to with a `LockWarning`.
"""

import contextlib
import errno
import functools
import json
import os
import socket
import threading
import warnings
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

try:
    import fcntl
except ImportError:  # on Windows, which is treated as a file system without locks
    fcntl = None

NAME = ".lock"
_UNKNOWN = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}  # of a file system without locks
_held: dict[tuple[int, str], int] = {}  # open lock files, by the thread that holds them and the directory


class LockedError(ValueError):
    """Another process is writing to a directory."""

    @classmethod
    def of(cls, directory: Path, holder: str) -> "LockedError":
        """One line that names the one that holds the lock."""
        return cls(
            f"expected no other process to write to {directory}, got {holder}: wait until it ends, or stop it"
        )


class LockWarning(UserWarning):
    """The file system knows no locks."""


@contextlib.contextmanager
def held(directory: Path) -> Iterator[None]:
    """Holds the lock on a directory; within itself, in the same thread, it does nothing.

    Raises:
        LockedError: Another process, or another thread of this one, holds it.
        OSError: The directory is not there, or cannot be written to.

    Warns:
        LockWarning: The file system knows no locks, and there is none.
    """
    _closed_in_children()
    key = threading.get_ident(), os.path.realpath(directory)
    if key in _held:
        yield
        return
    descriptor = os.open(directory / NAME, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if not _claimed(descriptor, directory):
            raise LockedError.of(directory, _owner(descriptor))
        _held[key] = descriptor
        try:
            yield
        finally:
            del _held[key]
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def claim(descriptor: int) -> bool:
    """Locks an open file, which must be open for writing; whether that was possible.

    Raises:
        OSError: The file system knows no locks.
    """
    if fcntl is None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def check(directory: Path) -> None:
    """Checks, before something is written, that the directory is still the one that this thread has locked.

    It is another one where it was deleted or moved meanwhile, and perhaps made anew and locked by others.

    Raises:
        FileNotFoundError: It is another one, or none.
    """
    descriptor = _held.get((threading.get_ident(), os.path.realpath(directory)))
    try:
        same = descriptor is not None and os.path.samestat(os.fstat(descriptor), os.stat(directory / NAME))
    except FileNotFoundError:
        same = False
    if not same:
        raise FileNotFoundError(errno.ENOENT, "the directory was deleted or moved")


def holder(directory: Path) -> str:
    """Who holds the lock on a directory, in words; "" if nobody does, or if there are no locks."""
    try:
        descriptor = os.open(directory / NAME, os.O_RDWR)
    except OSError:
        return ""
    try:
        return "" if claim(descriptor) else _owner(descriptor)
    except OSError:
        return ""
    finally:
        os.close(descriptor)


def _claimed(descriptor: int, directory: Path) -> bool:
    """Locks the file and signs it, where there are locks."""
    try:
        if not claim(descriptor):
            return False
    except OSError as error:
        if error.errno not in _UNKNOWN:
            raise
        message = f"{directory} is on a file system without locks: start no second process that writes to it"
        warnings.warn(message, LockWarning, stacklevel=4)
    since = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %z")
    text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}) + "\n"
    with contextlib.suppress(OSError):  # on a full disk the lock is held without a name
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, text.encode())
    return True


def _owner(descriptor: int) -> str:
    """Who holds the lock, as far as the file says."""
    try:
        os.lseek(descriptor, 0, os.SEEK_SET)
        owner = json.loads(os.read(descriptor, 1000))
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (ValueError, LookupError, TypeError, RecursionError):  # the owner is about to write it, or could not
        return "another process"


@functools.cache
def _closed_in_children() -> None:
    """A forked child must not keep a lock that its parent loses by ending."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_forget)


def _forget() -> None:
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()

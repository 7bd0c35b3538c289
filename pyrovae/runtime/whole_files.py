"""Files that are whole or not there, however the process that writes them ends.

A file is written under a temporary name of its own beside its place, brought to the disk, and then renamed. A
process that is killed leaves the old file or the new one, and perhaps a temporary file, which is locked
while it is written (see `locks`), so that the next process can tell it from one that is in use.
"""

import contextlib
import errno
import glob
import io
import os
import re
import secrets
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from pyrovae.runtime import locks

_OF_STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
# The second form is that of earlier versions.
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.part|(checkpoint|best|config|metrics|sweep)\.(pt|jsonl?)\.part")


class WriteError(OSError):
    """A file could not be written; what was in its place before is untouched.

    Attributes:
        reason: Why, in the system's words: "no space left on device", say.
    """

    reason: str

    @classmethod
    def of(cls, error: OSError, path: Path) -> "WriteError":
        """The same error in one line, with the file's name."""
        reason = error.strerror or str(error)
        reason = reason[:1].lower() + reason[1:]
        made = cls(f"expected to write {path}, got: {reason}")
        made.errno, made.reason = error.errno, reason
        return made

    @property
    def of_place(self) -> bool:
        """Whether another place would do: this one does not exist or is not to be written to."""
        return self.errno not in _OF_STORAGE


@contextlib.contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turns whatever the system refuses into one line about this path.

    Raises:
        WriteError: It refuses something.
    """
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise WriteError.of(error, path) from None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Opens a file for writing, which takes its place as a whole on leaving, or not at all.

    Temporary files that ended processes have left of the same file are deleted.

    Raises:
        WriteError: It cannot be written: no space, no permission, no directory.

    Example:
        >>> with replacing(Path("greeting.txt")) as file:
        ...     _ = file.write(b"hello")
        >>> Path("greeting.txt").read_text()
        'hello'
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    with write_errors(path):
        try:
            with _Output(io.FileIO(temporary, "x")) as file:
                with contextlib.suppress(OSError):  # where there are no locks, what a kill leaves stays
                    locks.claim(file.fileno())
                try:
                    yield file
                except RuntimeError:
                    if file.failure is None:
                        raise
                    raise file.failure from None
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)  # which Windows allows of a closed file only
            _clear(path.parent.glob(f".{glob.escape(path.name)}.*.part"))
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


class _Output(io.BufferedWriter):
    """A file that keeps why it could not be written, since `torch.save` does not pass it on."""

    failure: OSError | None = None

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.failure = error
            raise


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file by `replacing`."""
    with replacing(path) as file:
        file.write(text.encode())


def save_figure(figure: Any, path: Path, dpi: int = 100) -> None:
    """Writes a Matplotlib figure by `replacing`, in the format that the path's suffix names."""
    with replacing(path) as file:
        figure.savefig(file, format=path.suffix.removeprefix(".").lower(), dpi=dpi)


def append_line(path: Path, text: str) -> None:
    """Adds a line to a file and brings it to the disk; a kill may leave a part of the line.

    A file of one line per epoch is not worth writing anew each time; its reader stops at a line that is torn.

    Raises:
        WriteError: It cannot be written.
    """
    with write_errors(path), open(path, "a", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def is_new(directory: Path, left: Container[str] = ()) -> bool:
    """Whether a directory has nothing but what a process leaves that is killed early.

    That is a lock, temporary files, and files and empty folders of these names.
    """

    def counts(path: Path) -> bool:
        if path.is_dir():
            return path.name not in left or not is_new(path)
        return not (path.name == locks.NAME or path.name in left or _is_temporary(path))

    return not any(map(counts, directory.iterdir()))


def clear_temporary(directory: Path) -> None:
    """Deletes the temporary files that ended processes have left in a directory."""
    _clear(directory.iterdir() if directory.is_dir() else ())


def _clear(paths: Iterable[Path]) -> None:
    for path in filter(_is_temporary, list(paths)):
        with contextlib.suppress(OSError), open(path, "r+b") as file:
            if locks.claim(file.fileno()):
                path.unlink()


def _is_temporary(path: Path) -> bool:
    return _TEMPORARY.fullmatch(path.name) is not None

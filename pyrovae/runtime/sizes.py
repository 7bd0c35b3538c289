"""Sizes that files declare, compared with the memory that is free before anything of that size is allocated.

A small compressed file can declare arrays of any size. Whatever a reader would allocate is therefore computed
from headers and directories first.
"""

import contextlib
import io
import math
import os
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.lib import format as npy

MAGIC = b"\x93NUMPY"
HEAD = 2**16 + 16  # bytes of a `.npy` that hold any header of numpy's first version, which plain arrays have
_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
_OF_GROUPS = {
    "memory.max": ("memory.current", "inactive_file"),
    "memory.limit_in_bytes": ("memory.usage_in_bytes", "total_inactive_file"),
}  # what limits a control group of Linux: the file that tells what it uses, and how much of that can be freed


@dataclass(frozen=True)
class Declared:
    """What the header of an array says of it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool

    @property
    def numbers(self) -> int:
        """How many numbers there are."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that they take as they are stored."""
        return self.numbers * self.dtype.itemsize

    @classmethod
    def of(cls, file: BinaryIO | zipfile.ZipExtFile) -> "Declared":
        """What a `.npy` declares.

        Raises:
            ValueError: It has no header of plain numbers.
        """
        head = io.BytesIO(file.read(HEAD))  # a header declares its own length as well
        version = npy.read_magic(head)
        if version not in _HEADERS:
            raise ValueError(f"a header of version {version[0]}.{version[1]}, which no plain array has")
        shape, fortran, dtype = _HEADERS[version](head)
        if dtype.hasobject:
            raise ValueError("an array of objects, which only an unsafe load would read")
        if min(shape, default=0) < 0:
            raise ValueError(f"an array of the shape {shape}")
        return cls(shape, dtype, fortran)


def declared_arrays(file: BinaryIO) -> dict[str, Declared]:
    """What the arrays of a `.npz` declare, by name.

    Raises:
        ValueError: A part is no array, or its sizes contradict each other.
        zipfile.BadZipFile: It is no `.npz`.
    """
    found: dict[str, Declared] = {}
    with zipfile.ZipFile(file) as parts:
        for part in parts.infolist():
            name = part.filename.removesuffix(".npy")
            if name in found:
                raise ValueError(f"two arrays with the name {name!r}")
            if part.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"an array {name!r} that numpy has not compressed")
            with parts.open(part) as stream:
                found[name] = Declared.of(stream)
            if found[name].nbytes > part.file_size:
                sizes = f"{found[name].nbytes:,} bytes in a part of {part.file_size:,}"
                raise ValueError(f"an array {name!r} that declares {sizes}")
    return found


def check_fits(path: Path, needed: int, what: str, remedy: str = "") -> None:
    """Checks that as many bytes are free as a file's contents take.

    Args:
        path: The file.
        needed: Bytes that are allocated at the same time when it is read and used.
        what: What the file declares.
        remedy: What to do about it.

    Raises:
        ValueError: They are not.
    """
    free = free_memory()
    if needed > free:
        raise ValueError(
            f"expected {path} to fit into memory, got {what}, which take {needed / 1e9:,.2f} GB where "
            f"{free / 1e9:,.2f} GB are free{remedy}"
        )


def free_memory() -> int:
    """Bytes that this process can still get, by the system, its control groups and its own limits."""
    return max(0, min((*_of_system(), *_of_groups(), *_of_process()), default=sys.maxsize))


def _of_system() -> Iterator[int]:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        yield next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            yield os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _of_groups(root: Path = Path("/sys/fs/cgroup"), member: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    with contextlib.suppress(OSError):
        for line in member.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers not in ("", "memory"):
                continue
            top = root / controllers
            place = top / path.lstrip("/")
            for folder in (place, *place.parents):
                yield from _of_group(folder)
                if folder == top:
                    break


def _of_group(folder: Path) -> Iterator[int]:
    for limit, (used, freeable) in _OF_GROUPS.items():
        with contextlib.suppress(OSError, ValueError):  # no such group, or no limit: "max"
            left = int((folder / limit).read_text()) - int((folder / used).read_text())
            lines = (folder / "memory.stat").read_text().splitlines()
            yield left + sum(int(line.split()[1]) for line in lines if line.split()[0] == freeable)


def _of_process() -> Iterator[int]:
    with contextlib.suppress(ImportError, OSError):  # Windows has no such limits
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            yield limit - pages * resource.getpagesize()

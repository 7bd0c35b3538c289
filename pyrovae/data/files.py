"""Pixels that stay in their file: images of a `.npy` of any size, read when they are asked for.

They are read by `pread` and not through a mapping. Linux may map a whole large page, of megabytes, for each
image that is touched, which then counts as memory of the process; and a file that becomes shorter
while it is mapped ends the process, where `pread` says so. What was read stays in the system's page cache,
as far as there is room, from which reading is a copy.
"""

import itertools
import math
import os
import weakref
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

IN_MEMORY = 2**30  # bytes as float32 up to which a `.npy` is read into memory, which is faster
CHUNK = 2**24  # bytes read at a time where everything is read
WORKERS = 4  # threads that read ahead: more than one, for a disk serves several requests at once
AHEAD, MOST_AHEAD = 8, 2**26  # batches read ahead, and bytes of them, but always one batch


class ChangedFileError(OSError):
    """A file was written to while it was in use."""


class ArrayFile:
    """The images of a `.npy`, uint8, bool or floats, of which only what is read is in memory.

    Args:
        path: The file.
        array: What `numpy.load` with `mmap_mode="r"` gives; (N, H, W) or (N, H, W, C), in C order.
    """

    def __init__(self, path: Path, array: np.memmap):
        self.path = path
        self.dtype = array.dtype
        self.start = array.offset
        self.count, height, width, channels = (*array.shape, 1)[:4]
        self.stored = height, width, channels
        self.shape = channels, height, width
        self.image_bytes = math.prod(self.shape) * array.dtype.itemsize
        self.end = self.start + self.count * self.image_bytes
        self.descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)
        self.stamp = self._stamp()

    def chunks(self) -> Iterator[np.ndarray]:
        """The images from first to last, (., H, W, C), as the file has them, a few at a time."""
        size = max(1, CHUNK // self.image_bytes)
        for first in range(0, self.count, size):
            count = min(size, self.count - first)
            yield self._array([self._bytes(first, count)], count)

    @cached_property
    def checksum(self) -> int:
        """A CRC-32 of all images as the file has them, when this is first asked for."""
        return self._crc()

    def check_unchanged(self, *, thoroughly: bool = False) -> None:
        """Compares the images with `checksum`, if the file system says that the file was written to.

        Reading the whole file takes long, whereas asking for its size and times costs microseconds. These tell
        of every `write`, but not of every change through a mapping.

        Args:
            thoroughly: Whatever the file system says.

        Raises:
            ChangedFileError: The images are others.
        """
        expected, stamp = self.checksum, self._stamp()
        if not thoroughly and stamp == self.stamp:
            return
        if self._crc() != expected:
            raise ChangedFileError(
                f"expected {self.path} unchanged while it is in use, got other images: put back what it was"
            )
        self.stamp = stamp

    def _crc(self) -> int:
        crc = 0
        for chunk in self.chunks():
            crc = zlib.crc32(chunk.data, crc)
        return crc

    def _stamp(self) -> tuple[int, int, int]:
        """The file's size, and when its contents and its entry were last changed, in nanoseconds."""
        found = os.fstat(self.descriptor)
        return found.st_size, found.st_mtime_ns, found.st_ctime_ns

    def read(self, rows: Int[Tensor, " B"], out: Float[Tensor, "B C H W"]) -> None:
        """Writes these images into a float32 tensor in main memory, with pixels in [0, 1].

        Raises:
            ChangedFileError: The file has become shorter.
        """
        values = self._array([self._bytes(row) for row in rows.tolist()], len(rows))
        pixels = np.moveaxis(out.numpy(), 1, -1)
        if values.dtype == np.uint8:
            np.divide(values, np.float32(255), out=pixels)
        else:
            pixels[...] = values

    def _bytes(self, first: int, count: int = 1) -> bytes:
        """Images that lie together."""
        size, offset = count * self.image_bytes, self.start + first * self.image_bytes
        found = os.pread(self.descriptor, size, offset)
        if len(found) < size:
            raise ChangedFileError(
                f"expected {self.path} of at least {self.end:,} bytes, as it was opened, got "
                f"{os.fstat(self.descriptor).st_size:,}: leave it unchanged while it is in use"
            )
        return found

    def _array(self, parts: list[bytes], count: int) -> np.ndarray:
        return np.frombuffer(b"".join(parts), self.dtype).reshape(count, *self.stored)


@dataclass(frozen=True, eq=False)
class FilePixels:
    """Pixels of N images that stay in a file, (N, C, H, W); an index into them reads them.

    Attributes:
        file: Where they are.
        index: Which image of the file each is.
        device: Where they go when they are read.
    """

    file: ArrayFile
    index: Int[Tensor, " N"]
    device: torch.device

    @classmethod
    def of(cls, file: ArrayFile) -> "FilePixels":
        """All pixels of a file, for the CPU."""
        return cls(file, torch.arange(file.count), torch.device("cpu"))

    def __len__(self) -> int:
        return len(self.index)

    @property
    def shape(self) -> torch.Size:
        """(N, C, H, W)."""
        return torch.Size((len(self), *self.file.shape))

    @property
    def nbytes(self) -> int:
        """What they would take in memory, as float32."""
        return 4 * self.shape.numel()

    @property
    def checksum(self) -> int:
        """A CRC-32 of the whole file's images and of which they are, for one pass through the file in order."""
        return zlib.crc32(self.index.numpy().data, self.file.checksum)

    def __getitem__(self, index: Any) -> Float[Tensor, "*B C H W"]:
        """Those pixels, in memory of the device."""
        rows = self.index[index]
        out = torch.empty(rows.numel(), *self.file.shape, dtype=torch.float32)
        size = max(1, CHUNK // self.file.image_bytes)
        for some, pixels in zip(rows.reshape(-1).split(size), out.split(size), strict=True):
            self.file.read(some, pixels)
        return out.reshape(*rows.shape, *self.file.shape).to(self.device)

    def to(self, device: torch.device | str) -> "FilePixels":
        """The same, still in their file, for this device."""
        return replace(self, device=torch.device(device))

    def subset(self, index: Any) -> "FilePixels":
        """Those pixels, still in their file."""
        return replace(self, index=self.index[index])

    def split(self, size: int) -> Iterator[Float[Tensor, "B C H W"]]:
        """All pixels in order, so many images at a time."""
        return (self[start : start + size] for start in range(0, len(self), size))

    def batches(self, indices: Sequence[Int[Tensor, " _"]]) -> Iterator[Float[Tensor, "_ C H W"]]:
        """The pixels at each of these indices, which threads read ahead while the caller works on others.

        Closing the iterator ends the threads. For a CUDA device they read into pinned memory, from which
        the copy does not wait.

        Raises:
            ChangedFileError: The file has become shorter.
        """
        if indices and indices[0].is_cuda:  # all at once: each transfer waits for the device
            indices = torch.cat(list(indices)).cpu().split([len(chosen) for chosen in indices])
        largest = max((len(chosen) for chosen in indices), default=1) * 4 * math.prod(self.file.shape)
        ahead = max(1, min(AHEAD, MOST_AHEAD // max(1, largest)))
        pinned = self.device.type == "cuda"
        to_read, reading = iter(indices), deque()
        pool = ThreadPoolExecutor(min(WORKERS, ahead), thread_name_prefix="pyrovae-read")

        def start(count: int) -> None:
            for chosen in itertools.islice(to_read, count):
                # Here and not in a thread, so that no call to CUDA runs beside the caller's.
                shape = len(chosen), *self.file.shape
                out = torch.empty(shape, dtype=torch.float32, pin_memory=pinned)
                reading.append((pool.submit(self._read, chosen, out), out))

        try:
            start(ahead)
            while reading:
                future, out = reading.popleft()
                future.result()
                start(1)
                yield out.to(self.device, non_blocking=True)
        finally:
            pool.shutdown(cancel_futures=True)

    def _read(self, chosen: Int[Tensor, " B"], out: Float[Tensor, "B C H W"]) -> None:
        self.file.read(self.index[chosen], out)

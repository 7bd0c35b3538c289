"""Images as tensors in memory or in a file that is larger, and what the readers of datasets give."""

import contextlib
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pyrovae.data.files import FilePixels
from pyrovae.runtime.inputs import check_label_types, check_pixels


@dataclass(frozen=True)
class Images:
    """N images of one shape, pixels in [0, 1], with class labels where there are any.

    Attributes:
        pixels: In memory, or in a file that is larger: then `images[index]` has those images in memory,
            `images[:]` all of them, and `batches` goes through them with bounded memory.
        labels: Classes from 0, in memory.

    Raises:
        TypeError: Pixels or labels are no tensors.
        ValueError: Pixels are not floats in [0, 1] of shape (N, C, H, W), or labels not N integers.
    """

    pixels: Float[Tensor, "N C H W"] | FilePixels
    labels: Int[Tensor, " N"] | None = None

    def __post_init__(self):
        if not self.on_disk:
            check_pixels(self.pixels)
            if self.pixels.dim() != 4:
                raise ValueError(
                    f"expected pixels of shape (N, C, H, W), got {tuple(self.pixels.shape)}: "
                    "reshape to (-1, channels, height, width)"
                )
        if self.labels is not None:
            check_label_types(self.labels)
            if self.labels.shape != (len(self),):
                raise ValueError(f"expected {len(self)} labels, got shape {tuple(self.labels.shape)}")

    def _with(self, pixels: Tensor | FilePixels, labels: Tensor | None) -> "Images":
        """Images made from these, which need no second look."""
        images = object.__new__(Images)
        vars(images).update(pixels=pixels, labels=labels)
        return images

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index) -> "Images":
        return self._with(self.pixels[index], None if self.labels is None else self.labels[index])

    @property
    def shape(self) -> tuple[int, int, int]:
        """One image, (C, H, W)."""
        return tuple(self.pixels.shape[1:])

    @property
    def on_disk(self) -> bool:
        """Whether the pixels stay in their file."""
        return isinstance(self.pixels, FilePixels)

    def subset(self, index: Int[Tensor, " M"]) -> "Images":
        """Those images: in memory if these are, and else in their file."""
        if not self.on_disk:
            return self[index]
        return self._with(self.pixels.subset(index), None if self.labels is None else self.labels[index])

    def without_labels(self) -> "Images":
        """The same images, of classes unknown."""
        return self._with(self.pixels, None)

    def batches(self, indices: Sequence[Int[Tensor, " _"]]) -> Iterator["Images"]:
        """The images at each of these indices, in memory of the device that these are for.

        Those of a file are read ahead by threads, which end with the iterator: close it
        (`contextlib.closing`) where it may be left early.

        Args:
            indices: One per batch, of any size.

        Raises:
            ChangedFileError: Their file has become shorter.
        """
        if self.on_disk:
            batches = self.pixels.batches(indices)
        else:
            batches = (self.pixels.index_select(0, chosen) for chosen in indices)
        with contextlib.closing(batches):
            for chosen, pixels in zip(indices, batches, strict=True):
                labels = None if self.labels is None else self.labels.index_select(0, chosen)
                yield self._with(pixels, labels)

    def checksum(self, before: int = 0) -> int:
        """A CRC-32 of the pixels, after others with this one; of a file's, of all of it and which they are."""
        if self.on_disk:
            return zlib.crc32(self.pixels.checksum.to_bytes(4, "little"), before)
        return zlib.crc32(self.pixels.detach().contiguous().cpu().numpy().data, before)

    def to(self, device: torch.device | str) -> "Images":
        """These images on a device; those of a file stay there, and go to the device as they are read."""
        return self._with(self.pixels.to(device), None if self.labels is None else self.labels.to(device))


class Source(NamedTuple):
    """What a reader gives: images for training, the source's own test images if any, grey levels."""

    train: Images
    test: Images | None
    levels: int

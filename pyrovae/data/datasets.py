"""Datasets, divided into images for training, validation and test.

A reader gives the training images and, where the source has them, its test images. `load_dataset` splits off
what is missing, so that train, validation and test never share an image.
"""

import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pyrovae.data import files
from pyrovae.data.arrays import read_arrays
from pyrovae.data.folders import read_folder
from pyrovae.data.images import Images, Source
from pyrovae.data.sources import DATASETS, default_data_dir
from pyrovae.runtime.errors import FieldError

SPLIT_SEED = 0  # of the held-out images: the same for every run, so that runs can be compared
HELD_OUT, MOST_HELD_OUT = 0.1, 5000  # this fraction, at most so many, for validation and for a missing test set


@dataclass(frozen=True)
class Dataset:
    """Train, validation and test images that share none, and the number of grey levels they have.

    Attributes:
        named: How many different labels their source has; None to count them here.

    Raises:
        ValueError: They are not of one shape.
    """

    train: Images
    validation: Images
    test: Images
    levels: int
    named: int | None = None

    def __post_init__(self):
        shapes = [images.shape for images in (self.train, self.validation, self.test)]
        if len(set(shapes)) > 1:
            raise ValueError(f"expected images of one shape, got {', '.join(map(str, shapes))}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """One image, (C, H, W)."""
        return self.train.shape

    @property
    def classes(self) -> int:
        """One more than the largest label; 0 where labels are missing or negative."""
        labels = [images.labels for images in (self.train, self.validation, self.test)]
        if any(part is None or (part < 0).any() for part in labels):
            return 0
        return 1 + max(int(part.max()) for part in labels)

    def check_classes(self) -> None:
        """Checks that labels are the numbers of classes: from 0 on, without a gap.

        Raises:
            ValueError: They leave out numbers, for which a conditional VAE would have classes without images.
        """
        named = self.named
        if named is None and self.classes:
            named = len(torch.cat([part.labels for part in (self.train, self.validation, self.test)]).unique())
        if self.classes and named < self.classes:
            raise ValueError(
                f"expected labels that number the classes from 0 on, for a conditional VAE, got {named} labels "
                f"up to {self.classes - 1}: number them by numpy.unique(labels, return_inverse=True)[1]"
            )

    @property
    def checksum(self) -> int:
        """A CRC-32 of the training and validation pixels: a resumed run needs the same data."""
        return self.validation.checksum(self.train.checksum())

    @property
    def label_checksum(self) -> int | None:
        """The same of the labels; None where there are none."""
        crc = 0
        for images in (self.train, self.validation):
            if images.labels is None:
                return None
            crc = zlib.crc32(images.labels.long().contiguous().cpu().numpy().data, crc)
        return crc

    def to(self, device: torch.device | str) -> "Dataset":
        return replace(
            self,
            train=self.train.to(device),
            validation=self.validation.to(device),
            test=self.test.to(device),
        )


def load_dataset(
    name: str,
    *,
    data_dir: Path | None = None,
    held_out: int | None = None,
    limit: tuple[int, int | None] | None = None,
    image_size: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Reads a dataset by name or path, and splits it.

    Args:
        name: A name in DATASETS, a `.npz` with the array `images` (and, if any, `labels`,
            `test_images`, `test_labels`), a `.npy` of images, or a folder of image files of any format that
            Pillow reads, whose subfolders are classes (see `folders`). Arrays are (N, H, W) or
            (N, H, W, C): uint8, bool, or floats in [0, 1]. What is used of a `.npy` in C order, numpy's
            default, stays in the file if it is more than IN_MEMORY; everything else is read into memory.
        data_dir: Where torchvision's datasets lie or go; `default_data_dir()` if None.
        held_out: Validation images, taken from the source's training images; a tenth, at most 5,000, if
            None. As many again as that default are for test where the source has no test images.
        limit: At most this many (training, validation) images, a subset drawn with `seed`; None
            for all of either.
        image_size: The side to which a folder's images are resized and cropped; None to keep them.
        seed: Of the limited subset. What is held out does not depend on it.

    Raises:
        ValueError: The name is unknown, or its contents are not such images; one line that says
            what is wrong and what to do.
    """
    source = read_source(name, data_dir or default_data_dir(), image_size)
    order = torch.randperm(len(source.train), generator=torch.Generator().manual_seed(SPLIT_SEED))
    default = min(max(1, round(HELD_OUT * len(order))), MOST_HELD_OUT)
    sizes = default if source.test is None else 0, default if held_out is None else held_out
    if len(order) <= sum(sizes):
        raise ValueError(
            f"expected more than {sum(sizes)} images in {name!r}, got {len(order)}: with {sizes[0]} for test "
            f"and {sizes[1]} for validation, none are left to train on"
        )
    test, validation, train = order.split([*sizes, len(order) - sum(sizes)])  # test first: always the same
    if limit is not None:
        generator = torch.Generator().manual_seed(seed)
        train = train[torch.randperm(len(train), generator=generator)[: limit[0]]]
        validation = validation[torch.randperm(len(validation), generator=generator)[: limit[1]]]
    parts = source.train.subset(train), source.train.subset(validation)
    parts = *parts, source.train.subset(test) if source.test is None else source.test
    labels = [part.labels for part in (source.train, source.test) if part is not None]
    named = None if any(part is None for part in labels) else len(torch.cat(labels).unique())
    return Dataset(*small_in_memory(*parts), source.levels, named)


def small_in_memory(*parts: Images) -> tuple[Images, ...]:
    """The same images, read into memory if together they are at most IN_MEMORY; else as they are."""
    if sum(part.pixels.nbytes for part in parts) > files.IN_MEMORY:
        return parts
    return tuple(part[:] for part in parts)


def read_source(name: str, data_dir: Path, image_size: int | None) -> Source:
    """All images of a source, as `load_dataset` names it, before they are divided.

    Raises:
        ValueError: There is no such source, or image_size is not for it.
    """
    path = Path(name).expanduser()
    is_folder = name not in DATASETS and path.is_dir()
    if image_size is not None and (image_size < 1 or not is_folder):
        raise FieldError(
            f"expected image_size >= 1 with a folder of images, got {image_size} with {name!r}",
            field="image_size",
        )
    if name in DATASETS:
        return DATASETS[name](data_dir)
    if is_folder:
        return read_folder(path, image_size)
    if path.suffix.lower() in (".npz", ".npy") and path.is_file():
        return read_arrays(path)
    raise FieldError(
        f"expected dataset to be one of {', '.join(DATASETS)}, or an existing .npz, .npy or folder, "
        f"got {name!r}",
        field="dataset",
    )

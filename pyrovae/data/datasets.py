"""Images as tensors in memory: bundled digits, torchvision's datasets, arrays and folders of files.

A reader gives the training images and, where the source has them, its test images. `load_dataset`
splits off what is missing, so that train, validation and test never share an image.

A `.npy` may be larger than memory: above IN_MEMORY its images stay in the file (see `files`). Which
they are, their order and their pixels are the same as in memory.
"""

import contextlib
import os
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from pyrovae.data.files import CHUNK, ArrayFile, FilePixels
from pyrovae.data.folders import DataWarning, Folder
from pyrovae.runtime.inputs import check_label_types, check_pixels, range_fault
from pyrovae.runtime.schemas import RAISED_BY_DAMAGE
from pyrovae.runtime.sizes import MAGIC, Declared, check_fits, declared_arrays

SPLIT_SEED = 0  # of the held-out images: the same for every run, so that runs can be compared
HELD_OUT, MOST_HELD_OUT = 0.1, 5000  # this fraction, at most so many, for validation and for a missing test set
IN_MEMORY = 2**30  # bytes as float32 up to which a .npy is read into memory, which is faster
PER_IMAGE = 64  # bytes for each image's label, and for its place in the orders of the splits
LEAST_GREY = 32  # a largest grey level below this is not one of 255


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


class Source(NamedTuple):
    """What a reader gives: images for training, the source's own test images if any, grey levels."""

    train: Images
    test: Images | None
    levels: int


def read_digits(data_dir: Path) -> Source:
    """scikit-learn's bundled handwritten digits: 1,797 images, 8x8, 17 grey levels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)
    return Source(Images(pixels, torch.tensor(digits.target)), None, levels=17)


def read_mnist(data_dir: Path) -> Source:
    """MNIST: handwritten digits, 60,000 and 10,000 test images, 28x28 (LeCun et al., 1998)."""
    return _read_torchvision("MNIST", data_dir)


def read_fashion_mnist(data_dir: Path) -> Source:
    """Fashion-MNIST: clothes, 60,000 and 10,000 test images, 28x28 (Xiao et al., 2017)."""
    return _read_torchvision("FashionMNIST", data_dir)


def read_kmnist(data_dir: Path) -> Source:
    """Kuzushiji-MNIST: cursive Japanese, 60,000 and 10,000 test images, 28x28 (Clanuwat et al., 2018)."""
    return _read_torchvision("KMNIST", data_dir)


DATASETS: dict[str, Callable[[Path], Source]] = {
    "digits": read_digits,
    "mnist": read_mnist,
    "fashion-mnist": read_fashion_mnist,
    "kmnist": read_kmnist,
}


def default_data_dir() -> Path:
    """$PYROVAE_DATA, or ~/.cache/pyrovae."""
    return Path(os.environ.get("PYROVAE_DATA") or "~/.cache/pyrovae").expanduser()


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
    if sum(part.pixels.nbytes for part in parts) > IN_MEMORY:
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
        raise ValueError(f"expected image_size >= 1 with a folder of images, got {image_size} with {name!r}")
    if name in DATASETS:
        return DATASETS[name](data_dir)
    if is_folder:
        return read_folder(path, image_size)
    if path.suffix.lower() in (".npz", ".npy") and path.is_file():
        return read_arrays(path)
    raise ValueError(
        f"expected dataset to be one of {', '.join(DATASETS)}, or an existing .npz, .npy or folder, "
        f"got {name!r}"
    )


def _read_torchvision(name: str, data_dir: Path) -> Source:
    from torchvision.datasets import mnist

    family = getattr(mnist, name)
    raw = data_dir / name / "raw"
    files = [Path(file).stem for file, _ in family.resources]
    if not all((raw / file).exists() for file in files):
        try:
            family(str(data_dir), download=True)
        except (OSError, RuntimeError, HTTPException) as error:
            with contextlib.suppress(OSError):  # the folders that the attempt made, if they are empty
                raw.rmdir()
                raw.parent.rmdir()
            raise ValueError(
                f"could not download {name} ({_reason(error, line=-1)}): put {', '.join(files)} into {raw}, "
                "or use the bundled dataset digits"
            ) from None
    stored = sum((raw / file).stat().st_size for file in files)  # a byte for each pixel and each label
    check_fits(raw, 8 * stored, f"files of {stored:,} bytes")
    try:
        # Not by `family`, which prefers what an old torchvision may have left in another folder.
        train, test = (
            (mnist.read_image_file(str(raw / images)), mnist.read_label_file(str(raw / labels)))
            for images, labels in (files[:2], files[2:])
        )
        for pixels, labels in (train, test):
            if len(pixels) != len(labels):
                raise ValueError(f"{len(pixels)} images, {len(labels)} labels")
    except RAISED_BY_DAMAGE as error:
        raise ValueError(
            f"{raw} holds damaged files ({_reason(error)}): delete them to download again"
        ) from None
    return Source(*(Images(x.unsqueeze(1) / 255, labels) for x, labels in (train, test)), levels=256)


def _reason(error: Exception, line: int = 0) -> str:
    """One line of what an error says, or its kind if it says nothing."""
    return str(error).strip().splitlines()[line] if str(error).strip() else type(error).__name__


_ALONE = ": save its images alone as a .npy, which is read from the file batch by batch"


def read_arrays(path: Path) -> Source:
    """Images from a `.npy`, or from a `.npz` with `images` and, if any, `labels`, `test_images`, ...

    Those of a `.npy` stay in the file.
    """
    with _plain_arrays(path), open(path, "rb") as file:
        alone = file.read(len(MAGIC)) == MAGIC
        file.seek(0)
        declared = {"images": Declared.of(file)} if alone else declared_arrays(file)
    _check_names(path, declared)
    stays = alone and not declared["images"].fortran
    of_all = f"{sum(one.nbytes for one in declared.values()):,} bytes of declared arrays"
    check_fits(path, _needed_in_file(declared["images"]) if stays else _needed(declared), of_all, _ALONE)
    with _plain_arrays(path), open(path, "rb") as file:
        if alone:
            arrays = {"images": np.load(path, mmap_mode="r", allow_pickle=False)}
        else:
            arrays = dict(np.load(file, allow_pickle=False))
    if isinstance(arrays["images"], np.memmap):
        return Source(_images_of_file(path, arrays["images"]), None, levels=256)
    if arrays["images"].dtype == np.uint8:
        _check_grey_levels(path, [arrays["images"]])
    train = _images_from_array(path, arrays["images"], arrays.get("labels"))
    test = None
    if "test_images" in arrays:
        test = _images_from_array(path, arrays["test_images"], arrays.get("test_labels"))
        if test.shape != train.shape:
            raise ValueError(f"expected one image shape in {path}, got {train.shape} and test {test.shape}")
    return Source(train, test, levels=256)


@contextlib.contextmanager
def _plain_arrays(path: Path) -> Iterator[None]:
    """Whatever a damaged file of arrays makes numpy raise, as one line."""
    try:
        yield
    except MemoryError as error:
        raise ValueError(f"expected {path} to fit into memory, got: {_reason(error)}{_ALONE}") from None
    except RAISED_BY_DAMAGE as error:
        raise ValueError(f"expected {path} to hold plain numeric arrays, got: {_reason(error)}") from None


def _check_names(path: Path, arrays: Iterable[str]) -> None:
    """Checks that a `.npz` has the arrays that it should have, and no others."""
    known, found = {"images", "labels", "test_images", "test_labels"}, set(arrays)
    if "images" not in found or not found <= known:
        raise ValueError(
            f"expected {path} to hold 'images' and perhaps {', '.join(sorted(known - {'images'}))}, "
            f"got {', '.join(sorted(found)) or 'nothing'}"
        )
    if "test_labels" in found and "test_images" not in found:
        raise ValueError(f"expected 'test_images' with the 'test_labels' in {path}, got none")


def _needed(declared: dict[str, Declared]) -> int:
    """Bytes that are allocated at the same time for arrays in memory.

    First there are the arrays as they are stored with their pixels as float32, then these pixels and the copies
    of them in the splits.
    """
    images = [one for name, one in declared.items() if name.endswith("images")]
    pixels = 4 * sum(one.numbers for one in images)
    stored = sum(one.nbytes for one in declared.values()) + sum(
        4 * one.numbers * _copies(one) for one in images
    )
    return max(stored, 2 * pixels) + PER_IMAGE * sum(one.shape[0] for one in images if one.shape)


def _copies(images: Declared) -> int:
    """How often pixels are in memory as float32, beside the stored array, while it is converted."""
    channels_last = len(images.shape) == 4 and images.shape[-1] > 1
    return channels_last + (images.dtype == np.uint8) if images.dtype in (np.uint8, np.float32) else 1


def _needed_in_file(images: Declared) -> int:
    """Bytes that are allocated at the same time for images that stay in their file, or are few."""
    pixels, count = 4 * images.numbers, images.shape[0] if images.shape else 0
    return PER_IMAGE * count + (pixels if pixels <= IN_MEMORY else 4 * CHUNK + 2 * pixels // max(1, count))


def _images_from_array(path: Path, array: np.ndarray, labels: np.ndarray | None) -> Images:
    pixels = _pixels_from_array(path, array)
    if labels is None:
        return Images(pixels)
    if labels.shape != (len(pixels),) or labels.dtype.kind not in "iu":
        remedy = ": save labels.astype(int)" if labels.ndim == 1 and labels.dtype.kind in "bf" else ""
        got = f"{labels.dtype} of shape {labels.shape}{remedy}"
        raise ValueError(f"expected {len(pixels)} integer labels in {path}, got {got}")
    if labels.dtype == np.uint64 and labels.max() > np.iinfo(np.int64).max:
        raise ValueError(f"expected labels below 2**63 in {path}, got {labels.max()}")
    return Images(pixels, torch.from_numpy(labels.astype(np.int64)))


def _images_of_file(path: Path, array: np.memmap) -> Images:
    """Images that stay in the file; in memory if its order is not C's, whose images lie together."""
    if 0 in array.shape or not array.flags.c_contiguous or not hasattr(os, "pread"):  # which Windows lacks
        array = np.array(array)
        if array.dtype == np.uint8:
            _check_grey_levels(path, [array])
        return _images_from_array(path, array, None)
    _check_kind(path, array)
    file = ArrayFile(path, array)
    if array.dtype == np.uint8:
        _check_grey_levels(path, file.chunks())
    else:
        _check_range(path, file.chunks())
    return Images(FilePixels.of(file))


def _pixels_from_array(path: Path, array: np.ndarray) -> Float[Tensor, "N C H W"]:
    _check_kind(path, array)
    _check_range(path, [array])
    if array.dtype == np.uint8:
        array = array / np.float32(255)
    if array.ndim == 3:
        array = array[..., None]
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 1), dtype=np.float32))


def _check_kind(path: Path, array: np.ndarray) -> None:
    """That this is an array of images, whatever its values."""
    if array.dtype != np.uint8 and array.dtype.kind not in "fb":
        remedy = ": save images / the grey level of white" if array.dtype.kind in "iu" else ""
        raise ValueError(f"expected uint8, bool or float images in {path}, got {array.dtype}{remedy}")
    if array.ndim not in (3, 4) or 0 in array.shape:
        remedy = ": reshape to (-1, height, width)" if array.ndim == 2 else ""
        raise ValueError(
            f"expected images (N, H, W) or (N, H, W, C) in {path}, got shape {array.shape}{remedy}"
        )
    if array.ndim == 4 and array.shape[-1] > 4:
        first = "move channels to the end with numpy.moveaxis(images, 1, -1)"
        raise ValueError(
            f"expected at most 4 channels, last, in {path}, got shape {array.shape}: "
            + (first if array.shape[1] <= 4 else "choose some with images[..., :3]")
        )


def _check_grey_levels(path: Path, chunks: Iterable[np.ndarray]) -> None:
    """Checks that uint8 images use their range, as far as need be to see it.

    A largest level of 16, say, means that white is 16, and not that all images are dark.
    """
    largest = 0
    for chunk in chunks:
        largest = max(largest, int(chunk.max(initial=0)))
        if largest >= LEAST_GREY:
            return
    if largest:
        remedy = "multiply by 255, or save an array of bool" if largest == 1 else f"save images / {largest}"
        raise ValueError(
            f"expected 8-bit images with grey levels up to 255 in {path}, got up to {largest}, which is black: "
            f"if {largest} is white, {remedy}"
        )


def _check_range(path: Path, chunks: Iterable[np.ndarray]) -> None:
    """Checks that floats are in [0, 1]; of other kinds every value will be."""
    low, high = np.inf, -np.inf
    for chunk in chunks:
        if chunk.dtype.kind != "f":
            return
        # Of these the numpy functions, not Python's, stay nan once they are.
        low, high = float(np.minimum(low, chunk.min())), float(np.maximum(high, chunk.max()))
    fault = range_fault(low, high)
    if fault:
        raise ValueError(f"expected pixels in [0, 1] in {path}, got {fault}")


def read_folder(path: Path, image_size: int | None) -> Source:
    """Images from the files in a folder; its subfolders, if it has any, are classes.

    Warns:
        DataWarning: Files were left out, or images changed.
    """
    folder = Folder.read(path, image_size)
    _check_grey_levels(path, [folder.images])
    if str(folder.remarks):
        warnings.warn(f"{path}: {folder.remarks}", DataWarning, stacklevel=2)
    return Source(_images_from_array(path, folder.images, folder.labels), None, levels=256)

"""Images from arrays of numpy, in a `.npz` or a `.npy`, and the checks that they are images.

A `.npy` may be larger than memory: above `files.IN_MEMORY` its images stay in the file. Which images they are,
their order and their pixels are the same as in memory.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pyrovae.data import files
from pyrovae.data.files import CHUNK, ArrayFile, FilePixels
from pyrovae.data.images import Images, Source
from pyrovae.runtime.damage import RAISED_BY_DAMAGE
from pyrovae.runtime.inputs import range_fault
from pyrovae.runtime.sizes import MAGIC, Declared, check_fits, declared_arrays
from pyrovae.runtime.texts import first_line

PER_IMAGE = 64  # bytes for each image's label, and for its place in the orders of the splits
LEAST_GREY = 32  # a largest grey level below this is not one of 255
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
        check_grey_levels(path, [arrays["images"]])
    train = images_from_array(path, arrays["images"], arrays.get("labels"))
    test = None
    if "test_images" in arrays:
        test = images_from_array(path, arrays["test_images"], arrays.get("test_labels"))
        if test.shape != train.shape:
            raise ValueError(f"expected one image shape in {path}, got {train.shape} and test {test.shape}")
    return Source(train, test, levels=256)


@contextlib.contextmanager
def _plain_arrays(path: Path) -> Iterator[None]:
    """Whatever a damaged file of arrays makes numpy raise, as one line."""
    try:
        yield
    except MemoryError as error:
        raise ValueError(f"expected {path} to fit into memory, got: {first_line(error)}{_ALONE}") from None
    except RAISED_BY_DAMAGE as error:
        raise ValueError(f"expected {path} to hold plain numeric arrays, got: {first_line(error)}") from None


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
    return PER_IMAGE * count + (
        pixels if pixels <= files.IN_MEMORY else 4 * CHUNK + 2 * pixels // max(1, count)
    )


def images_from_array(path: Path, array: np.ndarray, labels: np.ndarray | None) -> Images:
    """Images and their labels from arrays in memory, once both have been checked.

    Args:
        path: Their file, for the error.

    Raises:
        ValueError: They are not images, or not one integer label for each.
    """
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
            check_grey_levels(path, [array])
        return images_from_array(path, array, None)
    _check_kind(path, array)
    file = ArrayFile(path, array)
    if array.dtype == np.uint8:
        check_grey_levels(path, file.chunks())
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


def check_grey_levels(path: Path, chunks: Iterable[np.ndarray]) -> None:
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

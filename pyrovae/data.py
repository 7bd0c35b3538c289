"""Images as tensors in memory: bundled digits, torchvision's datasets, arrays and folders of files.

A reader gives the training images and, where the source has them, its test images. `load_dataset`
splits off what is missing, so that train, validation and test never share an image.
"""

import contextlib
import os
import tokenize
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

SPLIT_SEED = 0  # of the held-out images: the same for every run, so that runs can be compared
HELD_OUT, MOST_HELD_OUT = 0.1, 5000  # this fraction, at most so many, for validation and for a missing test set
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}


@dataclass(frozen=True)
class Images:
    """N images of one shape, pixels in [0, 1], with class labels where there are any."""

    pixels: Float[Tensor, "N C H W"]
    labels: Int[Tensor, " N"] | None = None

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index) -> "Images":
        return Images(self.pixels[index], None if self.labels is None else self.labels[index])

    @property
    def shape(self) -> tuple[int, int, int]:
        """One image, (C, H, W)."""
        return tuple(self.pixels.shape[1:])

    def to(self, device: torch.device | str) -> "Images":
        return Images(self.pixels.to(device), None if self.labels is None else self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """Train, validation and test images that share none, and the number of grey levels they have."""

    train: Images
    validation: Images
    test: Images
    levels: int

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

    @property
    def checksum(self) -> int:
        """A CRC-32 of the training and validation pixels: a resumed run needs the same data."""
        crc = 0
        for images in (self.train, self.validation):
            crc = zlib.crc32(images.pixels.contiguous().cpu().numpy().data, crc)
        return crc

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
            `test_images`, `test_labels`), a `.npy` of images, or a folder of image files, whose
            subfolders are classes. Arrays are (N, H, W) or (N, H, W, C): uint8, bool, or floats in
            [0, 1].
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
            f"expected more than {sum(sizes)} images in {name!r}, got {len(order)}: {sizes[0]} are for test "
            f"and {sizes[1]} for validation"
        )
    test, validation, train = order.split([*sizes, len(order) - sum(sizes)])  # test first: always the same
    if limit is not None:
        generator = torch.Generator().manual_seed(seed)
        train = train[torch.randperm(len(train), generator=generator)[: limit[0]]]
        validation = validation[torch.randperm(len(validation), generator=generator)[: limit[1]]]
    return Dataset(
        source.train[train],
        source.train[validation],
        source.train[test] if source.test is None else source.test,
        source.levels,
    )


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
    if path.suffix in (".npz", ".npy") and path.is_file():
        return read_arrays(path)
    raise ValueError(
        f"expected dataset to be one of {', '.join(DATASETS)}, or an existing .npz, .npy or folder, "
        f"got {name!r}"
    )


def _read_torchvision(name: str, data_dir: Path) -> Source:
    import torchvision.datasets

    family = getattr(torchvision.datasets, name)
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
    try:
        train, test = (family(str(data_dir), train=train) for train in (True, False))
        for split in (train, test):
            if len(split.data) != len(split.targets):
                raise ValueError(f"{len(split.data)} images, {len(split.targets)} labels")
    except (OSError, RuntimeError, ValueError, TypeError, LookupError, AssertionError) as error:
        raise ValueError(
            f"{raw} holds damaged files ({_reason(error)}): delete them to download again"
        ) from None
    return Source(*(Images(s.data.unsqueeze(1) / 255, s.targets) for s in (train, test)), levels=256)


def _reason(error: Exception, line: int = 0) -> str:
    """One line of what an error says, or its kind if it says nothing."""
    return str(error).strip().splitlines()[line] if str(error).strip() else type(error).__name__


_DAMAGED = (zipfile.BadZipFile, zlib.error, tokenize.TokenError)  # what numpy lets through from below


def read_arrays(path: Path) -> Source:
    """Images from a `.npy`, or from a `.npz` with `images` and, if any, `labels`, `test_images`, ..."""
    try:
        with open(path, "rb") as file:
            loaded = np.load(file, allow_pickle=False)
            arrays = {"images": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
    except (ValueError, OSError, EOFError, RuntimeError, *_DAMAGED) as error:
        raise ValueError(f"expected {path} to hold plain numeric arrays, got: {_reason(error)}") from None
    known = {"images", "labels", "test_images", "test_labels"}
    if "images" not in arrays or not arrays.keys() <= known:
        raise ValueError(
            f"expected {path} to hold 'images' and perhaps {', '.join(sorted(known - {'images'}))}, "
            f"got {', '.join(sorted(arrays)) or 'nothing'}"
        )
    if "test_labels" in arrays and "test_images" not in arrays:
        raise ValueError(f"expected 'test_images' with the 'test_labels' in {path}, got none")
    if arrays["images"].dtype == np.uint8 and 0 < arrays["images"].max(initial=0) < 32:
        raise ValueError(
            f"expected uint8 images with grey levels up to 255 in {path}, got up to {arrays['images'].max()}: "
            "divide by the largest grey level"
        )
    train = _images_from_array(path, arrays["images"], arrays.get("labels"))
    test = None
    if "test_images" in arrays:
        test = _images_from_array(path, arrays["test_images"], arrays.get("test_labels"))
        if test.shape != train.shape:
            raise ValueError(f"expected one image shape in {path}, got {train.shape} and test {test.shape}")
    return Source(train, test, levels=256)


def _images_from_array(path: Path, array: np.ndarray, labels: np.ndarray | None) -> Images:
    pixels = _pixels_from_array(path, array)
    if labels is None:
        return Images(pixels)
    if labels.shape != (len(pixels),) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"expected {len(pixels)} integer labels in {path}, got {labels.dtype} of shape {labels.shape}"
        )
    return Images(pixels, torch.from_numpy(labels.astype(np.int64)))


def _pixels_from_array(path: Path, array: np.ndarray) -> Float[Tensor, "N C H W"]:
    if array.dtype == np.uint8:
        array = array / np.float32(255)
    elif array.dtype.kind not in "fb":
        raise ValueError(f"expected uint8, bool or float images in {path}, got {array.dtype}")
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim != 4 or 0 in array.shape:
        raise ValueError(f"expected images (N, H, W) or (N, H, W, C) in {path}, got shape {array.shape}")
    if array.shape[-1] > 4:
        raise ValueError(
            f"expected at most 4 channels, last, in {path}, got shape {array.shape}: "
            "move channels to the end with numpy.moveaxis(images, 1, -1)"
        )
    low, high = float(array.min()), float(array.max())
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"expected pixels in [0, 1] in {path}, got values from {low:g} to {high:g}: "
            "divide by the largest grey level, or save as uint8"
        )
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 1), dtype=np.float32))


def read_folder(path: Path, image_size: int | None) -> Source:
    """Images from the files in a folder; its subfolders, if it has any, are classes."""
    files = sorted(
        file
        for file in path.rglob("*")
        if file.suffix.lower() in IMAGE_SUFFIXES
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    if not files:
        raise ValueError(f"expected image files ({', '.join(sorted(IMAGE_SUFFIXES))}) in {path}, got none")
    arrays = [_read_image(file, image_size) for file in files]
    colour = max(array.ndim for array in arrays) == 3
    if colour:
        arrays = [a if a.ndim == 3 else np.repeat(a[..., None], 3, axis=-1) for a in arrays]
    for file, array in zip(files, arrays, strict=True):
        if array.shape != arrays[0].shape:
            raise ValueError(
                f"expected images of one size, got {array.shape[1]}x{array.shape[0]} in {file} and "
                f"{arrays[0].shape[1]}x{arrays[0].shape[0]} in {files[0]}: set an image size"
            )
    folders = [file.relative_to(path).parts[0] if file.parent != path else "" for file in files]
    classes = sorted(set(folders))
    labels = np.array([classes.index(folder) for folder in folders]) if len(classes) > 1 else None
    return Source(_images_from_array(path, np.stack(arrays), labels), None, levels=256)


def _read_image(file: Path, image_size: int | None) -> np.ndarray:
    """(H, W) for a grey image and (H, W, 3) for a colour one, uint8."""
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as image:
            if image.mode in ("F", "I") or image.mode.startswith("I;"):
                raise ValueError(f"more than 8 bits per pixel, mode {image.mode}: save it with 8")
            image = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
            if image_size is not None:
                image = ImageOps.fit(image, (image_size, image_size))
            return np.asarray(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"expected an image in {file}, got: {_reason(error)}") from None

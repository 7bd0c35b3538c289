"""Images from a folder of files: every format that Pillow reads, and a count of what is left out or changed.

Links are followed. A picture is turned as its EXIF orientation says, and a transparent one lies on white.
"""

import os
import warnings
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

from pyrovae.data.arrays import check_grey_levels, images_from_array
from pyrovae.data.images import Source
from pyrovae.runtime.damage import RAISED_BY_DAMAGE
from pyrovae.runtime.sizes import check_fits

WHITE = 255  # the background of transparent pictures
DECODED = 16  # bytes for each pixel of an image while it is decoded and converted
LAYERED = "PSD"  # a format whose further pictures are layers of the first


class DataWarning(UserWarning):
    """Some of the data were left out, or were changed so that they can be images."""


REMARKS = {
    "file": "skipped {n} file{s} of no image format{kinds}",
    "hidden": "skipped {n} hidden name{s}",
    "broken": "skipped {n} broken link{s}",
    "again": "skipped {n} link{s} to what is read already",
    "frames": "took the first picture of {n} file{s} with several",
    "transparent": "laid {n} transparent image{s} on white",
    "black": "read {n} image{s} whose only grey levels are 0 and 1 of 255, which is black",
}


@dataclass
class Remarks:
    """What was left out of a folder, or changed.

    Attributes:
        counts: How often each thing happened, by its key in REMARKS.
        suffixes: Those of the files that have no image format.
    """

    counts: Counter[str] = field(default_factory=Counter)
    suffixes: set[str] = field(default_factory=set)

    def add(self, kind: str) -> None:
        """Counts one more."""
        self.counts[kind] += 1

    def __str__(self) -> str:
        """All of it in one line; empty if there is nothing to say."""
        kinds = f" ({', '.join(sorted(self.suffixes))})" if self.suffixes else ""
        return "; ".join(
            text.format(n=n, s="" if n == 1 else "s", kinds=kinds)
            for kind, text in REMARKS.items()
            if (n := self.counts[kind])
        )


@dataclass(frozen=True)
class Folder:
    """What a folder holds.

    Attributes:
        images: (N, H, W), or (N, H, W, 3) if one of them is coloured, uint8.
        labels: Each image's class (N,), the place of its subfolder among the sorted ones; None if there are
            fewer than two.
        remarks: What was left out or changed.
    """

    images: np.ndarray
    labels: np.ndarray | None
    remarks: Remarks

    @classmethod
    def read(cls, path: Path, image_size: int | None = None) -> "Folder":
        """The images of all files under a folder, in the order of their paths; its subfolders are classes.

        Args:
            image_size: The side to which images are resized and cropped; None to keep them.

        Raises:
            ValueError: There are no images, they differ in size, one cannot be read or declares more pixels
                than Pillow allows, or they do not fit into memory.
        """
        remarks = Remarks()
        try:
            files = _files_under(path, remarks)
        except OSError as error:
            raise ValueError(f"expected a folder that can be read at {path}, got: {error}") from None
        if not files:
            found = f": {remarks}" if str(remarks) else ""
            raise ValueError(f"expected image files, such as .png or .jpg, in {path}, got none{found}")
        with warnings.catch_warnings():
            warnings.simplefilter("error", _limit())
            _check_fits(path, files, image_size)
            arrays = [_read_image(file, image_size, remarks) for file in files]
        if max(array.ndim for array in arrays) == 3:
            arrays = [a if a.ndim == 3 else np.repeat(a[..., None], 3, axis=-1) for a in arrays]
        for file, array in zip(files, arrays, strict=True):
            if array.shape != arrays[0].shape:
                raise ValueError(
                    f"expected images of one size, got {array.shape[1]}x{array.shape[0]} in {file} and "
                    f"{arrays[0].shape[1]}x{arrays[0].shape[0]} in {files[0]}: set an image size"
                )
        names = [file.relative_to(path).parts[0] if file.parent != path else "" for file in files]
        classes = sorted(set(names))
        labels = np.array([classes.index(name) for name in names]) if len(classes) > 1 else None
        return cls(np.stack(arrays), labels, remarks)


def _files_under(root: Path, remarks: Remarks) -> list[Path]:
    """All image files in a folder and its subfolders, each once, in the order of their paths.

    What is reached without a link comes before what is reached by one. So every folder and file is read once,
    links cannot lead around, and no image is both for training and for validation.
    """
    folders, links, files, linked_files, seen = [root], [], [], [], set()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        if os.path.realpath(folder) in seen:
            remarks.add("again")
            continue
        seen.add(os.path.realpath(folder))
        for path in sorted(folder.iterdir()):
            if path.name.startswith("."):
                remarks.add("hidden")
            elif path.is_dir():
                (links if path.is_symlink() else folders).append(path)
            elif not path.exists():
                remarks.add("broken")
            elif path.suffix.lower() in _suffixes() and path.is_file():
                (linked_files if path.is_symlink() else files).append(path)
            else:
                remarks.add("file")
                remarks.suffixes.add(path.suffix.lower() or "no suffix")
    seen.update(map(os.path.realpath, files))
    for file in sorted(linked_files):
        if os.path.realpath(file) in seen:
            remarks.add("again")
        else:
            files.append(file)
        seen.add(os.path.realpath(file))
    return sorted(files)


@cache
def _suffixes() -> set[str]:
    """The suffixes of all formats that Pillow can read, and not only tell."""
    from PIL import Image, ImageFile

    suffixes = Image.registered_extensions()
    readers = Image.OPEN  # which the line above has filled

    def readable(kind: str) -> bool:
        reader = readers[kind][0] if kind in readers else ImageFile.StubImageFile
        return kind != "MPEG" and not (isinstance(reader, type) and issubclass(reader, ImageFile.StubImageFile))

    return {suffix for suffix, kind in suffixes.items() if readable(kind)}


def _limit() -> type[Warning]:
    """How Pillow warns of more than `Image.MAX_IMAGE_PIXELS`; of more than twice as many it raises an error."""
    from PIL import Image

    return Image.DecompressionBombWarning


def _check_fits(path: Path, files: list[Path], image_size: int | None) -> None:
    """Checks that there is memory for all images, by the sizes in their headers.

    As many bytes as there are numbers are allocated for the images, and four times as many for pixels as
    float32: with channels first if they are coloured, and once more in the splits.
    """
    from PIL import Image

    sizes, coloured = [], False
    for file in files:
        try:
            with open(file, "rb") as stream, Image.open(stream) as opened:
                sizes.append(opened.width * opened.height)
                coloured |= _mode(opened) == "RGB"
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise ValueError(f"expected an image in {file}, got: {_reason(error)}") from None
        except RAISED_BY_DAMAGE:
            sizes.append(0)  # which is explained when it is read
    kept = sum(sizes) if image_size is None else len(files) * image_size**2
    needed = kept * (3 * 9 if coloured else 8) + DECODED * max(sizes)
    remedy = "" if image_size is None else ": lower the image size"
    check_fits(path, needed, f"{len(files):,} images that declare {kept:,} pixels", remedy)


def _read_image(file: Path, image_size: int | None, remarks: Remarks) -> np.ndarray:
    """(H, W) for a grey image and (H, W, 3) for a colour one, uint8."""
    from PIL import Image, ImageOps

    try:
        # As a stream: Pillow maps a named TIFF into memory, and scrambles it if it is to be turned (13.0).
        with open(file, "rb") as stream, Image.open(stream) as opened:
            if opened.mode in ("F", "I") or opened.mode.startswith("I;"):
                raise ValueError(f"more than 8 bits per pixel, mode {opened.mode}: save it with 8")
            if opened.format != LAYERED and getattr(opened, "is_animated", False):
                remarks.add("frames")
            image = _opaque(ImageOps.exif_transpose(opened), remarks)
        if image_size is not None:
            image = ImageOps.fit(image, (image_size, image_size))
    except RAISED_BY_DAMAGE as error:
        raise ValueError(f"expected an image in {file}, got: {_reason(error)}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"expected an image in {file}, got: {_reason(error)}") from None
    array = np.asarray(image)
    if array.max() == 1:
        remarks.add("black")
    return array


def _mode(image) -> str:
    """The mode that a picture is converted to: grey or coloured."""
    return "L" if image.mode in ("1", "L", "LA", "La") else "RGB"


def _opaque(image, remarks: Remarks):
    """A picture in grey or in colour, as it looks on white."""
    from PIL import Image

    mode = _mode(image)
    if not (image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info):
        return image.convert(mode)
    alpha = image.convert("RGBA").getchannel("A")
    if alpha.getextrema()[0] == 255:
        return image.convert("RGBA").convert(mode)
    remarks.add("transparent")
    on_white = Image.new(mode, image.size, "white")
    on_white.paste(image.convert("RGBA").convert(mode), mask=alpha)
    return on_white


def _reason(error: Exception) -> str:
    """One line of what an error says, or its kind if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def read_folder(path: Path, image_size: int | None) -> Source:
    """Images from the files in a folder; its subfolders, if it has any, are classes.

    Warns:
        DataWarning: Files were left out, or images changed.
    """
    folder = Folder.read(path, image_size)
    check_grey_levels(path, [folder.images])
    if str(folder.remarks):
        warnings.warn(f"{path}: {folder.remarks}", DataWarning, stacklevel=2)
    return Source(images_from_array(path, folder.images, folder.labels), None, levels=256)

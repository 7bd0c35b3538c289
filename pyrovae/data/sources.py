"""The datasets that have a name: scikit-learn's bundled digits, and torchvision's."""

import contextlib
import os
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path

import torch

from pyrovae.data.images import Images, Source
from pyrovae.runtime.damage import RAISED_BY_DAMAGE
from pyrovae.runtime.sizes import check_fits
from pyrovae.runtime.texts import first_line


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
                f"could not download {name} ({first_line(error, line=-1)}): put {', '.join(files)} into {raw}, "
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
            f"{raw} holds damaged files ({first_line(error)}): delete them to download again"
        ) from None
    return Source(*(Images(x.unsqueeze(1) / 255, labels) for x, labels in (train, test)), levels=256)

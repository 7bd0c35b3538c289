"""The images that a picture shows: of the run's own data or of other."""

from dataclasses import replace
from pathlib import Path

import torch

from pyrovae.data import datasets as sources
from pyrovae.data.datasets import small_in_memory
from pyrovae.data.images import Images
from pyrovae.data.sources import DATASETS, default_data_dir
from pyrovae.runs.config import Config
from pyrovae.runs.directories import read_config
from pyrovae.runtime.errors import FieldError
from pyrovae.vae import VAE

SPLITS = ("train", "validation", "test", "all")


def images_of(
    run: str | Path,
    vae: VAE,
    *,
    split: str | None = None,
    data: str | Path | None = None,
    data_dir: str | Path | None = None,
) -> Images:
    """Images that a run's VAE can take, of the run's data or of other.

    Raises:
        ValueError: There are no such data, or they are of another shape.
    """
    split = split or ("validation" if data is None else "all")
    if split not in SPLITS:
        raise FieldError(f"expected split in {', '.join(SPLITS)}, got {split!r}", field="split")
    if vae.classes and data is not None and Path(data).expanduser().is_dir():
        raise FieldError(
            "expected data to be an .npz with labels for a conditional VAE, got a folder, whose classes are "
            "numbered by their names",
            field="data",
        )
    config, _ = read_config(Path(run))
    if data_dir is not None:
        config = replace(config, data_dir=str(data_dir))
    if data is not None:
        config = _with_data(config, str(data), vae.decoder.shape)
    try:
        images = _every_image(config) if split == "all" else getattr(config.make_dataset(), split)
    except FieldError as error:
        if error.field != "dataset":
            raise
        raise FieldError(error.about("data"), field="data") from None
    if vae.classes and images.labels is None:
        raise ValueError(
            f"expected labels with the images, for a conditional VAE, got none in {config.dataset}"
        )
    if vae.classes and not 0 <= images.labels.min() <= images.labels.max() < vae.classes:
        raise ValueError(
            f"expected labels from 0 to {vae.classes - 1}, the run's, got others in {config.dataset}"
        )
    if images.shape != vae.decoder.shape:
        got, needed = ("x".join(map(str, shape)) for shape in (images.shape, vae.decoder.shape))
        raise ValueError(
            f"expected images of {needed} (channels, height, width) as the run's, got {got} in {config.dataset}"
        )
    return images


def _with_data(config: Config, data: str, shape: tuple[int, int, int]) -> Config:
    """A run's settings with other data, which are resized to the run's shape where that is possible."""
    _, height, width = shape
    resized = data not in DATASETS and Path(data).expanduser().is_dir() and height == width
    return replace(config, dataset=data, image_size=height if resized else None)


def _every_image(config: Config) -> Images:
    """A source's images in its own order: of its training images all, then its test images."""
    place = Path(config.data_dir) if config.data_dir else default_data_dir()
    source = sources.read_source(config.dataset, place, config.image_size)
    parts = [part for part in (source.train, source.test) if part is not None]
    if len(parts) == 1:
        return small_in_memory(*parts)[0]
    labels = None if any(part.labels is None for part in parts) else torch.cat([part.labels for part in parts])
    return Images(torch.cat([part.pixels for part in parts]), labels)

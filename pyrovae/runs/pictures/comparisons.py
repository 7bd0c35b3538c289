"""Runs beside each other: their codes, their samples, and how well they reconstruct."""

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure

from pyrovae import figures
from pyrovae.data.images import Images
from pyrovae.evaluation.bounds import pca_squared_error, squared_error
from pyrovae.runs.directories import read_config
from pyrovae.runs.loading import load
from pyrovae.runs.pictures.batches import in_batches
from pyrovae.runs.pictures.codes import principal_components
from pyrovae.runs.pictures.images import SPLITS, images_of
from pyrovae.runtime.errors import FieldError
from pyrovae.vae import VAE


def side_by_side(
    *several: str | Path,
    split: str | None = None,
    data_dir: str | Path | None = None,
    which: str = "best",
    device: str = "cpu",
    trust: bool = False,
) -> Figure:
    """Pictures runs, such as an autoencoder and a VAE, side by side: their codes, and decoded prior draws.

    The codes have one scale. Below them are the errors of `reconstruction_errors`. More than two dimensions are
    shown by the first two principal components of each run's codes.

    Args:
        several: Two or more runs on the same images, with two or more latent dimensions.
    """
    vaes, images, _ = _comparable(several, split, data_dir, which, device, trust)
    errors = reconstruction_errors(
        *several, split=split, data_dir=data_dir, which=which, device=device, trust=trust
    )
    clouds, samples = {}, []
    for name, vae in vaes.items():
        if vae.latent_dim < 2:
            raise ValueError(f"expected runs of 2 latent dimensions or more, got {vae.latent_dim} in {name}")
        z = in_batches(vae.encode, images.pixels, images.labels)
        clouds[name] = z if vae.latent_dim == 2 else principal_components(z)[0]
        labels = torch.arange(36) % vae.classes if vae.classes else None
        decoded = in_batches(vae.decode, vae.draw(36, seed=0), labels)
        samples.append([list(row) for row in decoded.split(6)])
    return figures.side_by_side(clouds, images.labels, samples, errors)


def reconstruction_errors(
    *several: str | Path,
    split: str | None = None,
    data_dir: str | Path | None = None,
    which: str = "best",
    device: str = "cpu",
    trust: bool = False,
) -> dict[str, float]:
    """Squared errors of reconstruction, summed over pixels and averaged over images, by run.

    Beside them stands that of as many principal components, fitted to the training images.
    """
    vaes, images, train = _comparable(several, split, data_dir, which, device, trust)
    errors = {name: squared_error(vae, images) for name, vae in vaes.items()}
    for dim in sorted({vae.latent_dim for vae in vaes.values()}):
        errors[f"PCA, {dim} components"] = pca_squared_error(train, images, dim)
    return errors


def _comparable(
    several: Sequence[str | Path],
    split: str | None,
    data_dir: str | Path | None,
    which: str,
    device: str,
    trust: bool,
) -> tuple[dict[str, VAE], Images, Images]:
    """The models by kind, or else by run, the images asked for, and those of training, the same for all."""
    if len(several) < 2 or len({Path(run).resolve() for run in several}) < len(several):
        raise ValueError(f"expected at least two runs, and none twice, got {', '.join(map(str, several))}")
    if split == "all":
        raise FieldError(
            f"expected split in {', '.join(s for s in SPLITS if s != 'all')}, got 'all'", field="split"
        )
    loaded = [load(run, which=which, device=device, trust=trust) for run in several]
    kinds = ["VAE" if vae.posterior.density else "autoencoder" for vae in loaded]
    short = [Path(run).resolve().name for run in several]
    naming = next(names for names in (kinds, short, several) if len(set(names)) == len(several))
    vaes = dict(zip(map(str, naming), loaded, strict=True))
    data = [read_config(Path(run))[1] for run in several]
    if any(described["checksum"] != data[0]["checksum"] for described in data):
        raise ValueError(f"expected runs on the same images, got others in {', '.join(map(str, several))}")
    first = next(iter(vaes.values()))
    images = images_of(several[0], first, split=split, data_dir=data_dir)
    return vaes, images, images_of(several[0], first, split="train", data_dir=data_dir)

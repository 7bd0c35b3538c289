"""Latent codes of images: as arrays, or as a picture of the latent space."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from torch import Tensor

from pyrovae import figures
from pyrovae.runs.loading import load
from pyrovae.runs.pictures.batches import in_batches
from pyrovae.runs.pictures.files import writing
from pyrovae.runs.pictures.images import images_of
from pyrovae.runtime.errors import FieldError
from pyrovae.runtime.whole_files import replacing


def latent(
    run: str | Path,
    *,
    tsne: bool = False,
    limit: int | None = None,
    split: str | None = None,
    data: str | Path | None = None,
    data_dir: str | Path | None = None,
    which: str = "best",
    device: str = "cpu",
    trust: bool = False,
) -> Figure:
    """The means of q(z|x), coloured by class where there are labels.

    A histogram shows one dimension, and a cloud shows two. With more dimensions, the cloud shows the first two
    principal components.

    Args:
        tsne: Whether to show more than two dimensions by t-SNE instead (Visualizing Data using t-SNE, van der
            Maaten & Hinton, 2008, https://jmlr.org/papers/v9/vandermaaten08a.html), which keeps neighbours but
            not distances.
        limit: At most this many images, evenly spaced among those there are.
    """
    if limit is not None and limit < 1:
        raise FieldError(f"expected limit >= 1, got {limit}", field="limit")
    vae = load(run, which=which, device=device, trust=trust)
    if tsne and vae.latent_dim < 3:
        raise FieldError(
            f"expected tsne with more than 2 latent dimensions, got {vae.latent_dim}", field="tsne"
        )
    images = images_of(run, vae, split=split, data=data, data_dir=data_dir)
    if limit is not None and limit < len(images):
        images = images[torch.arange(limit) * len(images) // limit]
    labels, discrete = images.labels, vae.posterior.discrete
    z = in_batches(vae.encode, images.pixels, labels)
    if vae.latent_dim == 1:
        return figures.latent_histogram(z[:, 0], labels, prior=not discrete)
    if vae.latent_dim == 2:
        return figures.cloud(z, labels, "means of q(z|x)") if discrete else figures.latent_cloud(z, labels)
    if tsne:
        return figures.cloud(_embedded(z), labels, "means of q(z|x) by t-SNE", ("t-SNE 1", "t-SNE 2"))
    points, explained = principal_components(z)
    names = [f"component {k} ({share:.0%} of the variance)" for k, share in enumerate(explained, start=1)]
    return figures.cloud(points, labels, "means of q(z|x) by principal components", names)


def principal_components(z: Float[Tensor, "N L"]) -> tuple[Float[Tensor, "N 2"], list[float]]:
    """Points along the first two principal axes, and the share of the variance along each."""
    from sklearn.decomposition import PCA

    if len(z) < 2:
        raise ValueError(f"expected at least 2 images for principal components, got {len(z)}")
    fitted = PCA(2, svd_solver="full")
    with np.errstate(invalid="ignore"):  # no variance at all: 0 / 0
        points = fitted.fit_transform(z.double().numpy())
    return torch.from_numpy(points), np.nan_to_num(fitted.explained_variance_ratio_).tolist()


def _embedded(z: Float[Tensor, "N L"]) -> Float[Tensor, "N 2"]:
    """Points by t-SNE, the same each time."""
    from sklearn.manifold import TSNE

    if len(z) < 4:
        raise ValueError(f"expected at least 4 images for t-SNE, got {len(z)}")
    perplexity = min(30.0, (len(z) - 1) / 3)
    return torch.from_numpy(TSNE(perplexity=perplexity, random_state=0).fit_transform(z.numpy()))


@dataclass(frozen=True)
class Latents:
    """q(z|x) of N images.

    Attributes:
        mean: The mean of each q(z|x); for a Bernoulli code, the probability of each bit.
        scale: Standard deviations of each q(z|x); None where the guide is discrete or knows none.
        labels: Classes, where there are any.
    """

    mean: Float[Tensor, "N L"]
    scale: Float[Tensor, "N L"] | None = None
    labels: Int[Tensor, " N"] | None = None

    def save(self, path: str | Path) -> None:
        """Writes a `.npz` with the arrays `mean` and, where there are any, `scale` and `labels`.

        Args:
            path: The file; the suffix is added where it is missing.

        Raises:
            ValueError: It cannot be written there.
        """
        arrays = {name: value.detach().numpy() for name, value in vars(self).items() if value is not None}
        path = Path(path) if Path(path).suffix.lower() == ".npz" else Path(f"{path}.npz")
        with writing(path), replacing(path) as file:
            np.savez(file, **arrays)


def encode(
    run: str | Path,
    *,
    split: str | None = None,
    data: str | Path | None = None,
    data_dir: str | Path | None = None,
    which: str = "best",
    device: str = "cpu",
    trust: bool = False,
) -> Latents:
    """q(z|x) of images, in their order."""
    vae = load(run, which=which, device=device, trust=trust)
    images = images_of(run, vae, split=split, data=data, data_dir=data_dir)
    mean = in_batches(vae.encode, images.pixels, images.labels)
    try:
        scale = (
            None
            if vae.posterior.discrete or not vae.posterior.density
            else in_batches(
                lambda *given: vae.approximate_posterior(*given).stddev, images.pixels, images.labels
            )
        )
    except NotImplementedError:  # torch's word for a distribution without a closed form
        scale = None
    return Latents(mean, scale, images.labels)

"""A trained run in, matplotlib Figures out; and its latent codes, for use elsewhere.

In every function these mean the same:

run          A run directory.
which        "best", the parameters with the best validation objective, or "last".
device       Where the VAE works; results come back to the CPU. Images go through it in batches.
split        "train", "validation", "test", or "all" of the source's images in the source's order. By
             default "validation"; with `data`, "all".
data         Images in place of the run's own: whatever `load_dataset` reads, of the run's image shape. A
             folder's images are resized and cropped to it where it is square.
data_dir     Where downloaded datasets lie; the run's own place if None.
trust        Whether to import foreign code that the run names, a guide of one's own, and so to run it.

Each raises RunError or CheckpointError for a run that is none or is damaged, and ValueError for an argument
out of range.

Example:
    >>> run, _ = runs.train(Config(epochs=1, limit=(64, 32)), out="runs/first")
    >>> save(interpolate(run, between=(3, 7)), path_for(run, "interpolate"))
    >>> encode(run, split="test").mean.shape
    torch.Size([180, 2])
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import one_hot

from pyrovae.data import DATASETS, Images, default_data_dir, small_in_memory
from pyrovae.data import datasets as sources
from pyrovae.data.files import FilePixels
from pyrovae.evaluation.bounds import pca_squared_error, squared_error
from pyrovae.figures import figures
from pyrovae.runs import training as runs
from pyrovae.runs.config import Config
from pyrovae.runtime.whole_files import WriteError, replacing, save_figure, write_errors
from pyrovae.training.checkpoints import read_metrics
from pyrovae.vae import VAE, prior_grid

SPLITS = ("train", "validation", "test", "all")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".svg", ".pdf", ".eps")
BATCH = 100  # images or codes that go through a VAE at once
MOST = 50  # images along a side of a picture
VECTORS = (".svg", ".pdf", ".eps")  # the suffixes of pictures that are not made of pixels
MOST_PIXELS = 100_000_000


def reconstruct(
    run: str | Path,
    *,
    images: int = runs.PICTURED,
    split: str | None = None,
    data: str | Path | None = None,
    data_dir: str | Path | None = None,
    which: str = "best",
    device: str = "cpu",
    trust: bool = False,
) -> Figure:
    """The first images above their reconstructions, at most this many."""
    _check("images", images, 1, MOST**2)
    vae = runs.load(run, which=which, device=device, trust=trust)
    shown = images_of(run, vae, split=split, data=data, data_dir=data_dir)[:images]
    name = f"{split or 'validation'} images" if data is None else f"images of {Path(data).name}"
    reconstructed = _in_batches(vae.reconstruct, shown.pixels, shown.labels)
    return figures.reconstructions(shown.pixels, reconstructed, f"{name} and their reconstructions")


def sample(
    run: str | Path,
    *,
    n: int = 100,
    digit: int | None = None,
    seed: int = 0,
    which: str = "best",
    device: str = "cpu",
    trust: bool = False,
) -> Figure:
    """The expected images of n draws from the prior, as square a grid as n allows.

    Args:
        digit: Of a conditional VAE, the one class to show; if None it shows a row for each class.
    """
    _check("n", n, 1, MOST**2)
    vae = runs.load(run, which=which, device=device, trust=trust)
    _check_class(vae, digit)
    return runs.samples(vae, n, seed=seed, label=digit)


def interpolate(
    run: str | Path,
    *,
    between: Sequence[int] | None = None,
    corners: Sequence[int] | None = None,
    steps: int = 10,
    data_dir: str | Path | None = None,
    which: str = "best",
    device: str = "cpu",
    trust: bool = False,
) -> Figure:
    """Decoded points on the straight way from one validation image's code to another's, a z1 + (1 - a) z2.

    Args:
        between: The indices of two validation images, which stand at the ends of the row; the first two
            if None.
        corners: Instead, those of four (top left, top right, bottom left, bottom right), whose codes are
            the corners of a bilinear grid.
        steps: Decoded points from one end to the other, both included.
    """
    _check("steps", steps, 2, MOST)
    if between is not None and corners is not None:
        raise ValueError("expected between or corners, got both")
    name, chosen, count = ("between", between or (0, 1), 2) if corners is None else ("corners", corners, 4)
    if len(chosen) != count:
        raise ValueError(f"expected {name} of {count} indices, got {len(chosen)}")
    vae = _continuous(run, "an interpolation", which, device, trust)
    images = images_of(run, vae, data_dir=data_dir)
    for index in chosen:
        _check(name, index, 0, len(images) - 1)
    ends, labels = images.pixels[list(chosen)], images.labels
    codes = vae.encode(ends, None if labels is None else labels[list(chosen)]).cpu()
    if vae.classes:  # the class goes from one to the other along with the code
        codes = torch.cat([codes, one_hot(labels[list(chosen)], vae.classes).to(codes)], -1)
    if corners is None:
        z = straight(codes[0], codes[1], steps).unsqueeze(0)
    else:
        z = straight(straight(codes[0], codes[2], steps), straight(codes[1], codes[3], steps), steps)
    decoded = _in_batches(vae.decode, *z.flatten(0, 1).tensor_split([vae.latent_dim], -1))
    rows = [list(row) for row in decoded.unflatten(0, z.shape[:2])]
    framed = [[torch.ones_like(ends[0]), *row, torch.ones_like(ends[0])] for row in rows]
    framed[0][0], framed[0][-1] = ends[0], ends[1]
    if corners is not None:
        framed[-1][0], framed[-1][-1] = ends[2], ends[3]
        return figures.grid(framed, f"validation images {', '.join(map(str, chosen))}, and between their codes")
    shares = [f"{a:.2f}" for a in torch.linspace(1, 0, steps).tolist()]
    title = (
        f"validation images {chosen[0]} and {chosen[1]}; decoded between them, a z1 + (1 - a) z2 for these a"
    )
    columns = [f"image {chosen[0]}", *shares, f"image {chosen[1]}"]
    return figures.grid(framed, title, column_names=columns)


def straight(
    start: Float[Tensor, "*batch L"], end: Float[Tensor, "*batch L"], steps: int
) -> Float[Tensor, "*batch steps L"]:
    """a start + (1 - a) end at evenly spaced a, from 1 to 0, which give start and end exactly."""
    a = torch.linspace(1, 0, steps).unsqueeze(-1)
    return a * start.unsqueeze(-2) + (1 - a) * end.unsqueeze(-2)


def manifold(
    run: str | Path,
    *,
    steps: int | None = None,
    dims: int | None = None,
    image: int | None = None,
    digit: int | None = None,
    data_dir: str | Path | None = None,
    which: str = "best",
    device: str = "cpu",
    trust: bool = False,
) -> Figure:
    """The decoded latent space over the prior's quantiles: a grid if it has two dimensions, else traversals.

    A traversal moves one dimension and leaves the others where they are. The dimensions come in the order of
    their activity, the variance over the validation images of q(z|x)'s mean (Importance Weighted
    Autoencoders, Burda et al., 2016, https://arxiv.org/abs/1509.00519); one that is not used has none.

    Args:
        steps: Decoded points along a dimension; 20 in a grid and 11 in a traversal if None.
        dims: How many dimensions to traverse, a row for each; all, at most 20, if None.
        image: The validation image at whose code the other dimensions stay; at zero if None.
        digit: Of a conditional VAE, the class to decode; that of the image, or else 0, if None.
    """
    vae = _continuous(run, "a manifold", which, device, trust)
    flat = vae.latent_dim == 2
    steps = (runs.GRID_SIDE if flat else 11) if steps is None else steps
    _check("steps", steps, 2, MOST)
    if flat:
        for name, value in {"dims": dims, "image": image}.items():
            if value is not None:
                raise ValueError(f"expected {name} without 2 latent dimensions, which are a grid, got {value}")
        _check_class(vae, digit)
        z, quantiles = prior_grid(steps)
        decoded = _decoded_as(vae, z, digit or 0)
        title = "decoded grid over the prior's quantiles" + (f", class {digit or 0}" if vae.classes else "")
        return figures.manifold(decoded, quantiles, title)
    dims = min(vae.latent_dim, 20) if dims is None else dims
    _check("dims", dims, 1, min(vae.latent_dim, MOST))
    images = images_of(run, vae, data_dir=data_dir)
    if image is not None:
        _check("image", image, 0, len(images) - 1)
        if digit is None and vae.classes:
            digit = int(images.labels[image])
    _check_class(vae, digit)
    means = _in_batches(vae.encode, images.pixels, images.labels)
    order = means.var(dim=0, correction=0).argsort(descending=True)[:dims].tolist()
    values = prior_grid(steps)[0][0, :, 0]
    z = traversals(torch.zeros(vae.latent_dim) if image is None else means[image], order, values)
    rows = _decoded_as(vae, z, digit or 0)
    place = "zero" if image is None else f"the code of validation image {image}"
    place += f", class {digit or 0}" if vae.classes else ""
    return figures.grid(
        [list(row) for row in rows],
        f"one dimension along the prior's quantiles, the others at {place}",
        row_names=[f"z{dim + 1}" for dim in order],
        column_names=[f"{value + 0.0:.2f}" for value in values.tolist()],
    )


def traversals(
    base: Float[Tensor, " L"], dims: Sequence[int], values: Float[Tensor, " steps"]
) -> Float[Tensor, "dims steps L"]:
    """Copies of a latent point: in row i, dimension dims[i] has these values."""
    z = base.repeat(len(dims), len(values), 1)
    for row, dim in enumerate(dims):
        z[row, :, dim] = values
    return z


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

    One dimension is a histogram, two are a cloud, and of more a cloud shows the first two principal
    components.

    Args:
        tsne: More than two dimensions by t-SNE instead (Visualizing Data using t-SNE, van der Maaten & Hinton,
            2008, https://jmlr.org/papers/v9/vandermaaten08a.html), which keeps neighbours but not distances.
        limit: At most this many images, evenly spaced among those there are.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"expected limit >= 1, got {limit}")
    vae = runs.load(run, which=which, device=device, trust=trust)
    if tsne and vae.latent_dim < 3:
        raise ValueError(f"expected tsne with more than 2 latent dimensions, got {vae.latent_dim}")
    images = images_of(run, vae, split=split, data=data, data_dir=data_dir)
    if limit is not None and limit < len(images):
        images = images[torch.arange(limit) * len(images) // limit]
    labels, discrete = images.labels, vae.posterior.discrete
    z = _in_batches(vae.encode, images.pixels, labels)
    if vae.latent_dim == 1:
        return figures.latent_histogram(z[:, 0], labels, prior=not discrete)
    if vae.latent_dim == 2:
        return figures.cloud(z, labels, "means of q(z|x)") if discrete else figures.latent_cloud(z, labels)
    if tsne:
        return figures.cloud(_embedded(z), labels, "means of q(z|x) by t-SNE", ("t-SNE 1", "t-SNE 2"))
    points, explained = _principal_components(z)
    names = [f"component {k} ({share:.0%} of the variance)" for k, share in enumerate(explained, start=1)]
    return figures.cloud(points, labels, "means of q(z|x) by principal components", names)


def side_by_side(
    *several: str | Path,
    split: str | None = None,
    data_dir: str | Path | None = None,
    which: str = "best",
    device: str = "cpu",
    trust: bool = False,
) -> Figure:
    """Runs beside each other, an autoencoder and a VAE say: codes on one scale, and decoded draws of the prior.

    Below stand the errors of `reconstruction_errors`. More than two dimensions are shown by the first two
    principal components of each run's codes.

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
        z = _in_batches(vae.encode, images.pixels, images.labels)
        clouds[name] = z if vae.latent_dim == 2 else _principal_components(z)[0]
        labels = torch.arange(36) % vae.classes if vae.classes else None
        decoded = _in_batches(vae.decode, vae.draw(36, seed=0), labels)
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
        raise ValueError(f"expected split in {', '.join(s for s in SPLITS if s != 'all')}, got 'all'")
    loaded = [runs.load(run, which=which, device=device, trust=trust) for run in several]
    kinds = ["VAE" if vae.posterior.density else "autoencoder" for vae in loaded]
    short = [Path(run).resolve().name for run in several]
    naming = next(names for names in (kinds, short, several) if len(set(names)) == len(several))
    vaes = dict(zip(map(str, naming), loaded, strict=True))
    data = [runs.read_config(Path(run))[1] for run in several]
    if any(described["checksum"] != data[0]["checksum"] for described in data):
        raise ValueError(f"expected runs on the same images, got others in {', '.join(map(str, several))}")
    first = next(iter(vaes.values()))
    images = images_of(several[0], first, split=split, data_dir=data_dir)
    return vaes, images, images_of(several[0], first, split="train", data_dir=data_dir)


def _principal_components(z: Float[Tensor, "N L"]) -> tuple[Float[Tensor, "N 2"], list[float]]:
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


def curves(*several: str | Path) -> Figure:
    """The bound's terms over epochs: of one run, or of several laid over one another."""
    histories = [history(Path(run)) for run in several]
    if len(histories) == 1:
        return figures.curves(histories[0])
    names = [Path(run).resolve().name for run in several]
    if len(set(names)) < len(names):
        names = [str(run) for run in several]
    if not histories or len(set(names)) < len(names):
        raise ValueError(f"expected at least one run, and none twice, got {', '.join(names) or 'none'}")
    return figures.overlaid_curves(dict(zip(names, histories, strict=True)))


def history(run: Path) -> list[dict]:
    """A run's metrics, of one epoch at least."""
    runs.read_config(run)
    rows = read_metrics(run)
    needed = {"epoch", *(prefix + term for prefix in ("", "validation_") for term in figures.TERMS)}
    if not rows or not all(isinstance(row, dict) and needed <= row.keys() for row in rows):
        raise runs.RunError(f"expected the metrics of at least one epoch in {run / 'metrics.jsonl'}, got none")
    return rows


@dataclass(frozen=True)
class Latents:
    """q(z|x) of N images.

    Attributes:
        mean: Of each q(z|x); for a Bernoulli code, the probability of each bit.
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
    vae = runs.load(run, which=which, device=device, trust=trust)
    images = images_of(run, vae, split=split, data=data, data_dir=data_dir)
    mean = _in_batches(vae.encode, images.pixels, images.labels)
    try:
        scale = (
            None
            if vae.posterior.discrete or not vae.posterior.density
            else _in_batches(
                lambda *given: vae.approximate_posterior(*given).stddev, images.pixels, images.labels
            )
        )
    except NotImplementedError:  # torch's word for a distribution without a closed form
        scale = None
    return Latents(mean, scale, images.labels)


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
        raise ValueError(f"expected split in {', '.join(SPLITS)}, got {split!r}")
    if vae.classes and data is not None and Path(data).expanduser().is_dir():
        raise ValueError(
            "expected data to be an .npz with labels for a conditional VAE, got a folder, whose classes are "
            "numbered by their names"
        )
    config, _ = runs.read_config(Path(run))
    if data_dir is not None:
        config = replace(config, data_dir=str(data_dir))
    if data is not None:
        config = _with_data(config, str(data), vae.decoder.shape)
    try:
        images = _every_image(config) if split == "all" else getattr(config.make_dataset(), split)
    except ValueError as error:
        raise ValueError(str(error).replace("expected dataset", "expected data", 1)) from None
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


def path_for(run: str | Path, name: str, out: str | Path | None = None) -> Path:
    """Where a picture goes: `out`, or `figures/<name>.png` in the run.

    Raises:
        ValueError: `out` is not named as a picture.
    """
    path = Path(run) / "figures" / f"{name}.png" if out is None else Path(out)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"expected out with a picture's suffix ({', '.join(SUFFIXES)}), got {path}")
    return path


def save(figure: Figure, path: Path, dpi: int = 100) -> None:
    """Writes a picture, in place of any that is there, and makes the folders that it needs.

    Raises:
        ValueError: It cannot be written there, or has more than MOST_PIXELS.
    """
    width, height = figure.get_size_inches()
    if path.suffix.lower() not in VECTORS and width * height * dpi**2 > MOST_PIXELS:
        raise ValueError(
            f"expected dpi for a picture of at most {MOST_PIXELS:,} pixels, got {dpi}, which makes "
            f"{width * dpi:,.0f} x {height * dpi:,.0f}: lower it, or save as .pdf or .svg"
        )
    with writing(path):
        save_figure(figure, path, dpi)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Makes the folders that a file needs.

    Raises:
        ValueError: It cannot be written there.
        WriteError: The storage is full or fails.
    """
    try:
        with write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield
    except WriteError as error:
        if not error.of_place:
            raise
        raise ValueError(f"expected out where a file can be written, got {path}: {error.reason}") from None


def _continuous(run: str | Path, what: str, which: str, device: str, trust: bool) -> VAE:
    vae = runs.load(run, which=which, device=device, trust=trust)
    if vae.posterior.discrete:
        raise ValueError(
            f"expected a run with a continuous latent space for {what}, got one whose codes are bits, "
            "with nothing between them: see its samples instead"
        )
    return vae


def _in_batches(
    function: Callable[..., Tensor], inputs: Tensor | FilePixels, labels: Tensor | None = None
) -> Tensor:
    """The function of all inputs with their labels, on the CPU, whatever their number."""
    of_labels = repeat(None) if labels is None else labels.split(BATCH)
    return torch.cat(
        [function(batch, y).detach().cpu() for batch, y in zip(inputs.split(BATCH), of_labels, strict=False)]
    )


def _decoded_as(vae: VAE, z: Float[Tensor, "A B L"], label: int) -> Float[Tensor, "A B C H W"]:
    """Decoded points of one class, where the VAE is conditional."""
    flat = z.flatten(0, 1)
    return _in_batches(vae.decode, flat, torch.full((len(flat),), label)).unflatten(0, z.shape[:2])


def _check_class(vae: VAE, label: int | None) -> None:
    if label is not None and not vae.classes:
        raise ValueError(
            "expected digit with a conditional VAE, got one without classes: train it --conditional"
        )
    if label is not None:
        _check("digit", label, 0, vae.classes - 1)


def _check(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ValueError(f"expected {name} from {low} to {high}, got {value}")

"""Pictures of what a VAE decodes: reconstructions, samples, interpolations, and the latent space."""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import one_hot

from pyrovae import figures
from pyrovae.data.images import Images
from pyrovae.runs.drawing import GRID_SIDE, PICTURED, samples
from pyrovae.runs.loading import load
from pyrovae.runs.pictures.batches import MOST, check_class, check_range, continuous, decoded_as, in_batches
from pyrovae.runs.pictures.images import images_of
from pyrovae.runtime.errors import FieldError
from pyrovae.vae import VAE, prior_grid


def reconstruct(
    run: str | Path,
    *,
    images: int = PICTURED,
    split: str | None = None,
    data: str | Path | None = None,
    data_dir: str | Path | None = None,
    which: str = "best",
    device: str = "cpu",
    trust: bool = False,
) -> Figure:
    """The first images above their reconstructions, at most this many."""
    check_range("images", images, 1, MOST**2)
    vae = load(run, which=which, device=device, trust=trust)
    shown = images_of(run, vae, split=split, data=data, data_dir=data_dir)[:images]
    name = f"{split or 'validation'} images" if data is None else f"images of {Path(data).name}"
    reconstructed = in_batches(vae.reconstruct, shown.pixels, shown.labels)
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
        digit: The one class to show of a conditional VAE; if None, a row for each class.
    """
    check_range("n", n, 1, MOST**2)
    vae = load(run, which=which, device=device, trust=trust)
    check_class(vae, digit)
    return samples(vae, n, seed=seed, label=digit)


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
    check_range("steps", steps, 2, MOST)
    if between is not None and corners is not None:
        raise FieldError("expected between or corners, got both", field="between")
    name, chosen, count = ("between", between or (0, 1), 2) if corners is None else ("corners", corners, 4)
    if len(chosen) != count:
        raise FieldError(f"expected {name} of {count} indices, got {len(chosen)}", field=name)
    vae = continuous(run, "an interpolation", which, device, trust)
    images = images_of(run, vae, data_dir=data_dir)
    for index in chosen:
        check_range(name, index, 0, len(images) - 1)
    ends = images[list(chosen)]
    framed = _framed(ends.pixels, _decoded_between(vae, ends, steps))
    if corners is not None:
        return figures.grid(framed, f"validation images {', '.join(map(str, chosen))}, and between their codes")
    shares = [f"{a:.2f}" for a in torch.linspace(1, 0, steps).tolist()]
    title = (
        f"validation images {chosen[0]} and {chosen[1]}; decoded between them, a z1 + (1 - a) z2 for these a"
    )
    columns = [f"image {chosen[0]}", *shares, f"image {chosen[1]}"]
    return figures.grid(framed, title, column_names=columns)


def _decoded_between(vae: VAE, ends: Images, steps: int) -> Float[Tensor, "rows steps C H W"]:
    """Decoded points between the codes of two images, in one row, or of four, in a grid."""
    codes = vae.encode(ends.pixels, ends.labels).cpu()
    if vae.classes:  # the class goes from one to the other along with the code
        codes = torch.cat([codes, one_hot(ends.labels, vae.classes).to(codes)], -1)
    if len(codes) == 2:
        z = straight(codes[0], codes[1], steps).unsqueeze(0)
    else:
        z = straight(straight(codes[0], codes[2], steps), straight(codes[1], codes[3], steps), steps)
    decoded = in_batches(vae.decode, *z.flatten(0, 1).tensor_split([vae.latent_dim], -1))
    return decoded.unflatten(0, z.shape[:2])


def _framed(ends: Tensor, decoded: Float[Tensor, "rows steps C H W"]) -> list[list[Float[Tensor, "C H W"]]]:
    """Rows of images with the ends at their ends: two in the first row, and the other two in the last."""
    blank = torch.ones_like(ends[0])
    framed = [[blank, *row, blank] for row in decoded]
    framed[0][0], framed[0][-1] = ends[0], ends[1]
    if len(ends) > 2:
        framed[-1][0], framed[-1][-1] = ends[2], ends[3]
    return framed


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
        digit: The class to decode, for a conditional VAE; if None, that of the image, or else 0.
    """
    vae = continuous(run, "a manifold", which, device, trust)
    flat = vae.latent_dim == 2
    steps = (GRID_SIDE if flat else 11) if steps is None else steps
    check_range("steps", steps, 2, MOST)
    if flat:
        for name, value in {"dims": dims, "image": image}.items():
            if value is not None:
                raise FieldError(
                    f"expected {name} without 2 latent dimensions, which are a grid, got {value}", field=name
                )
        return _plane(vae, steps, digit)
    dims = min(vae.latent_dim, 20) if dims is None else dims
    check_range("dims", dims, 1, min(vae.latent_dim, MOST))
    return _traversed(vae, images_of(run, vae, data_dir=data_dir), steps, dims, image, digit)


def _plane(vae: VAE, steps: int, digit: int | None) -> Figure:
    """A grid of decoded points over a latent space of two dimensions."""
    check_class(vae, digit)
    z, quantiles = prior_grid(steps)
    decoded = decoded_as(vae, z, digit or 0)
    title = "decoded grid over the prior's quantiles" + (f", class {digit or 0}" if vae.classes else "")
    return figures.manifold(decoded, quantiles, title)


def _traversed(vae: VAE, images: Images, steps: int, dims: int, image: int | None, digit: int | None) -> Figure:
    """A row of decoded points for each of the `dims` most active latent dimensions."""
    if image is not None:
        check_range("image", image, 0, len(images) - 1)
        if digit is None and vae.classes:
            digit = int(images.labels[image])
    check_class(vae, digit)
    means = in_batches(vae.encode, images.pixels, images.labels)
    order = means.var(dim=0, correction=0).argsort(descending=True)[:dims].tolist()
    values = prior_grid(steps)[0][0, :, 0]
    z = traversals(torch.zeros(vae.latent_dim) if image is None else means[image], order, values)
    rows = decoded_as(vae, z, digit or 0)
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

"""Figures: what stands in them, at known pixels and points; and nothing of matplotlib's own is touched."""

import io
import math

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from pyrovae import figures
from pyrovae.vae import prior_grid

TERMS = ("elbo", "reconstruction", "kl")


def history(epochs):
    keys = [prefix + term for prefix in ("", "validation_") for term in TERMS]
    return [{"epoch": e, **{key: -100.0 / e - k for k, key in enumerate(keys)}} for e in range(1, epochs + 1)]


def numbered(n, channels=1):
    """Images of which each is one grey level of its own."""
    return torch.linspace(0, 1, n)[:, None, None, None].expand(n, channels, 4, 3)


FIGURES = {
    "curves": lambda: figures.curves(history(30)),
    "curves, one epoch": lambda: figures.curves(history(1)),
    "grid": lambda: figures.grid([list(numbered(3)), list(numbered(2))], "title"),
    "grid, one image": lambda: figures.grid([list(numbered(1))], "title"),
    "reconstructions": lambda: figures.reconstructions(numbered(12), numbered(12)),
    "manifold": lambda: figures.manifold(torch.rand(6, 6, 1, 8, 8), [0.1, 0.2, 0.4, 0.6, 0.8, 0.9]),
    "manifold, one point": lambda: figures.manifold(torch.rand(1, 1, 3, 8, 20), [0.5]),
    "latent cloud": lambda: figures.latent_cloud(torch.randn(50, 2), torch.arange(50) % 10),
    "latent cloud, no labels": lambda: figures.latent_cloud(torch.randn(50, 2), None),
    "latent cloud, one point": lambda: figures.latent_cloud(
        torch.zeros(1, 2), torch.zeros(1, dtype=torch.long)
    ),
}
over_figures = pytest.mark.parametrize("make", FIGURES.values(), ids=FIGURES.keys())


@over_figures
def test_saves_without_a_warning_and_leaves_matplotlib_as_it_is(make):
    settings, opened = dict(matplotlib.rcParams), plt.get_fignums()
    figure, file = make(), io.BytesIO()
    figure.savefig(file, dpi=40)
    assert type(figure) is Figure
    assert file.getvalue().startswith(b"\x89PNG")
    assert dict(matplotlib.rcParams) == settings
    assert plt.get_fignums() == opened


def shown(axes):
    """The pixels that an axes shows."""
    (image,) = axes.images
    return torch.tensor(np.asarray(image.get_array()))


# Images


def tile(axes, row, column, height=4, width=3):
    """One image of a grid, whose images stand a white pixel apart."""
    top, left = row * (height + 1), column * (width + 1)
    return shown(axes)[top : top + height, left : left + width]


def test_grid_shows_each_image_in_its_place():
    rows = [list(0.5 * torch.rand(3, 1, 4, 5)), list(0.5 * torch.rand(2, 1, 4, 5))]
    (axes,) = figures.grid(rows, "title").axes
    assert shown(axes).shape == (2 * 5 - 1, 3 * 6 - 1)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            assert torch.equal(tile(axes, i, j, 4, 5), image[0])
    assert (tile(axes, 1, 2, 4, 5) == 1).all()  # the second row is shorter
    assert (shown(axes) == 1).sum() == 9 * 17 - 5 * 20  # white between the images and where there is none
    assert not axes.axison
    assert axes.get_title() == "title"


def test_images_are_grey_from_black_to_white_and_upright():
    dark_above = torch.tensor([[[0.2, 0.2], [0.4, 0.4]]])  # not stretched to the range of the image
    figure = figures.grid([[dark_above]])
    (image,) = figure.axes[0].images
    assert (image.norm.vmin, image.norm.vmax, image.cmap.name) == (0, 1, "gray")
    figure.savefig(file := io.BytesIO(), format="raw", dpi=100)
    width, height = (round(100 * side) for side in figure.get_size_inches())
    canvas = np.frombuffer(file.getvalue(), np.uint8).reshape(height, width, 4)[..., 0]
    assert canvas[height // 4, width // 2] == pytest.approx(0.2 * 255, abs=1)
    assert canvas[3 * height // 4, width // 2] == pytest.approx(0.4 * 255, abs=1)


@pytest.mark.parametrize(("channels", "seen"), [(1, 1), (2, 1), (3, 3), (4, 3)])
def test_three_channels_are_colours(channels, seen):
    image = torch.rand(channels, 4, 5, requires_grad=True)
    pixels = shown(figures.grid([[image]]).axes[0])
    expected = image[0] if seen == 1 else image[:3].permute(1, 2, 0)
    assert torch.equal(pixels, expected.detach())


def test_reconstructions_stand_below_their_images():
    images, copies = numbered(13), 1 - numbered(13)
    (axes,) = figures.reconstructions(images, copies).axes
    for n in range(13):
        row, column = divmod(n, 10)
        assert torch.equal(tile(axes, 2 * row, column), images[n, 0])
        assert torch.equal(tile(axes, 2 * row + 1, column), copies[n, 0])
    assert (tile(axes, 3, 3) == 1).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_manifold_rises_to_the_right_and_upwards(channels):
    side, height, width = 4, 3, 2
    images = numbered(side * side, channels)[:, :, :height, :width].unflatten(0, (side, side))
    axes = figures.manifold(images, [0.125, 0.375, 0.625, 0.875]).axes[0]
    canvas = shown(axes).reshape(side * height, side * width, -1)
    for i in range(side):
        for j in range(side):
            bottom = (side - i) * height  # rows of pixels count from the top
            tile = canvas[bottom - height : bottom, j * width : (j + 1) * width]
            assert torch.equal(tile, images[i, j].permute(1, 2, 0))
    # The tick of each quantile is at the middle of its tiles, in the same coordinates.
    places = {label.get_text(): x for x, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)}
    assert places["0.12"] == width / 2
    assert places["0.88"] == (side - 0.5) * width
    places = {label.get_text(): y for y, label in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)}
    assert places["0.12"] == (side - 0.5) * height
    assert places["0.88"] == height / 2
    assert axes.get_ylim() == (side * height, 0)


def test_manifold_takes_a_prior_grid(make_vae):
    z, quantiles = prior_grid(3)
    vae = make_vae()
    axes = figures.manifold(vae.decode(z), quantiles).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.17", "0.50", "0.83"]
    torch.testing.assert_close(shown(axes)[:8, 16:], vae.decode(z[2, 2])[0])


# Points


@pytest.mark.parametrize("classes", [2, 10, 11, 20])
def test_latent_cloud_gives_each_class_its_colour(classes):
    z, labels = torch.randn(60, 2), 3 * (torch.arange(60) % classes)
    axes = figures.latent_cloud(z, labels).axes[0]
    colours = {to_rgba(points.get_facecolor()[0], alpha=1) for points in axes.collections}
    assert len(colours) == len(axes.collections) == classes
    for points in axes.collections:
        chosen = labels == int(points.get_label())
        np.testing.assert_array_equal(points.get_offsets(), z[chosen].numpy())
    assert [t.get_text() for t in axes.get_legend().get_texts()] == [str(3 * k) for k in range(classes)]


@pytest.mark.parametrize("labels", [None, torch.zeros(60, dtype=torch.long), torch.arange(60) % 30])
def test_latent_cloud_without_classes_to_tell_apart(labels):
    z = torch.randn(60, 2, requires_grad=True)
    axes = figures.latent_cloud(z, labels).axes[0]
    (points,) = axes.collections
    np.testing.assert_array_equal(points.get_offsets(), z.detach().numpy())
    assert axes.get_legend() is None


def test_latent_cloud_marks_the_prior_with_circles():
    axes = figures.latent_cloud(torch.randn(9, 2), None).axes[0]
    radii = [np.hypot(*line.get_xydata().T) for line in axes.lines]
    np.testing.assert_allclose(radii, np.outer([1, 2], np.ones(200)))
    assert axes.get_aspect() == 1


# Curves


@pytest.mark.parametrize("epochs", [1, 2, 200])
def test_curves_show_training_beside_validation(epochs):
    rows = history(epochs)
    figure = figures.curves(rows)
    for axes, term in zip(figure.axes, TERMS, strict=True):
        for line, prefix in zip(axes.lines, ("", "validation_"), strict=True):
            expected = [(row["epoch"], row[prefix + term]) for row in rows]
            np.testing.assert_array_equal(line.get_xydata(), expected)
            assert (line.get_marker() == "o") == (epochs < 3)  # a line of one point is invisible
        assert [line.get_label() for line in axes.lines] == ["training", "validation"]
        assert "nats" in axes.get_ylabel()


def test_curves_look_at_the_end_not_at_the_plunge():
    rows = history(200)
    rows[0] |= {key: -1e6 for key in rows[0] if key != "epoch"}
    for axes in figures.curves(rows).axes:
        last = axes.lines[1].get_ydata()[-1]
        bottom, top = axes.get_ylim()
        assert bottom < last < top
        assert top - bottom < 1000


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_curves_bear_a_run_that_diverged(value):
    rows = history(20)
    rows[-1] |= {key: value for key in rows[-1] if key != "epoch"}
    figures.curves(rows).savefig(io.BytesIO(), dpi=40)

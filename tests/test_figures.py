"""Figures: what stands in them, at known pixels and points; and nothing of matplotlib's own is touched."""

import io
import math

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from pyrovae import figures
from pyrovae.vae import prior_grid
from pyrovae.variance.intervals import Slope
from pyrovae.variance.results import Row
from tests.test_comparison import make_row

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
    "variance": lambda: figures.variance(measured(), SLOPES, "title"),
    "variance, one row": lambda: figures.variance([make_row()], {}),
    "variance, none": lambda: figures.variance(measured()[-1:], {}),
    "variance over training": lambda: over_training(),
    "variance over training, one epoch": lambda: figures.variance_over_training({0: [make_row()]}),
    "latent cloud, one point": lambda: figures.latent_cloud(
        torch.zeros(1, 2), torch.zeros(1, dtype=torch.long)
    ),
}
over_figures = pytest.mark.parametrize("make", FIGURES.values(), ids=FIGURES)


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


def test_names_of_rows_and_columns_stand_at_the_middle_of_their_images():
    rows = [list(torch.rand(3, 1, 4, 6))] * 2
    (axes,) = figures.grid(rows, row_names=["a", "b"], column_names=["c", "d", "e"]).axes
    assert dict(zip(labels_of(axes.get_xticklabels()), axes.get_xticks(), strict=True)) == {
        "c": 3,
        "d": 10,
        "e": 17,
    }
    assert dict(zip(labels_of(axes.get_yticklabels()), axes.get_yticks(), strict=True)) == {"a": 2, "b": 7}
    assert axes.axison


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


@pytest.mark.parametrize(("side", "named"), [(1, 1), (4, 1), (9, 1), (10, 2), (20, 4)])
def test_manifold_names_about_five_quantiles(side, named):
    axes = figures.manifold(torch.rand(side, side, 1, 2, 2), torch.arange(side) / 100).axes[0]
    assert labels_of(axes.get_xticklabels()) == [f"{k / 100:.2f}" for k in range(0, side, named)]


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


@pytest.mark.parametrize("labels", [None, torch.zeros(60, dtype=torch.long), torch.arange(60) % 21])
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


@pytest.mark.parametrize("plunge", [-1e4, 1e4, -80.0, -51.0])
def test_curves_look_where_nine_tenths_of_the_values_are(plunge):
    """With half of their range above and below, but no more than Matplotlib would show."""
    rows = history(40)
    rows[0] |= {key: plunge for key in rows[0] if key != "epoch"}
    axes = figures.curves(rows).axes[1]
    lines = [[row[prefix + "reconstruction"] for row in rows] for prefix in ("", "validation_")]
    low, high = np.quantile(lines, [0.05, 0.95])
    bare = Figure().subplots()
    for line in lines:
        bare.plot([row["epoch"] for row in rows], line)
    bottom, top = bare.get_ylim()
    expected = max(bottom, low - (high - low) / 2), min(top, high + (high - low) / 2)
    assert axes.get_ylim() == pytest.approx(expected)


def test_curves_that_never_change_are_seen():
    rows = [dict.fromkeys(row, 1.0) | {"epoch": row["epoch"]} for row in history(9)]
    axes = figures.curves(rows).axes[0]
    bottom, top = axes.get_ylim()
    assert bottom < 1 < top


def test_curves_have_a_panel_for_each_term_that_there_is():
    rows = [
        row | {"elbo": None, "kl": None, "validation_elbo": None, "validation_kl": None} for row in history(3)
    ]
    assert [axes.get_title() for axes in figures.curves(rows).axes] == [figures.TERMS["reconstruction"]]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_curves_bear_a_run_that_diverged(value):
    rows = history(20)
    rows[-1] |= {key: value for key in rows[-1] if key != "epoch"}
    figures.curves(rows).savefig(io.BytesIO(), dpi=40)


# Variance


def measured(epoch: int = 0) -> list[Row]:
    """Three estimators at K of 1, 4 and 16, the third without variance and with one particle only."""
    rows = []
    for rank, label in enumerate(("elbo", "iwae")):
        for k in (1, 4, 16):
            tr_cov = (1 + rank) * (1 + epoch) / k
            rows.append(
                make_row(
                    estimator=label,
                    particles=k,
                    tr_cov=tr_cov,
                    tr_cov_interval=(0.8 * tr_cov, 1.3 * tr_cov),
                    snr_encoder=0.5 * k**-0.5 if rank else 0.02,
                    snr_decoder=0.5 * k**0.5,
                    work=tr_cov * 1e-3 * k,
                    by_parameter={"a.weight": 0.9 * tr_cov, "a.bias": 0.1 * tr_cov, "b.weight": 0.0},
                )
            )
    nothing = {"a.weight": 0.0, "a.bias": 0.0, "b.weight": 0.0}
    exact = {"tr_cov": 0.0, "tr_cov_interval": (0.0, 0.0), "work": 0.0, "by_parameter": nothing}
    return [*rows, make_row(estimator="enumerate", snr_encoder=math.inf, snr_decoder=math.inf, **exact)]


RISING, FALLING = Slope(0.5, (0.4, 0.6)), Slope(-0.5, (-0.7, -0.4))
UNRESOLVED = Slope(math.nan, (math.nan, math.nan), unresolved=(16,))
SLOPES = {
    "elbo": {"encoder": UNRESOLVED, "decoder": RISING},
    "iwae": {"encoder": FALLING, "decoder": RISING},
}


@pytest.fixture(scope="module")
def panels() -> dict[str, Axes]:
    """The axes of the figure, by what they show; not to be changed."""
    names = ("variance", "work", "encoder", "decoder", "layers", "legend", "colours")
    return dict(zip(names, figures.variance(measured(), SLOPES, "a title").axes, strict=True))


def labels_of(ticks) -> list[str]:
    return [tick.get_text() for tick in ticks]


def test_variance_has_a_panel_for_each_question(panels):
    assert panels["variance"].figure.get_suptitle() == "a title"
    for name in ("variance", "encoder", "decoder"):
        axes = panels[name]
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        assert axes.get_xlabel() == "particles K"
        assert list(axes.get_xticks()) == [1, 4, 16]
        assert labels_of(axes.get_xticklabels()) == ["1", "4", "16"]
    assert "tr Cov" in panels["variance"].get_title()
    assert panels["work"].get_xscale() == "log"
    assert "seconds" in panels["work"].get_xlabel()
    assert not panels["legend"].axison


def test_variance_shows_every_trace_with_its_interval(panels):
    axes = panels["variance"]
    assert [line.get_label() for line in axes.lines] == ["elbo", "iwae", "enumerate"]
    assert len(axes.lines[2].get_xydata()) == 0  # none is no point on a logarithmic scale
    np.testing.assert_allclose(axes.lines[1].get_xydata(), [(1, 2), (4, 0.5), (16, 0.125)])
    low, high = axes.collections[1].get_paths()[0].get_extents().intervaly
    assert (low, high) == (pytest.approx(0.8 * 0.125), pytest.approx(1.3 * 2))
    assert labels_of(panels["legend"].get_legend().get_texts()) == ["elbo", "iwae", "enumerate"]


def test_variance_shows_signal_to_noise_with_its_slopes_and_floor(panels):
    axes = panels["encoder"]
    np.testing.assert_allclose(axes.lines[1].get_xydata(), [(1, 0.5), (4, 0.25), (16, 0.125)])
    np.testing.assert_allclose(axes.lines[0].get_ydata(), 0.02)
    texts = labels_of(axes.get_legend().get_texts())
    assert texts == ["iwae: slope -0.50", "below the noise floor"]
    (floor,) = axes.patches
    assert floor.get_extents().transformed(axes.transData.inverted()).intervaly == pytest.approx((0.01, 0.1))
    assert "elbo: slope +0.50" in labels_of(panels["decoder"].get_legend().get_texts())


def test_variance_shows_where_noise_lies(panels):
    """A row for each estimator, a column for each parameter, at the K of which there are most."""
    axes = panels["layers"]
    assert axes.get_title().endswith("K = 1")
    assert labels_of(axes.get_xticklabels()) == ["a.weight", "a.bias", "b.weight"]
    assert labels_of(axes.get_yticklabels()) == ["elbo", "iwae", "enumerate"]
    (image,) = axes.images
    assert image.get_array().shape == (3, 3)
    assert image.get_array()[1, 0] == pytest.approx(math.log10(0.9 * 2))
    assert np.isnan(np.ma.filled(image.get_array(), np.nan)[2]).all()


def test_where_noise_lies_is_shown_over_eight_decades_at_the_commonest_k():
    traces = {"a": 1.0, "b": 1e-5, "c": 1e-20, "d": 0.0}
    rows = [
        make_row(estimator=name, particles=k, by_parameter=traces) for name, k in [("x", 4), ("y", 4), ("z", 2)]
    ]
    axes = next(axes for axes in figures.variance(rows, {}).axes if "by parameter" in axes.get_title())
    assert axes.get_title().endswith("K = 4")
    assert labels_of(axes.get_yticklabels()) == ["x", "y"]
    assert axes.images[0].get_clim() == (-8, 0)


def test_variance_shows_what_precision_costs(panels):
    """A bar for each estimator and K, from top to bottom."""
    bars = panels["work"].patches
    assert [bar.get_width() for bar in bars] == pytest.approx([1e-3] * 3 + [2e-3] * 3)
    middles = [bar.get_y() + bar.get_height() / 2 for bar in bars]
    assert middles == sorted(middles)
    assert [round(middle) for middle in middles] == [0, 0, 0, 1, 1, 1]
    assert labels_of(panels["work"].get_yticklabels()) == ["elbo", "iwae", "enumerate"]
    assert panels["work"].yaxis_inverted()


def test_an_estimator_has_one_colour_throughout(panels):
    for rank in (0, 1):
        colours = {to_rgba(panels[name].lines[rank].get_color()) for name in ("variance", "encoder", "decoder")}
        bars = [bar for bar in panels["work"].patches if round(bar.get_y() + bar.get_height() / 2) == rank]
        assert colours == {to_rgba(bar.get_facecolor(), alpha=1) for bar in bars}
        assert len(colours) == 1


def over_training() -> Figure:
    return figures.variance_over_training({epoch: measured(epoch) for epoch in (0, 1, 100)}, "a title")


def test_variance_over_training_has_a_panel_for_each_number_of_particles():
    figure = over_training()
    assert [axes.get_title() for axes in figure.axes] == ["K = 1", "K = 4", "K = 16"]
    assert figure.get_suptitle() == "a title"
    for rank, axes in enumerate(figure.axes):
        k = 4**rank
        assert (axes.get_xscale(), axes.get_yscale(), axes.get_xlabel()) == ("symlog", "log", "epoch")
        assert labels_of(axes.get_xticklabels()) == ["0", "1", "100"]
        expected = [(0, 2 / k), (1, 4 / k), (100, 202 / k)]
        np.testing.assert_allclose(axes.lines[1].get_xydata(), expected)
    assert [line.get_label() for line in figure.axes[1].lines] == ["elbo", "iwae"]
    assert "tr Cov" in figure.axes[0].get_ylabel()
    assert set(labels_of(figure.legends[0].get_texts())) == {"elbo", "iwae", "enumerate"}


def test_variance_over_training_bears_an_epoch_that_lacks_an_estimator():
    """As during a warm-up of the KL, which importance weights do not stand."""
    rows = {0: measured(0), 1: [row for row in measured(1) if row.estimator != "iwae"]}
    axes = figures.variance_over_training(rows).axes[0]
    assert {line.get_label(): len(line.get_xdata()) for line in axes.lines} == {
        "elbo": 2,
        "iwae": 1,
        "enumerate": 2,
    }


# Side by side, and on a line


@pytest.mark.parametrize("spread", [0.1, 10.0])
def test_codes_side_by_side_are_all_seen_beside_the_prior_s_two_scales(spread):
    clouds = {"a": spread * torch.randn(30, 2), "b": spread * torch.randn(30, 2)}
    figure = figures.side_by_side(clouds, None, [[list(numbered(2))]] * 2, {"a": 1.0, "b": 3.0})
    points = torch.cat([*clouds.values(), torch.tensor([[2.0, 2.0], [-2.0, -2.0]])])
    limits = [(1.05 * float(axis.min()), 1.05 * float(axis.max())) for axis in points.T]
    for axes in (figure.axes[0], figure.axes[2]):
        assert axes.get_xlim() == pytest.approx(limits[0])
        assert axes.get_ylim() == pytest.approx(limits[1])
        radii = [np.hypot(*line.get_xydata().T).round(6).max() for line in axes.lines]
        assert radii == [1, 2]


@pytest.mark.parametrize(("count", "bins"), [(9, 10), (400, 40), (2000, 60)])
def test_a_histogram_has_bins_by_the_square_root_of_its_images(count, bins):
    labels = torch.arange(count) % 3
    (axes,) = figures.latent_histogram(torch.linspace(-4, 4, count), labels).axes
    assert [len(container) for container in axes.containers] == [bins] * 3
    heights = sum(bar.get_height() for container in axes.containers for bar in container)
    assert heights == count
    (line,) = axes.lines
    width = 8 / bins
    middle = np.abs(line.get_xdata()).argmin()
    assert line.get_ydata()[middle] == pytest.approx(count * width / math.sqrt(2 * math.pi), rel=1e-3)
    assert (line.get_xdata().min(), line.get_xdata().max()) == (-4, 4)
    assert labels_of(axes.get_legend().get_texts()) == ["0", "1", "2"]

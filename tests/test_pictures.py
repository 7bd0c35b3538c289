"""Pictures of a run: what they show is what the VAE gives; and one line for whatever is wrong."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from matplotlib.colors import to_rgba
from PIL import Image

from pyrovae import figures, runs
from pyrovae.cli.group import main
from pyrovae.data import sources
from pyrovae.runs import pictures
from pyrovae.runs.config import Config
from pyrovae.runs.pictures.codes import principal_components
from pyrovae.vae import VAE
from tests.test_cli import call, check_works, check_wrong_call
from tests.test_figures import history, numbered, shown, tile

CHANNELS, SIDE = 3, 6
RUNS = {
    "plane": {},
    "five": {"latent_dim": 5},
    "line": {"latent_dim": 1},
    "bits": {"latent_dim": 4, "guide": "bernoulli-code", "estimator": "rloo"},
    "two bits": {"latent_dim": 2, "guide": "bernoulli-code", "estimator": "rloo"},
    "colours": {"dataset": "colours.npz", "latent_dim": 3},
}
CONTINUOUS = [name for name in RUNS if "bits" not in name]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Tiny runs by name; not to be changed. The colour images have no labels."""
    place = tmp_path_factory.mktemp("runs")
    colours = np.random.default_rng(0).random((40, SIDE, SIDE, CHANNELS)).astype(np.float32)
    np.savez(place / "colours.npz", images=colours)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyrovae.runs.training.draw_figures", lambda *args: None)
        patch.chdir(place)
        for name, settings in RUNS.items():
            config = Config(**{"epochs": 2, "limit": (64, 32), "hidden": (16,), "figure_epochs": ()} | settings)
            runs.train(config, out=place / name)
    return place


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture
def run(made) -> Path:
    """A copy of a tiny run of two dimensions, in the working directory."""
    return Path(shutil.copytree(made / "plane", "run"))


def opened(made, name):
    """A run's directory, its VAE and its validation images."""
    config, _ = runs.read_config(made / name)
    return made / name, runs.load(made / name), config.make_dataset().validation


def check_shows(axes, row, column, image):
    """The grid's image at this place is this one."""
    channels, height, width = image.shape
    pixels = tile(axes, row, column, height, width).reshape(height, width, -1)
    expected = (image[:1] if channels < 3 else image[:3]).permute(1, 2, 0)
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-5)


# Images


@pytest.mark.parametrize("name", RUNS)
def test_reconstruct_shows_images_above_their_reconstructions(made, name):
    run, vae, images = opened(made, name)
    (axes,) = pictures.reconstruct(run, images=3).axes
    for column, pixels in enumerate(images.pixels[:3]):
        check_shows(axes, 0, column, pixels)
        check_shows(axes, 1, column, vae.reconstruct(pixels[None])[0])


def test_reconstruct_takes_the_test_images(made):
    run, _, _ = opened(made, "plane")
    (axes,) = pictures.reconstruct(run, images=1, split="test").axes
    check_shows(axes, 0, 0, runs.read_config(run)[0].make_dataset().test.pixels[0])
    assert axes.get_title() == "test images and their reconstructions"


@pytest.mark.parametrize("name", RUNS)
def test_sample_shows_what_the_vae_samples(made, name):
    run, vae, _ = opened(made, name)
    (axes,) = pictures.sample(run, n=5, seed=3).axes
    for k, image in enumerate(vae.sample(5, seed=3)):
        check_shows(axes, *divmod(k, 3), image)
    (others,) = pictures.sample(run, n=5, seed=4).axes
    assert not torch.equal(shown(axes), shown(others))


def test_which_is_the_last_or_the_best(run):
    state = torch.load(run / "best.pt", weights_only=True)
    for value in state["model"].values():
        value.zero_()
    torch.save(state, run / "best.pt")
    best, last = (shown(pictures.sample(run, n=4, which=which).axes[0]) for which in ("best", "last"))
    torch.testing.assert_close(best[:8, :8], torch.full((8, 8), 0.5))
    assert not torch.equal(best, last)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_interpolate_ends_at_the_two_images(made, name):
    run, vae, images = opened(made, name)
    (axes,) = pictures.interpolate(run, between=(3, 1), steps=5).axes
    first, second = images.pixels[3], images.pixels[1]
    z1, z2 = vae.encode(torch.stack([first, second]))
    expected = [first, *(vae.decode(a * z1 + (1 - a) * z2) for a in (1, 0.75, 0.5, 0.25, 0)), second]
    for column, image in enumerate(expected):
        check_shows(axes, 0, column, image)
    assert [label.get_text() for label in axes.get_xticklabels()][::6] == ["image 3", "image 1"]


def test_interpolate_ends_exactly():
    start, end = torch.randn(2, 4), torch.randn(2, 4)
    way = pictures.straight(start, end, 7)
    assert torch.equal(way[:, 0], start)
    assert torch.equal(way[:, -1], end)
    torch.testing.assert_close(way[:, 3], (start + end) / 2)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_interpolate_has_its_corners_at_the_four_images(made, name):
    run, vae, images = opened(made, name)
    (axes,) = pictures.interpolate(run, corners=(0, 1, 2, 3), steps=3).axes
    pixels = images.pixels[:4]
    codes = vae.encode(pixels)
    places = [(0, 1), (0, 3), (2, 1), (2, 3)]
    for k, (row, column) in enumerate(places):
        check_shows(axes, row, column, vae.decode(codes[k]))
        check_shows(axes, row, {1: 0, 3: 4}[column], pixels[k])
    check_shows(axes, 1, 2, vae.decode(codes.mean(dim=0)))
    check_shows(axes, 1, 3, vae.decode((codes[1] + codes[3]) / 2))
    check_shows(axes, 1, 0, torch.ones_like(pixels[0]))


def test_manifold_of_a_plane_is_a_grid(made):
    run, vae, _ = opened(made, "plane")
    (axes,) = pictures.manifold(run, steps=4).axes
    assert shown(axes).shape == (32, 32)
    corner = vae.decode(torch.special.ndtri(torch.tensor([7 / 8, 1 / 8])))  # right, below
    torch.testing.assert_close(shown(axes)[24:, 24:], corner[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["five", "line", "colours"])
@pytest.mark.parametrize("image", [None, 2])
def test_manifold_traverses_the_dimensions_of_largest_variance_first(made, name, image):
    run, vae, images = opened(made, name)
    means = vae.encode(images.pixels)
    order = means.var(dim=0).argsort(descending=True)
    (axes,) = pictures.manifold(run, steps=3, image=image).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"z{dim + 1}" for dim in order]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["-0.97", "0.00", "0.97"]
    for row, dim in enumerate(order):
        for column, value in enumerate(torch.special.ndtri(torch.tensor([1 / 6, 3 / 6, 5 / 6]))):
            z = torch.zeros(vae.latent_dim) if image is None else means[image].clone()
            z[dim] = value
            check_shows(axes, row, column, vae.decode(z))


def test_traversals_vary_along_their_dimension_only():
    base, values = torch.randn(4), torch.randn(3)
    z = pictures.traversals(base, [2, 0], values)
    for row, dim in enumerate([2, 0]):
        assert torch.equal(z[row, :, dim], values)
        others = [k for k in range(4) if k != dim]
        assert torch.equal(z[row][:, others], base[others].expand(3, -1))


def test_manifold_takes_the_first_dims(made):
    (axes,) = pictures.manifold(made / "five", dims=2, steps=2).axes
    assert len(axes.get_yticks()) == 2


@pytest.mark.parametrize("name", ["bits", "two bits"])
@pytest.mark.parametrize("draw", [pictures.manifold, pictures.interpolate])
def test_bits_have_nothing_between_them(made, name, draw):
    with pytest.raises(ValueError, match="expected a run with a continuous latent space"):
        draw(made / name)


# Points


@pytest.mark.parametrize("name", ["plane", "two bits"])
def test_latent_of_a_plane_shows_the_means(made, name):
    run, vae, images = opened(made, name)
    (axes,) = pictures.latent(run).axes
    for points in axes.collections:
        chosen = images.labels == int(points.get_label())
        np.testing.assert_allclose(points.get_offsets(), vae.encode(images.pixels[chosen]), atol=1e-5)
    assert len(axes.lines) == (2 if name == "plane" else 0)  # no circles of a prior of bits


@pytest.mark.parametrize("name", ["five", "bits"])
@pytest.mark.parametrize("tsne", [False, True])
def test_latent_of_more_dimensions_has_each_image_and_class(made, name, tsne):
    run, _, images = opened(made, name)
    (axes,) = pictures.latent(run, tsne=tsne).axes
    assert sum(len(points.get_offsets()) for points in axes.collections) == len(images)
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == [str(label) for label in images.labels.unique().tolist()]
    colours = {to_rgba(points.get_facecolor()[0], alpha=1) for points in axes.collections}
    assert len(colours) == len(names)


def test_latent_components_explain_their_share(made):
    run, vae, images = opened(made, "five")
    (axes,) = pictures.latent(run).axes
    z = vae.encode(images.pixels).double()
    variances = torch.linalg.eigvalsh(z.T.cov()).flip(0)
    for k, label in enumerate([axes.get_xlabel(), axes.get_ylabel()]):
        assert label == f"component {k + 1} ({variances[k] / variances.sum():.0%} of the variance)"
    spread = np.concatenate([points.get_offsets() for points in axes.collections]).var(axis=0, ddof=1)
    np.testing.assert_allclose(spread, variances[:2], rtol=1e-4)


def test_latent_of_a_line_counts_each_image(made):
    run, _, images = opened(made, "line")
    (axes,) = pictures.latent(run).axes
    heights = sum(patch.get_height() for bars in axes.containers for patch in bars)
    assert heights == len(images)
    assert len(axes.containers) == len(images.labels.unique())


def test_latent_without_labels_is_one_cloud(made):
    (axes,) = pictures.latent(made / "colours", limit=3).axes
    (points,) = axes.collections
    assert len(points.get_offsets()) == 3
    assert axes.get_legend() is None


@pytest.mark.parametrize("name", ["line", "plane", "two bits"])
def test_latent_of_one_image_is_a_picture(made, name):
    assert check_works("latent", made / name, "--limit", "1", "--out", "one.png") == "one.png\n"


def test_latent_of_a_collapsed_posterior_has_no_variance(made):
    points, shares = principal_components(torch.ones(5, 3))
    assert torch.equal(points, torch.zeros(5, 2).double())
    assert shares == [0, 0]


def test_a_histogram_without_labels_is_one_and_sums_to_the_prior():
    z = torch.randn(1000)
    (axes,) = figures.latent_histogram(z, None).axes
    (bars,) = axes.containers
    (line,) = axes.lines
    x, density = line.get_xydata().T
    assert density.sum() * (x[1] - x[0]) / bars[0].get_width() == pytest.approx(1000, rel=0.01)
    assert axes.get_legend() is None
    assert figures.latent_histogram(z, None, prior=False).axes[0].lines[:] == []


# Curves


def test_overlaid_curves_have_two_lines_of_one_colour_for_each_run():
    histories = {f"run {k}": history(k) for k in range(1, 22)}
    figure = figures.overlaid_curves(histories)
    for axes, term in zip(figure.axes, figures.TERMS, strict=True):
        assert len(axes.lines) == 2 * len(histories)
        for k, rows in enumerate(histories.values()):
            for line, prefix in zip(axes.lines[2 * k : 2 * k + 2], ("validation_", ""), strict=True):
                np.testing.assert_array_equal(line.get_ydata(), [row[prefix + term] for row in rows])
                assert line.get_color() == axes.lines[2 * k].get_color()
    assert len({line.get_color() for line in figure.axes[0].lines}) == 20
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(histories)


def test_curves_of_several_runs_bear_their_directories_names(made):
    (legend,) = pictures.curves(made / "plane", made / "five").legends
    assert [text.get_text() for text in legend.get_texts()] == ["plane", "five"]
    assert pictures.curves(made / "plane").legends == []


def test_curves_of_runs_of_one_name_bear_their_paths(made, tmp_path):
    other = shutil.copytree(made / "plane", tmp_path / "plane")
    (legend,) = pictures.curves(made / "plane", other).legends
    assert [text.get_text() for text in legend.get_texts()] == [str(made / "plane"), str(other)]


# Codes


@pytest.mark.parametrize("name", RUNS)
def test_encode_gives_what_the_vae_encodes(made, name):
    run, vae, images = opened(made, name)
    pictures.encode(run).save("latents.npz")
    arrays = dict(np.load("latents.npz"))
    q = vae.approximate_posterior(images.pixels)
    np.testing.assert_allclose(arrays.pop("mean"), q.mean, rtol=1e-4, atol=1e-6)
    if not vae.posterior.discrete:
        np.testing.assert_allclose(arrays.pop("scale"), q.stddev, rtol=1e-4)
    if images.labels is not None:
        np.testing.assert_array_equal(arrays.pop("labels"), images.labels)
    assert not arrays


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_the_size_of_batches_changes_nothing(made, monkeypatch, size):
    expected = pictures.encode(made / "five", split="validation")
    monkeypatch.setattr("pyrovae.runs.pictures.batches.BATCH", size)
    found = pictures.encode(made / "five", split="validation")
    torch.testing.assert_close(found.mean, expected.mean)
    torch.testing.assert_close(found.scale, expected.scale)


@pytest.mark.parametrize(("split", "n"), [("train", 64), ("validation", 32), ("test", 180), ("all", 1797)])
def test_encode_takes_each_split(made, split, n):
    assert pictures.encode(made / "plane", split=split).mean.shape == (n, 2)


def test_all_images_are_in_the_order_of_their_source(made):
    run, vae, _ = opened(made, "plane")
    everything = sources.read_digits(Path())
    latents = pictures.encode(run, split="all")
    assert torch.equal(latents.labels, everything.train.labels)
    torch.testing.assert_close(latents.mean[:9], vae.encode(everything.train.pixels[:9]))


def test_all_images_are_those_for_training_then_those_for_test(made):
    images = np.random.default_rng(0).random((5, 8, 8))
    np.savez("own.npz", images=images[:2], test_images=images[2:], labels=np.arange(2))
    latents = pictures.encode(made / "plane", data="own.npz")
    expected = runs.load(made / "plane").encode(torch.from_numpy(images).float())
    torch.testing.assert_close(latents.mean, expected)
    assert latents.labels is None  # of some images only is of none


def test_one_image_of_ones_own(made):
    np.save("own.npy", np.ones((1, 8, 8), dtype=bool))
    assert pictures.encode(made / "plane", data="own.npy").mean.shape == (1, 2)
    (axes,) = pictures.reconstruct(made / "plane", data="own.npy").axes
    assert shown(axes).shape == (17, 8)
    assert axes.get_title() == "images of own.npy and their reconstructions"
    assert len(pictures.latent(made / "plane", data="own.npy").axes[0].collections) == 1


def test_a_folder_is_resized_to_the_runs_shape(made):
    for name in "ab":
        Path("own", name).mkdir(parents=True)
        Image.fromarray(np.full((20, 30), 255, np.uint8)).save(f"own/{name}/image.png")
    latents = pictures.encode(made / "plane", data="own")
    expected = runs.load(made / "plane").encode(torch.ones(2, 1, 8, 8))
    torch.testing.assert_close(latents.mean, expected)
    assert latents.labels.tolist() == [0, 1]


def test_a_guide_without_a_known_scale_has_none(made, monkeypatch):
    class Scaleless(torch.distributions.Normal):
        stddev = property(lambda self: (_ for _ in ()).throw(NotImplementedError))

    monkeypatch.setattr(VAE, "approximate_posterior", lambda self, x, y: Scaleless(torch.zeros(len(x), 2), 1.0))
    assert pictures.encode(made / "plane").scale is None


# Commands


@pytest.mark.parametrize(
    "args",
    [
        "reconstruct plane --images 3 --split test",
        "reconstruct colours --which last",
        "sample plane -n 9 --seed 1",
        "sample bits -n 4",
        "interpolate five --between 1,0 --steps 3",
        "interpolate plane --corners 0,1,2,3 --steps 3",
        "manifold plane --steps 3",
        "manifold five --dims 2 --image 0",
        "latent plane --limit 5",
        "latent five --tsne --split test",
        "latent line",
        "curves plane",
    ],
)
def test_a_picture_command_leaves_its_file(made, args):
    command, name, *options = args.split()
    run = shutil.copytree(made / name, "run")
    printed = check_works(command, run, *options).strip()
    assert Path(printed) == Path("run/figures") / f"{command}.png"
    with Image.open(printed) as image:
        assert np.asarray(image.convert("L")).std() > 0
    for dpi in (100, 50):  # the second replaces the first
        assert check_works(command, run, *options, "--out", "new/a.jpg", "--dpi", dpi) == "new/a.jpg\n"
    with Image.open(printed) as image, Image.open("new/a.jpg") as smaller:
        np.testing.assert_allclose(smaller.size, np.divide(image.size, 2), atol=1)


def test_curves_of_several_runs_do_not_replace_those_of_one(run, made):
    assert check_works("curves", run, made / "five") == "run/figures/curves-overlaid.png\n"


def test_encode_replaces_only_its_own_file(run):
    for _ in range(2):
        assert check_works("encode", run, "--split", "test") == "run/latents.npz\n"
    assert np.load("run/latents.npz")["mean"].shape == (180, 2)
    np.savez("own.npz", images=np.zeros((3, 8, 8)))
    check_wrong_call("encode", run, "--data", "own.npz", "--out", "own.npz", naming="--out")
    check_works("encode", run, "--data", "own.npz", "--out", "own.npz", "--force")
    assert np.load("own.npz")["mean"].shape == (3, 2)


@pytest.mark.parametrize(
    ("args", "naming"),
    [
        ("reconstruct", "RUN"),
        ("reconstruct missing", "missing"),
        ("curves", "RUN"),
        ("curves run missing", "missing"),
        ("curves run run", "twice"),
        ("reconstruct run --images 0", "--images"),
        ("reconstruct run --split nonsense", "--split"),
        ("reconstruct run --data missing.npz", "--data"),
        ("reconstruct run --which first", "--which"),
        ("sample run -n 0", "n from 1"),
        ("sample run -n 1000000", "n from 1"),
        ("sample run --seed -1", "--seed"),
        ("sample run --dpi 0", "--dpi"),
        ("sample run --out codes.npz", "--out"),
        ("sample run --out picture", "--out"),
        ("sample run --out run/config.json", "--out"),
        ("sample run --out run/config.json/picture.png", "--out"),
        ("interpolate run --between 0", "--between"),
        ("interpolate run --between 0,32", "--between"),
        ("interpolate run --between -1,0", "--between"),
        ("interpolate run --between a,b", "--between"),
        ("interpolate run --corners 0,1", "--corners"),
        ("interpolate run --corners 0,1,2,99", "--corners"),
        ("interpolate run --between 0,1 --corners 0,1,2,3", "--between"),
        ("interpolate run --steps 1", "--steps"),
        ("manifold run --steps 1", "--steps"),
        ("manifold run --dims 1", "--dims"),
        ("manifold run --image 1", "--image"),
        ("latent run --tsne", "--tsne"),
        ("latent run --limit 0", "--limit"),
        ("encode run --out codes.png", "--out"),
        ("encode run --out run/config.json/codes.npz", "--out"),
        ("encode run --split nonsense", "--split"),
    ],
)
@pytest.mark.usefixtures("run")
def test_a_wrong_call_is_one_line(args, naming):
    check_wrong_call(*args.split(), naming=naming)


@pytest.mark.parametrize(
    ("args", "naming"),
    [
        ("manifold five --dims 6", "--dims"),
        ("manifold five --image 32", "--image"),
        ("manifold bits", "bits"),
        ("interpolate bits", "bits"),
    ],
)
def test_a_call_that_does_not_suit_the_run_is_one_line(made, args, naming):
    command, name, *options = args.split()
    check_wrong_call(command, made / name, *options, naming=naming)


@pytest.mark.parametrize("command", ["reconstruct", "sample", "interpolate", "manifold", "latent", "encode"])
def test_a_damaged_checkpoint_is_one_line(run, command):
    (run / "best.pt").write_bytes(b"damaged")
    check_wrong_call(command, run, naming=str(run / "best.pt"))


@pytest.mark.parametrize("contents", [None, "", "{}\n"])
def test_metrics_that_are_none_are_one_line(run, contents):
    path = run / "metrics.jsonl"
    path.unlink() if contents is None else path.write_text(contents)
    check_wrong_call("curves", run, naming=str(path))


@pytest.mark.parametrize("command", ["reconstruct", "latent", "encode"])
@pytest.mark.parametrize("images", [numbered(3, channels=1), torch.rand(3, 3, 8, 8)])
def test_images_of_another_shape_are_one_line(run, command, images):
    np.save("own.npy", images.movedim(1, -1).numpy())
    check_wrong_call(command, run, "--data", "own.npy", naming="expected images of 1x8x8")


@pytest.mark.parametrize(("n", "options"), [(1, []), (3, ["--tsne"])])
def test_too_few_images_for_a_projection_are_one_line(made, n, options):
    np.save("own.npy", np.zeros((n, 8, 8)))
    check_wrong_call("latent", made / "five", "--data", "own.npy", *options, naming="at least")


def test_cuda_without_cuda_is_one_line(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_wrong_call("sample", run, "--cuda", naming="cuda")


def test_a_run_whose_data_have_gone_is_one_line(made):
    run = Path(shutil.copytree(made / "colours", "run"))
    config = (run / "config.json").read_text()
    (run / "config.json").write_text(config.replace("colours.npz", "gone.npz"))
    check_wrong_call("reconstruct", run, naming="gone.npz")
    assert CliRunner().invoke(main, ["sample", "run"]).exit_code == 0  # which needs no data
    assert call("reconstruct", run, "--data", made / "colours.npz").exit_code == 0

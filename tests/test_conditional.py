"""The conditional VAE: the class behind pixels and latents, its evidence, what it learns, and its pictures."""

import json
import math
from pathlib import Path

import numpy as np
import pyro.poutine as poutine
import pytest
import torch
from torch import Tensor, nn

from pyrovae import runs
from pyrovae.data import Images, load_dataset
from pyrovae.evaluation import annealed, importance_weighted, naive
from pyrovae.likelihoods import LIKELIHOODS
from pyrovae.networks import NETWORKS, ClassPlanes
from pyrovae.runs import assessment, pictures
from pyrovae.runs.assessment import Examination
from pyrovae.runs.config import Config
from pyrovae.training import fit
from pyrovae.vae import VAE
from tests.test_cli import TINY, check_works, check_wrong_call
from tests.test_figures import tile

pytestmark = pytest.mark.usefixtures("no_figures")

CLASSES, SHAPE = 3, (2, 4, 4)
D = math.prod(SHAPE)
LABELS = torch.tensor([0, 2, 1, 2, 2])


@pytest.fixture
def conditional(make_vae):
    """make(**settings) -> a VAE of CLASSES classes for images of SHAPE."""

    def make(**settings) -> VAE:
        hidden = {} if settings.get("network") == "cnn" else {"hidden": (16,)}
        return make_vae(SHAPE, 17, CLASSES, conditional=True, **hidden | settings)

    return make


def pixels(n: int = len(LABELS)) -> Tensor:
    return torch.rand(n, *SHAPE)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_the_class_stands_behind_what_is_observed(conditional, likelihood):
    vae = conditional(likelihood=likelihood)
    x = vae.observe(pixels().flatten(1), LABELS)
    observed, y = vae.split(x)
    assert (observed.shape, y.shape) == ((5, D), (5, CLASSES))
    assert torch.equal(y.argmax(-1), LABELS)
    assert (y.sum(-1) == 1).all()
    assert observed.dtype == vae.likelihood.observe(pixels().flatten(1)).dtype


def test_others_do_not_look_at_labels(make_vae):
    vae = make_vae(likelihood="gaussian")
    images = torch.rand(5, 64)
    x = vae.observe(images, LABELS)
    assert torch.equal(x, images)
    assert vae.split(x)[1] is None
    assert torch.equal(vae.reconstruct(images), vae.reconstruct(images, LABELS))


def test_the_model_and_the_guide_are_those_of_the_class(conditional):
    vae = conditional(likelihood="gaussian")
    x = vae.observe(pixels().flatten(1), LABELS)
    y = nn.functional.one_hot(LABELS, CLASSES).float()
    guide = poutine.trace(vae.guide).get_trace(x)
    model = poutine.trace(poutine.replay(vae.model, guide)).get_trace(x)
    z = guide.nodes["z"]["value"]
    loc = vae.decoder(torch.cat([z, y], -1)).squeeze(-1).sigmoid()
    expected = torch.distributions.Normal(loc, 0.05**0.5).log_prob(x[:, :D]).sum(-1)
    torch.testing.assert_close(model.nodes["x"]["fn"].log_prob(x[:, :D]), expected)
    torch.testing.assert_close(guide.nodes["z"]["fn"].mean, vae.posterior(torch.cat([x[:, :D], y], -1)).mean)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("guide", ["mean-field", "bernoulli-code"])
def test_every_parameter_receives_gradient(conditional, network, guide):
    vae = conditional(network=network, guide=guide)
    estimator = Config(guide=guide, estimator="rloo" if vae.posterior.discrete else "elbo", particles=2)
    draws = estimator.make_estimator().draws(*vae.pair, vae.observe(pixels().flatten(1), LABELS))
    estimator.make_estimator().surrogate(draws).sum().backward()
    for name, parameter in vae.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
    for layer in (vae.posterior.encoder.body, vae.decoder.body):  # also that of each class present
        weight = next(layer.parameters()).grad
        assert (
            weight[:, -CLASSES:].flatten(2).any(-1).any(0).all()
            if weight.dim() > 2
            else weight[:, -CLASSES:].any()
        )


def test_planes_of_the_class_are_constant():
    image, y = pixels(2), torch.eye(CLASSES)[:2]
    seen = ClassPlanes(SHAPE)(torch.cat([image.flatten(1), y], -1))
    assert torch.equal(seen[:, :2], image)
    assert torch.equal(seen[:, 2:], y[:, :, None, None].expand(-1, -1, 4, 4))


@pytest.mark.parametrize(
    "labels", [None, torch.tensor([0, 1, 2, 3, 0]), torch.tensor([0, 1, 2, -1, 0])], ids=str
)
def test_wrong_labels_are_refused(conditional, labels):
    vae = conditional()
    for use in (vae.encode, vae.reconstruct):
        with pytest.raises(ValueError, match=r"\Aexpected labels,? from 0 to 2.*, got (none|3|-1)\Z"):
            use(pixels(), labels)
    with pytest.raises(ValueError, match=r"\Aexpected labels,? from 0 to 2"):
        vae.sample(5, labels)


def test_weights_of_classes_stand_between_them(conditional):
    vae = conditional()
    z, ends = torch.randn(2), torch.eye(CLASSES)[:2]
    assert torch.equal(vae.decode(z, ends[0]), vae.decode(z, torch.tensor(0)))
    middle = vae.decode(z, ends.mean(0))
    assert not torch.equal(middle, vae.decode(z, ends[0]))


# Evidence


class Fixed(nn.Module):
    """A module that always gets the same class behind its input."""

    def __init__(self, module: nn.Module, y: Tensor):
        super().__init__()
        self.module, self.y = module, y

    def __getattr__(self, name):
        return super().__getattr__(name) if name in ("module", "y") else getattr(self.module, name)

    def forward(self, inputs):
        return self.module(torch.cat([inputs, self.y.expand(*inputs.shape[:-1], -1)], -1))


@pytest.mark.parametrize("estimate", [importance_weighted, naive, annealed])
def test_evidence_is_that_of_a_vae_of_the_class_alone(conditional, make_vae, estimate):
    """Its twin knows one class only, and gets the same noise."""
    vae = conditional(likelihood="gaussian")
    size = {"steps": 5, "chains": 3} if estimate is annealed else {"particles": 7}
    image = pixels().flatten(1)
    for label in range(CLASSES):
        y = torch.eye(CLASSES)[label]
        twin = make_vae(SHAPE, 17, likelihood="gaussian", hidden=(16,))
        twin.decoder, twin.posterior.encoder = Fixed(vae.decoder, y), Fixed(vae.posterior.encoder, y)
        twin.posterior.head = vae.posterior.head
        found = estimate(vae, vae.observe(image, torch.full((5,), label)), **size)
        torch.testing.assert_close(found.log_evidence, estimate(twin, image, **size).log_evidence)


def test_prior_samples_serve_images_of_all_classes(conditional):
    vae, image = conditional(likelihood="gaussian"), pixels().flatten(1)
    together = naive(vae, vae.observe(image, LABELS), particles=7).log_evidence
    for label in range(CLASSES):
        rows = label == LABELS
        alone = naive(vae, vae.observe(image[rows], LABELS[rows]), particles=7).log_evidence
        torch.testing.assert_close(together[rows], alone)


def test_an_assessment_says_that_it_is_given_the_class(tmp_path):
    config = Config(epochs=1, limit=(64, 32), hidden=(8,), conditional=True, figure_epochs=())
    run, _ = runs.train(config, out=tmp_path / "run")
    found = Examination(particles=5, limit=20).of_run(run)
    assert any("log p(x|y)" in note for note in found.notes)
    assert "log p(x|y)" in assessment.table(found)


# Training


def test_it_learns_what_the_class_says(conditional):
    """Class 0 is black, 1 grey and 2 white: nothing is left for z to say."""
    labels = torch.arange(60) % CLASSES
    images = Images((labels / 2)[:, None, None, None].expand(-1, *SHAPE).clone(), labels)
    vae = conditional(likelihood="gaussian")
    result = fit(vae, images, images, epochs=40, batch_size=20, lr=5e-2, quiet=True)
    shown = vae.sample(3, torch.tensor([0, 1, 2]), seed=0)
    torch.testing.assert_close(shown.mean((1, 2, 3)), torch.tensor([0.0, 0.5, 1.0]), atol=0.1, rtol=0)
    assert result.history[-1]["kl"] < 0.5


def test_a_resumed_run_is_the_same(tmp_path):
    config = Config(epochs=2, limit=(64, 32), hidden=(8,), conditional=True, figure_epochs=())
    whole, _ = runs.train(config, out=tmp_path / "whole")
    half, _ = runs.train(Config(**config.to_json() | {"epochs": 1}), out=tmp_path / "half")
    runs.resume(half, changes={"epochs": 2})
    states = (runs.load(run, which="last").state_dict() for run in (whole, half))
    for a, b in zip(*(state.values() for state in states), strict=True):
        assert torch.equal(a, b)


def test_images_without_labels_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("images.npy", np.zeros((40, 4, 4), dtype=np.uint8))
    check_wrong_call("train", "-d", "images.npy", "--conditional", naming="--conditional")
    assert load_dataset("images.npy").classes == 0
    np.savez("negative.npz", images=np.zeros((40, 4, 4), dtype=np.uint8), labels=np.full(40, -1))
    check_wrong_call("train", "-d", "negative.npz", "--conditional", naming="--conditional")


# Pictures and commands


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A tiny conditional run; not to be changed."""
    place = tmp_path_factory.mktemp("conditional") / "run"
    config = Config(epochs=1, limit=(64, 32), hidden=(8,), conditional=True, figure_epochs=(1,))
    return runs.train(config, out=place)[0]


def test_samples_are_a_row_for_each_class(run):
    (axes,) = pictures.sample(run, n=20).axes
    assert [text.get_text() for text in axes.get_yticklabels()] == [str(y) for y in range(10)]
    vae = runs.load(run)
    z = vae.draw(2, seed=0)
    for y in (0, 7):
        for column in range(2):
            image = vae.decode(z[column], torch.tensor(y))[0]
            torch.testing.assert_close(tile(axes, y, column, 8, 8).reshape(8, 8), image, rtol=0, atol=1e-5)


def test_samples_of_one_class(run):
    (axes,) = pictures.sample(run, n=4, digit=7).axes
    expected = runs.load(run).sample(4, torch.full((4,), 7), seed=0)
    for k, image in enumerate(expected):
        torch.testing.assert_close(tile(axes, *divmod(k, 2), 8, 8).reshape(8, 8), image[0], rtol=0, atol=1e-5)


def test_a_manifold_is_of_one_class(run):
    one, other = (
        pictures.manifold(run, steps=3, digit=digit).axes[0].images[0].get_array() for digit in (1, 8)
    )
    assert not np.array_equal(one, other)


def test_an_interpolation_changes_the_class_with_the_code(run):
    (axes,) = pictures.interpolate(run, between=(0, 1), steps=3).axes
    vae, images = runs.load(run), runs.read_config(run)[0].make_dataset().validation[:2]
    ends = vae.reconstruct(images.pixels, images.labels)
    for column, image in ((1, ends[0]), (3, ends[1])):
        torch.testing.assert_close(tile(axes, 0, column, 8, 8).reshape(8, 8), image[0], rtol=0, atol=1e-5)


def test_commands_take_a_class(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_works("sample", run, "--digit", "7", "--out", "seven.png")
    check_works("sample", run, "--class", "7", "--out", "again.png")
    assert Path("seven.png").read_bytes() == Path("again.png").read_bytes()
    check_wrong_call("sample", run, "--digit", "10", naming="--digit")
    check_wrong_call("manifold", run, "--digit", "-1", naming="--digit")
    np.savez("unlabelled.npz", images=np.zeros((40, 8, 8), dtype=np.uint8))
    check_wrong_call("encode", run, "--data", "unlabelled.npz", "--out", "z.npz", naming="labels")
    np.savez("others.npz", images=np.zeros((40, 8, 8), dtype=np.uint8), labels=np.full(40, 10))
    check_wrong_call("latent", run, "--data", "others.npz", "--out", "z.png", naming="labels from 0 to 9")


def test_a_class_needs_a_conditional_vae(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_works("train", *TINY, "--quiet", "-o", "run")
    check_wrong_call("sample", "run", "--digit", "7", naming="--digit")


def test_a_run_records_its_classes(run):
    contents = json.loads((run / "config.json").read_text())
    assert (contents["config"]["conditional"], contents["data"]["classes"]) == (True, 10)
    assert not (run / "figures" / "manifold.png").exists()  # of which class?


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16])
def test_labels_may_be_any_integers(conditional, dtype):
    vae, images = conditional(), pixels()
    assert torch.equal(vae.encode(images, LABELS.to(dtype)), vae.encode(images, LABELS))
    assert torch.equal(vae.split(vae.observe(images.flatten(1), LABELS.to(dtype)))[1].argmax(-1), LABELS)


def test_weights_of_classes_are_no_observation(conditional):
    with pytest.raises(
        ValueError,
        match=r"\Aexpected integer labels, got torch\.float32: take labels\.argmax\(-1\) of weights\Z",
    ):
        conditional().observe(pixels().flatten(1), torch.eye(CLASSES)[LABELS])


def test_other_labels_are_other_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images, labels = np.zeros((60, 4, 4), dtype=np.uint8), np.arange(60) % 3
    np.savez("data.npz", images=images, labels=labels)
    settings = {"dataset": "data.npz", "epochs": 1, "hidden": (8,), "figure_epochs": ()}
    run, _ = runs.train(Config(**settings, conditional=True), out="run")
    plain, _ = runs.train(Config(**settings), out="plain")
    np.savez("data.npz", images=images, labels=labels[::-1].copy())
    check_wrong_call("train", "--resume", run, "-e", "2", naming="the data that run was trained on")
    check_wrong_call("evaluate", run, naming="the data that run was trained on")
    runs.resume(plain, changes={"epochs": 2})  # which does not look at labels


def test_a_folder_names_classes_of_its_own(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    check_wrong_call("encode", run, "--data", "images", "--out", "z.npz", naming="data")

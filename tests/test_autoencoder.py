"""The plain autoencoder, a composition like any other: its loss, what it has not, and it beside a VAE."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO

from pyrovae import figures, runs
from pyrovae.data import Images
from pyrovae.estimators import AnalyticKL, Elbo, Reconstruction
from pyrovae.evaluation.bounds import evaluate, pca_squared_error, squared_error
from pyrovae.runs import pictures
from pyrovae.runs.assessment import Examination
from pyrovae.runs.config import Config
from pyrovae.runs.laboratory import Measurement
from pyrovae.training import describe
from pyrovae.training.checkpoints import read_metrics
from tests.test_cli import TINY, check_works, check_wrong_call
from tests.test_figures import history

AUTOENCODER = {"guide": "point", "estimator": "reconstruction"}
OF_RUN = {"epochs": 2, "limit": (64, 32), "hidden": (16,), "likelihood": "gaussian", "figure_epochs": ()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An autoencoder and a VAE, tiny and on the same images; not to be changed."""
    place = tmp_path_factory.mktemp("runs")
    several = {
        "ae": AUTOENCODER,
        "vae": {},
        "five": {"latent_dim": 5},
        "line": {"latent_dim": 1},
        "others": {"held_out": 50},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyrovae.runs.training.draw_figures", lambda *args: None)
        for name, settings in several.items():
            runs.train(Config(**OF_RUN, **settings), out=place / name)
    return place


def test_its_objective_is_the_squared_error(make_vae):
    vae = make_vae(likelihood="gaussian", c=0.1, **AUTOENCODER)
    images = Images(torch.rand(7, 1, 8, 8))
    found = evaluate(vae, images, estimator=Reconstruction())
    expected = -squared_error(vae, images) / 0.2 - 32 * math.log(2 * math.pi * 0.1)
    assert found.bound == found.reconstruction == pytest.approx(expected, rel=1e-5)
    assert (found.kl, found.elbo) == (None, None)


def test_with_a_density_it_is_the_elbo_without_its_kl(make_vae):
    vae = make_vae()
    x = vae.observe(torch.rand(5, 64))
    torch.manual_seed(0)
    ours = Reconstruction(num_particles=3)
    draws = ours.draws(*vae.pair, x)
    elbo = AnalyticKL(num_particles=3)
    torch.testing.assert_close(ours.bound(draws), elbo.bound(draws) + elbo.kl(draws))


def test_there_is_no_kl_and_no_elbo(made):
    for row in read_metrics(made / "ae"):
        assert row["bound"] == row["reconstruction"]
        assert row["validation_bound"] == row["validation_reconstruction"]
        assert {row[name] for name in ("elbo", "kl", "validation_elbo", "validation_kl")} == {None}
        constant = 32 * math.log(2 * math.pi * 0.05)
        assert row["loss_without_constant"] == pytest.approx(-row["reconstruction"] - constant)
        assert "ELBO" not in describe(row)


def test_its_curves_are_those_that_there_are(made):
    assert len(pictures.curves(made / "ae").axes) == 1
    of_kl = pictures.curves(made / "ae", made / "vae").axes[2]
    assert len(of_kl.lines) == 2  # training and validation of the VAE
    nothing = figures.overlaid_curves({name: read_metrics(made / "ae") for name in "ab"})
    assert [axes.axison for axes in nothing.axes] == [False, True, False]
    assert [text.get_text() for text in nothing.legends[0].get_texts()] == ["a", "b"]
    assert len(figures.curves(history(3)).axes) == 3


@pytest.mark.parametrize("examine", [Examination(particles=2).of_run, Measurement(draws=16).of_run])
def test_it_has_no_evidence_and_no_gradient_of_a_bound(made, examine):
    with pytest.raises(ValueError, match=r"\Aexpected a VAE.*, got an autoencoder, [^\n]*\Z"):
        examine(made / "ae")


def test_its_codes_have_no_scale(made):
    codes = pictures.encode(made / "ae")
    assert (codes.scale, codes.mean.shape) == (None, (32, 2))


@pytest.mark.parametrize("setting", [{"beta": 2.0}, {"kl_warmup": 3}, {"use_rep": False}])
def test_what_means_nothing_is_refused(setting):
    with pytest.raises(ValueError, match=rf"\Aexpected {next(iter(setting))} "):
        Config(**AUTOENCODER, **setting)


@pytest.mark.usefixtures("no_figures")
def test_the_shorthand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_works("train", *TINY, "--autoencoder", "--quiet", "-o", "short")
    check_works("train", *TINY, "--guide", "point", "--estimator", "reconstruction", "--quiet", "-o", "long")
    short, long = (runs.read_config(tmp_path / name)[0] for name in ("short", "long"))
    assert short == long
    check_wrong_call("train", "--autoencoder", "--guide", "mean-field", naming="--guide point")
    check_wrong_call("train", "--autoencoder", "--estimator", "elbo", naming="--estimator reconstruction")
    check_wrong_call("train", "--guide", "point", naming="'reconstruction'")
    check_wrong_call("sweep", "--autoencoder", "--over", "guide=mean-field,point", naming="guide point")
    check_wrong_call("evaluate", "short", naming="side-by-side")
    check_wrong_call("variance", "short", naming="autoencoder")


def test_a_point_with_a_density_of_its_own_is_no_autoencoder():
    """As Pyro's users write a guide whose sample and density they know."""
    loc = torch.nn.Parameter(torch.zeros(5, 2))

    def model(x):
        with pyro.plate("data", 5):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x, known=True):
        with pyro.plate("data", 5):
            q = dist.Normal(loc, 1.0).to_event(1)
            z = q.rsample()
            density = {"log_density": q.log_prob(z)} if known else {}
            pyro.sample("z", dist.Delta(z, event_dim=1, **density))

    x = torch.randn(5, 2)
    losses = []
    for estimator in (Elbo(), Trace_ELBO()):
        pyro.set_rng_seed(0)
        losses.append(estimator.loss_and_grads(model, guide, x))
    assert losses[0] == pytest.approx(losses[1])
    with pytest.raises(ValueError, match=r"\Aexpected a guide with a density for Elbo"):
        Elbo().loss(model, lambda x: guide(x, known=False), x)


# Reconstruction errors


def test_principal_components_leave_the_smallest_eigenvalues(made):
    dataset = runs.read_config(made / "vae")[0].make_dataset()
    x = dataset.train.pixels.flatten(1).double()
    eigenvalues = torch.linalg.eigvalsh((x - x.mean(0)).T @ (x - x.mean(0)) / len(x))
    for components in (1, 5):
        found = pca_squared_error(dataset.train, dataset.train, components)
        assert found == pytest.approx(eigenvalues[:-components].sum().item(), rel=1e-6)
    assert pca_squared_error(dataset.train, dataset.train, 1000) == pytest.approx(0, abs=1e-10)


def test_errors_stand_beside_those_of_principal_components(made):
    errors = pictures.reconstruction_errors(made / "ae", made / "vae", made / "five")
    dataset = runs.read_config(made / "vae")[0].make_dataset()
    assert list(errors) == ["ae", "vae", "five", "PCA, 2 components", "PCA, 5 components"]
    assert errors["ae"] == squared_error(runs.load(made / "ae"), dataset.validation)
    assert errors["PCA, 2 components"] == pca_squared_error(dataset.train, dataset.validation, 2)
    of_test = pictures.reconstruction_errors(made / "ae", made / "vae", split="test")
    assert list(of_test) == ["autoencoder", "VAE", "PCA, 2 components"]
    assert of_test["autoencoder"] == squared_error(runs.load(made / "ae"), dataset.test)


# Side by side


def test_side_by_side_shows_codes_on_one_scale_and_decoded_draws(made):
    figure = pictures.side_by_side(made / "ae", made / "vae")
    of_ae, decoded, of_vae, others, bars = figure.axes
    assert (of_ae.get_xlim(), of_ae.get_ylim()) == (of_vae.get_xlim(), of_vae.get_ylim())
    dataset = runs.read_config(made / "vae")[0].make_dataset()
    for axes, name in ((of_ae, "ae"), (of_vae, "vae")):
        vae = runs.load(made / name)
        points = np.concatenate([each.get_offsets() for each in axes.collections])
        codes = vae.encode(dataset.validation.pixels)
        np.testing.assert_allclose(np.sort(points, 0), np.sort(codes.numpy(), 0), atol=1e-6)
    for axes, name in ((decoded, "ae"), (others, "vae")):
        first = runs.load(made / name).sample(36, seed=0)[0, 0]
        np.testing.assert_allclose(axes.images[0].get_array()[:8, :8], first, atol=1e-6)
    errors = pictures.reconstruction_errors(made / "ae", made / "vae")
    assert [bar.get_width() for bar in bars.patches] == list(errors.values())


def test_side_by_side_of_more_dimensions(made, tmp_path):
    figure = pictures.side_by_side(made / "five", made / "ae")
    assert len(figure.axes) == 5
    pictures.save(figure, tmp_path / "figure.png")


def test_what_cannot_stand_side_by_side(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = "side-by-side"
    check_wrong_call(command, made / "ae", naming="two runs")
    check_wrong_call(command, made / "ae", made / "ae", naming="none twice")
    check_wrong_call(command, made / "ae", made / "others", naming="the same images")
    check_wrong_call(command, made / "ae", made / "line", naming="2 latent dimensions")
    printed = check_works(command, made / "ae", made / "vae", "--out", "both.png")
    assert "PCA, 2 components" in printed
    assert (tmp_path / "both.png").exists()

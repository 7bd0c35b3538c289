"""Errors point to what is wrong: each message here once sent people another way, or to nothing at all."""

import math
import shutil
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from pyrovae import runs
from pyrovae.cli.group import main
from pyrovae.cli.messages import less_memory
from pyrovae.data import Images, load_dataset
from pyrovae.guides import make_guide
from pyrovae.guides.checks import check_guide
from pyrovae.networks import MLP
from pyrovae.runs import pictures
from pyrovae.runs import sweeps as sweep
from pyrovae.runs.assessment import Examination
from pyrovae.runs.config import Config
from pyrovae.runs.pictures import codes, decoded
from pyrovae.training import checkpoints, fit

TINY = {"epochs": 1, "limit": (20, 10), "hidden": (2,), "figure_epochs": ()}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A run of one epoch; not to be changed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyrovae.runs.training.draw_figures", lambda *args: None)
        return runs.train(Config(**TINY), out=tmp_path_factory.mktemp("made") / "run")[0]


@pytest.fixture
def run(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


def said(call, kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as raised:
        call()
    return str(raised.value)


def encoder():
    return MLP(hidden=(2,)).encoder((1, 4, 4))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Config(lr=math.inf), "expected lr to be finite, got inf"),
        (lambda: Config(lr=math.nan), "expected lr > 0, got nan"),
        (lambda: Config(lr=0.0), "expected lr > 0, got 0.0"),
        (lambda: Config(beta=math.inf), "expected beta to be finite, got inf"),
        (lambda: Config(guide="student-t", df=math.inf), "expected df to be finite, got inf"),
        (lambda: make_guide("student-t", encoder(), 2, df=math.inf), "expected df to be finite, got inf"),
        (
            lambda: make_guide("refined", encoder(), 2, refine_lr=math.inf),
            "expected refine_lr to be finite, got inf",
        ),
        (lambda: Config(limit=(0, None)), "expected limit of at least 1 image, got 0"),
        (lambda: Config(limit=(5, 0)), "expected limit of at least 1 image, got 5/0"),
        (
            lambda: Config(likelihood="gaussian", c=math.inf),
            "expected c to be a finite variance > 0 or 'learned', got inf",
        ),
        (
            lambda: pictures.side_by_side("a", "b", split="all"),
            "expected split in train, validation, test, got 'all'",
        ),
        (
            lambda: check_guide(make_guide("mean-field", encoder(), 2), torch.rand(5, 1, 4, 4)),
            "expected x of shape (B, D), B >= 2, got (5, 1, 4, 4): flatten images with images.flatten(1)",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked")  # the errors are ours, not those of shapes
def test_settings_out_of_range(call, message):
    assert said(call) == message


def test_negative_labels_are_no_missing_labels(tmp_path):
    np.savez(tmp_path / "some.npz", images=np.zeros((20, 2, 2)), labels=np.arange(20) - 1)
    config = Config(dataset=str(tmp_path / "some.npz"), conditional=True)
    expected = "expected conditional with labels of 0 and up for every image, got images without such"
    assert said(lambda: runs.train(config, out=tmp_path / "run")) == expected


@pytest.mark.parametrize("error", [MemoryError("no more"), RuntimeError("CUDA out of memory. Tried 3 GiB")])
@pytest.mark.parametrize(
    ("command", "remedy"),
    [
        ("train", ": lower --batch-size or --limit"),
        ("evaluate", ": lower --batch-size or --limit or --ais"),
        ("reconstruct", ": lower --images"),
        ("sample", ": lower -n"),
        ("latent", ": lower --limit"),
        ("encode", ""),
    ],
)
def test_out_of_memory_names_options_that_the_command_has(monkeypatch, command, remedy, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(runs, "train", fail)
    for module in (decoded, codes):
        monkeypatch.setattr(module, "load", fail)
    monkeypatch.setattr(Examination, "of_run", fail)
    done = CliRunner().invoke(main, [command, *([] if command == "train" else ["run"])])
    assert (done.exit_code, done.stderr) == (1, f"Error: out of memory ({error}){remedy}\n")


def test_a_remedy_is_an_option_of_the_command():
    for name in ("train", "evaluate", "reconstruct", "sample", "latent", "encode"):
        command = main.get_command(click.Context(main), name)
        with click.Context(command):
            words = less_memory().replace(": lower ", "").split(" or ")
        assert set(filter(None, words)) <= {option for param in command.params for option in param.opts}


def test_an_array_that_does_not_fit_into_memory_is_no_matter_of_networks(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise MemoryError("Unable to allocate 7.28 TiB")

    np.savez(tmp_path / "huge.npz", images=np.zeros((20, 2, 2)))
    monkeypatch.setattr(np, "load", fail)
    message = said(lambda: load_dataset(str(tmp_path / "huge.npz")))
    assert message.startswith(
        f"expected {tmp_path / 'huge.npz'} to fit into memory, got: Unable to allocate 7.28 TiB"
    )
    assert message.endswith(": save its images alone as a .npy, which is read from the file batch by batch")


@pytest.mark.parametrize("name", ["latents.NPZ", "latents.npz"])
def test_codes_go_to_the_file_that_was_named(made, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    codes = pictures.Latents(torch.zeros(3, 2))
    codes.save(name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    done = CliRunner().invoke(main, ["encode", str(made), "--out", name])
    assert (done.exit_code, done.stderr) == (
        2,
        f"Error: expected --out that is not there yet, or --force to replace it, got {name}\n",
    )
    assert CliRunner().invoke(main, ["encode", str(made), "--out", name, "--force"]).exit_code == 0
    assert np.load(name)["mean"].shape == (10, 2)


def test_a_recipe_may_have_its_suffix_in_capitals(tmp_path):
    (tmp_path / "MINE.TOML").write_text("[train]\nlatent_dim = 3\n")
    assert sweep.read_recipe(str(tmp_path / "MINE.TOML")).config({}).latent_dim == 3


@pytest.mark.parametrize("device", ["cuda:99", "nonsense", "xla"])
def test_a_device_that_is_not_there(made, device):
    assert (
        said(lambda: runs.load(made, device=device)) == f"expected a device that PyTorch has here, got {device}"
    )


def test_a_run_without_a_whole_epoch_is_no_damaged_run(run):
    (run / "best.pt").unlink()
    best = run / "best.pt"
    expected = f"expected the best of at least one epoch in {best}, got no such file: resume the run first"
    assert said(lambda: runs.load(run)) == expected
    assert runs.load(run, which="last")
    (run / "checkpoint.pt").unlink()
    assert said(lambda: runs.load(run)) == f"expected a checkpoint at {run / 'best.pt'}, got no such file"


def test_settings_that_cannot_be_read_are_there(run):
    (run / "config.json").unlink()
    assert (
        said(lambda: runs.read_config(run)) == f"expected a run directory with config.json at {run}, got none"
    )
    (run / "config.json").mkdir()
    message = said(lambda: runs.read_config(run))
    assert message.startswith("expected a run directory whose config.json can be read, got: [Errno 21]")


def test_weights_of_another_model_are_named(run):
    state = torch.load(run / "best.pt", weights_only=True)
    del state["model"]["posterior.head.bias"]
    checkpoints.save_atomically(state, run / "best.pt")
    message = said(lambda: runs.load(run))
    assert message.endswith('got: RuntimeError Missing key(s) in state_dict: "posterior.head.bias".')


def test_no_memory_is_no_damaged_checkpoint(run):
    def load():
        with checkpoints.explained(run / "best.pt"):
            raise RuntimeError("CUDA out of memory. Tried to allocate 3 GiB")

    assert said(load, RuntimeError).startswith("CUDA out of memory")


def test_parameters_that_are_no_numbers_are_no_matter_of_the_learning_rate(made):
    vae = runs.load(made)
    images = Images(torch.rand(4, 1, 8, 8))
    with torch.no_grad():
        vae.posterior.head.bias[0] = math.nan
    expected = "expected a VAE of finite parameters, got others in posterior.head.bias: make it anew"
    assert said(lambda: fit(vae, images, images, epochs=1, quiet=True)) == expected

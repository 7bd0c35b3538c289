"""Training: what a run leaves, stops for, and continues from, bit for bit."""

import json
import math
import os
import pickle
import signal
import threading
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import pyrovae.training.checkpoints
import pyrovae.training.loop
import pyrovae.training.steps
from pyrovae import runs
from pyrovae.cli.group import main
from pyrovae.data import Images, files
from pyrovae.evaluation.bounds import bits_per_dim, evaluate, without_constant
from pyrovae.likelihoods import Bernoulli, Categorical, ContinuousBernoulli, Gaussian
from pyrovae.programs.graphs import CaptureWarning, Step
from pyrovae.runs.config import Config
from pyrovae.training import Bfloat16Layers, DivergedError, describe, fit
from pyrovae.training.checkpoints import CheckpointError, load_checkpoint, read_metrics, save_atomically
from tests import test_graphs
from tests.test_data import Bomb

pytestmark = pytest.mark.usefixtures("no_figures", "unchecked")  # the command line's tests have both

TINY = {"limit": (70, 20), "batch_size": 16, "hidden": (8,), "epochs": 4, "figure_epochs": (1,)}


def tensors_equal(a, b) -> bool:
    """Whether two checkpoints are the same to the last bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(tensors_equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(tensors_equal, a, b))
    return a == b


def contents(run: Path) -> tuple:
    """Everything in a run but the seconds that it took."""
    metrics = [{k: v for k, v in row.items() if k != "seconds"} for row in read_metrics(run)]
    last, best = (torch.load(run / file, weights_only=True) for file in ("checkpoint.pt", "best.pt"))
    del last["random"]["python"]  # beartype, which checks annotations in tests, draws from it
    return metrics, last, best


def assert_same_run(a: Path, b: Path) -> None:
    for ours, theirs in zip(contents(a), contents(b), strict=True):
        assert tensors_equal(ours, theirs)


@pytest.fixture
def interrupt(monkeypatch):
    """interrupt(step, number): raises a signal during that training step, counted from 1."""

    def arrange(at: int, number: signal.Signals = signal.SIGINT) -> None:
        original, taken = pyrovae.training.loop.Trainer._step, 0

        def step(trainer, *batch):
            nonlocal taken
            original(trainer, *batch)
            taken += 1
            if taken == at:
                signal.raise_signal(number)

        monkeypatch.setattr(pyrovae.training.loop.Trainer, "_step", step)

    return arrange


VARIANTS = {
    "stochastic bernoulli": {},
    "cnn with batch norm": {"hidden": None, "network": "cnn", "channels": (4, 4)},
    "warm-up, beta, particles": {"kl_warmup": 3, "beta": 2.0, "particles": 3},
    "learned c, analytic KL": {"likelihood": "gaussian", "c": "learned", "estimator": "analytic-kl"},
    "score function, patience": {"use_rep": False, "patience": 2, "epochs": 8},
    "running mean": {"estimator": "running-mean"},
    "learned baseline": {"estimator": "learned-baseline"},
    "codes in pairs": {"guide": "bernoulli-code", "estimator": "disarm", "particles": 4},
    "importance weights": {"estimator": "dreg", "particles": 3},
}


@pytest.mark.parametrize(
    ("variant", "at"),
    [
        *((variant, at) for variant in VARIANTS.values() for at in (5, 7)),
        *((VARIANTS["stochastic bernoulli"], at) for at in (1, 13)),
    ],
    ids=str,
)
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(tmp_path, interrupt, variant, at):
    config = Config(**TINY | variant)
    whole, _ = runs.train(config, out=tmp_path / "whole")
    interrupt(at)
    parts, result = runs.train(config, out=tmp_path / "parts")
    assert result.stopped_by == signal.SIGINT
    assert (result.progress.epoch, result.progress.batch) == divmod(at, 5)
    interrupt(3, signal.SIGTERM)  # and once more
    _, result = runs.resume(parts)
    assert result.stopped_by == signal.SIGTERM
    _, result = runs.resume(parts)
    assert result.progress.finished
    assert_same_run(whole, parts)


@pytest.fixture
def traced(monkeypatch):
    """Steps are captured, but nothing is compiled: the trace itself is run. No falling back."""
    monkeypatch.setattr(pyrovae.training.steps, "Step", partial(Step, backend=test_graphs.traced))
    with warnings.catch_warnings():
        warnings.simplefilter("error", CaptureWarning)
        yield


COMPILED = "cnn with batch norm", "warm-up, beta, particles", "learned baseline"


@pytest.mark.slow
@pytest.mark.parametrize("variant", COMPILED)
def test_a_compiled_run_is_the_same_up_to_rounding_and_resumes_bit_for_bit(
    tmp_path, interrupt, traced, variant
):
    config = Config(**TINY | VARIANTS[variant])
    plain, _ = runs.train(config, out=tmp_path / "plain")
    config = replace(config, compile="on")
    whole, _ = runs.train(config, out=tmp_path / "whole")
    for ours, theirs in zip(read_metrics(whole), read_metrics(plain), strict=True):
        numbers = {name for name, value in theirs.items() if value is not None} - {"seconds"}
        assert numbers == {name for name, value in ours.items() if value is not None} - {"seconds"}
        for name in numbers:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
    interrupt(7)
    parts, result = runs.train(config, out=tmp_path / "parts")
    assert result.stopped_by == signal.SIGINT
    runs.resume(parts)
    assert_same_run(whole, parts)


def test_the_default_compiles_long_runs_only_and_keeps_to_its_choice(tmp_path, interrupt, traced, monkeypatch):
    steps = 4 * 5
    for threshold, choice in ((steps, "on"), (steps + 1, "off")):
        monkeypatch.setattr("pyrovae.runs.training.LONG", threshold)
        interrupt(7)
        run, _ = runs.train(Config(**TINY), out=tmp_path / choice)
        assert runs.read_config(run)[0].compile == choice
        runs.resume(run, changes={"compile": "auto", "epochs": 5})
        assert runs.read_config(run)[0].compile == choice


def test_a_run_goes_on_in_another_mode_if_asked(tmp_path, interrupt, traced):
    interrupt(7)
    run, _ = runs.train(Config(**TINY, compile="on"), out=tmp_path / "run")
    _, result = runs.resume(run, changes={"compile": "off"})
    assert result.progress.finished
    assert runs.read_config(run)[0].compile == "off"


def test_what_cannot_be_compiled_trains_as_ever_with_one_warning(tmp_path, monkeypatch):
    def refuse(graph, inputs):
        raise RuntimeError("no compiler")

    plain, _ = runs.train(Config(**TINY, compile="off"), out=tmp_path / "plain")
    monkeypatch.setattr(pyrovae.training.steps, "Step", partial(Step, backend=refuse))
    with pytest.warns(CaptureWarning, match="runs uncompiled: no compiler") as warned:
        other, _ = runs.train(Config(**TINY, compile="on"), out=tmp_path / "other")
    assert len(warned) == 1
    for ours, theirs in zip(read_metrics(other), read_metrics(plain), strict=True):
        assert ours["elbo"] == pytest.approx(theirs["elbo"], rel=1e-5)


@pytest.mark.slow
def test_bfloat16_layers_train_to_nearly_the_same_and_keep_float32_parameters(tmp_path, traced):
    settings = TINY | {"compile": "on", "network": "cnn", "channels": (4,), "hidden": None, "kl_warmup": 2}
    plain, _ = runs.train(Config(**settings), out=tmp_path / "plain")
    lowered, _ = runs.train(Config(**settings, bf16=True), out=tmp_path / "lowered")
    ours, theirs = read_metrics(lowered)[-1], read_metrics(plain)[-1]
    assert ours["validation_elbo"] == pytest.approx(theirs["validation_elbo"], rel=0.01)
    assert ours["validation_elbo"] != theirs["validation_elbo"]
    parameters = torch.load(lowered / "best.pt", weights_only=True)["model"].values()
    assert {p.dtype for p in parameters} <= {torch.float32, torch.int64}


def test_bfloat16_layers_lower_products_and_nothing_else():
    layer, x = torch.nn.Linear(3, 2), torch.rand(4, 3)
    with Bfloat16Layers("cpu"):
        out, other = layer(x), x @ x.T
    low = torch.nn.functional.linear(x.bfloat16(), layer.weight.bfloat16(), layer.bias.bfloat16())
    assert out.dtype == torch.float32
    assert torch.equal(out, low.float())
    assert torch.equal(other, x @ x.T)
    out.sum().backward()
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("settings", [{}, {"kl_warmup": 2}, {"estimator": "iwae", "particles": 3}], ids=str)
def test_steps_replayed_on_the_gpu_are_those_run_there(tmp_path, settings):
    """Recorded, replayed, with a smaller last batch: the same metrics as uncompiled, and no falling back."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", CaptureWarning)
        results = [
            runs.train(Config(**TINY | settings, cuda=True, compile=mode), out=tmp_path / mode)[1]
            for mode in ("on", "off")
        ]
    for ours, theirs in zip(*(result.history for result in results), strict=True):
        assert ours["elbo"] == pytest.approx(theirs["elbo"], rel=1e-3)


@pytest.mark.parametrize("variant", ["stochastic bernoulli", "cnn with batch norm"])
def test_a_run_on_a_file_is_bit_identical_to_one_in_memory(tmp_path, interrupt, monkeypatch, variant):
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (150, 8, 8), dtype=np.uint8))
    config = Config(**TINY | VARIANTS[variant] | {"dataset": str(tmp_path / "images.npy")})
    in_memory, _ = runs.train(config, out=tmp_path / "in_memory")
    monkeypatch.setattr(files, "IN_MEMORY", 0)
    assert config.make_dataset().train.on_disk
    interrupt(7)
    from_file, result = runs.train(config, out=tmp_path / "from_file")
    assert result.stopped_by == signal.SIGINT
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("pyrovae-read")]
    runs.resume(from_file)
    assert_same_run(in_memory, from_file)


def test_another_seed_is_another_run(tmp_path):
    for seed in (0, 1):
        runs.train(Config(**TINY, seed=seed), out=tmp_path / str(seed))
    assert not tensors_equal(contents(tmp_path / "0")[1]["model"], contents(tmp_path / "1")[1]["model"])


def test_a_run_can_be_extended_as_if_it_had_been_longer(tmp_path):
    longer, _ = runs.train(Config(**TINY), out=tmp_path / "longer")
    extended, _ = runs.train(Config(**TINY | {"epochs": 2}), out=tmp_path / "extended")
    runs.resume(extended, changes={"epochs": 4})
    assert_same_run(longer, extended)
    assert runs.read_config(extended)[0].epochs == 4


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    run, _ = runs.train(Config(**TINY), out=tmp_path / "run")
    before = contents(run)
    _, result = runs.resume(run)
    assert result.progress.finished == "epochs"
    assert tensors_equal(before, contents(run))


def test_resume_refuses_fewer_epochs_than_were_done(tmp_path):
    run, _ = runs.train(Config(**TINY), out=tmp_path / "run")
    with pytest.raises(runs.RunError, match="expected epochs >= 4, which the run has done, got 3"):
        runs.resume(run, changes={"epochs": 3})
    assert runs.read_config(run)[0].epochs == 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_on_the_gpu_resumes_and_loads_on_the_cpu(tmp_path, interrupt):
    interrupt(7)
    run, _ = runs.train(Config(**TINY, cuda=True), out=tmp_path / "run")
    _, result = runs.resume(run)
    assert result.progress.finished
    assert runs.load(run).sample(2).device.type == "cpu"
    assert runs.load(run, device="cuda").sample(2).device.type == "cuda"


def test_resume_refuses_other_data(tmp_path):
    path = tmp_path / "images.npy"
    np.save(path, np.random.default_rng(0).random((40, 4, 4)))
    run, _ = runs.train(Config(dataset=str(path), epochs=1, hidden=(8,)), out=tmp_path / "run")
    np.save(path, np.random.default_rng(1).random((40, 4, 4)))
    with pytest.raises(runs.RunError, match="expected the data that"):
        runs.resume(run)


def test_fit_leaves_random_states_beta_and_signal_handlers_as_they_were(make_vae, interrupt):
    vae, images = make_vae(hidden=(8,), beta=2.0), Images(torch.rand(64, 1, 8, 8))
    state, handler = torch.get_rng_state(), signal.getsignal(signal.SIGINT)
    fit(vae, images, images, epochs=2, kl_warmup=5, quiet=True)
    interrupt(1)
    fit(vae, images, images, epochs=2, kl_warmup=5, quiet=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert signal.getsignal(signal.SIGINT) is handler
    assert vae.beta == 2.0


def test_denormal_numbers_count_as_zero_in_training_and_not_after_it(make_vae):
    vae, images, tiny, seen = make_vae(hidden=(8,)), Images(torch.rand(64, 1, 8, 8)), torch.tensor(1e-40), []
    fit(vae, images, images, epochs=1, on_epoch=lambda epoch: seen.append((tiny * 1.5).item()), quiet=True)
    assert seen == [0.0]
    assert (tiny * 1.5).item() > 0


def test_a_run_on_denormal_pixels_is_found_to_be_on_the_same_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("images.npz", images=np.full((90, 8, 8), 1e-40))
    options = ["-d", "images.npz", "-e", "1", "--hidden", "8", "-o", "run"]
    result = CliRunner().invoke(main, ["train", *options])
    assert result.exit_code == 0, result.output
    runs.resume("run", changes={"epochs": 2})


def test_a_warm_up_of_a_whole_beta_is_not_cut_to_whole_numbers(make_vae, traced):
    vae, images = make_vae(hidden=(8,), beta=2), Images(torch.rand(64, 1, 8, 8))
    result = fit(vae, images, images, epochs=2, batch_size=16, kl_warmup=4, compile=True, quiet=True)
    assert [row["beta"] for row in result.history] == [0.5, 1.0]
    assert all(math.isfinite(row["kl"]) for row in result.history)


def test_fit_runs_in_a_thread(make_vae):
    vae, images, results = make_vae(hidden=(8,)), Images(torch.rand(64, 1, 8, 8)), []
    thread = threading.Thread(target=lambda: results.append(fit(vae, images, images, epochs=1, quiet=True)))
    thread.start()
    thread.join()
    assert results[0].progress.finished == "epochs"


def test_a_signal_does_not_save_parameters_that_are_not_finite(tmp_path, interrupt, monkeypatch):
    """The step's loss is finite, its gradient is not: only the parameters show it."""
    step = pyrovae.training.loop.Trainer._step

    def spoiled(trainer, *batch):
        step(trainer, *batch)
        if trainer.progress.epoch == 1:
            trainer.vae.decoder.body[-1].bias.data.fill_(math.nan)

    monkeypatch.setattr(pyrovae.training.loop.Trainer, "_step", spoiled)
    interrupt(6)
    with pytest.raises(DivergedError, match=r"parameter decoder.*checkpoint\.pt keeps the state before"):
        runs.train(Config(**TINY), out=tmp_path / "run")
    state = load_checkpoint(tmp_path / "run" / "checkpoint.pt", "cpu")
    assert state["progress"]["epoch"] == 1
    assert all(value.isfinite().all() for value in state["model"].values())


def test_a_run_resumes_with_its_defaults_given_in_words_and_its_data_moved(tmp_path, interrupt, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("images.npy", np.random.default_rng(0).random((90, 8, 8)))
    interrupt(2)
    run, result = runs.train(Config(dataset="images.npy", epochs=1, batch_size=16), out="run")
    assert result.stopped_by
    moved = Path("images.npy").rename(tmp_path / "moved.npy")
    (tmp_path / "elsewhere").mkdir()
    (run / "figures").rmdir()
    run = run.resolve()
    monkeypatch.chdir("elsewhere")
    with pytest.raises(ValueError, match="expected dataset"):
        runs.resume(run)
    same = {"scale_head": "exp", "hidden": (300, 100, 10), "activation": "elu", "binarize": "stochastic"}
    _, result = runs.resume(run, changes={"dataset": str(moved), **same})
    assert result.progress.finished
    assert runs.read_config(run)[0].dataset == str(moved)


@pytest.mark.parametrize("name", ["epochs", "batch_size"])
def test_fit_refuses_nothing_to_do(make_vae, name):
    images = Images(torch.rand(8, 1, 8, 8))
    with pytest.raises(ValueError, match=f"expected {name} >= 1, got 0"):
        fit(make_vae(hidden=(8,)), images, images, quiet=True, **{name: 0})


@pytest.mark.parametrize("settings", [{"batch_size": 1}, {"limit": (1, 20)}], ids=str)
def test_batch_norm_of_one_image_is_refused_before_anything_is_written(tmp_path, settings):
    config = Config(**TINY | {"hidden": None, "network": "cnn"} | settings)
    with pytest.raises(ValueError, match=r"\AExpected more than 1 value per channel.*\Z"):
        runs.train(config, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Checkpoints


@pytest.mark.parametrize("written", [0, 10, 1000])
def test_a_torn_write_leaves_the_old_checkpoint(tmp_path, monkeypatch, written):
    path = tmp_path / "checkpoint.pt"
    save_atomically({"format": "old"}, path)

    def torn(state, file):
        file.write(os.urandom(written))
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(KeyboardInterrupt):
        save_atomically({"format": "new"}, path)
    assert torch.load(path, weights_only=True) == {"format": "old"}


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        lambda path: path.write_bytes(os.urandom(500)),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(pickle.dumps(Bomb(Path("executed")))),
        lambda path: torch.save({"a": 1}, path),
        lambda path: torch.save(torch.zeros(3), path),
        lambda path: torch.save({"format": "pyrovae checkpoint 0"}, path),
        lambda path: torch.save(torch.load(path, weights_only=True) | {"model": {}}, path),
        lambda path: path.unlink(),
    ],
    ids=["truncated", "noise", "empty", "dangerous", "foreign", "tensor", "old", "other model", "missing"],
)
def test_a_damaged_checkpoint_is_refused_in_one_line(tmp_path, monkeypatch, damage):
    monkeypatch.chdir(tmp_path)
    run, _ = runs.train(Config(**TINY | {"epochs": 1}), out=tmp_path / "run")
    damage(run / "checkpoint.pt")
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    for attempt in (lambda: runs.resume(run, changes={"epochs": 3}), lambda: runs.load(run, which="last")):
        with pytest.raises(CheckpointError, match=r"\Aexpected .*checkpoint.*checkpoint\.pt, got.*\Z"):
            attempt()
    assert not Path("executed").exists()
    assert before == {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    runs.load(run)


def test_metrics_with_a_torn_last_line_are_read_up_to_it(tmp_path):
    run, _ = runs.train(Config(**TINY | {"epochs": 2}), out=tmp_path / "run")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 3, "elbo"')
    assert [row["epoch"] for row in read_metrics(run)] == [1, 2]
    runs.resume(run, changes={"epochs": 3})
    assert [json.loads(line)["epoch"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_resume_refuses_to_go_on_without_the_metrics_so_far(tmp_path):
    run, _ = runs.train(Config(**TINY | {"epochs": 2}), out=tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    with pytest.raises(CheckpointError, match=r"expected the metrics of 2 epochs in .*, got 0"):
        runs.resume(run)


# What stops a run


@pytest.mark.parametrize(
    ("spoil", "term"),
    [
        (lambda vae: vae.posterior.head.bias.data.fill_(math.nan), "kl|reconstruction"),
        (lambda vae: vae.decoder.body[-1].bias.data.fill_(math.inf), "reconstruction"),
    ],
    ids=["nan in the guide", "inf in the decoder"],
)
def test_a_value_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path, spoil, term):
    config = Config(**TINY | {"figure_epochs": ()})
    dataset, vae = config.make_dataset(), config.make_vae((1, 8, 8), 17)

    with pytest.raises(DivergedError, match=rf"^({term}) became .* in epoch 3.*checkpoint.pt keeps"):
        fit(
            vae,
            dataset.train,
            dataset.validation,
            epochs=4,
            batch_size=16,
            directory=tmp_path,
            on_epoch=lambda epoch: spoil(vae) if epoch == 2 else None,
            quiet=True,
        )
    state = load_checkpoint(tmp_path / "checkpoint.pt", "cpu")
    assert state["progress"]["epoch"] == 2
    assert all(value.isfinite().all() for value in state["model"].values())
    assert len(read_metrics(tmp_path)) == 2


def test_patience_counts_epochs_since_the_best_and_keeps_the_best(tmp_path):
    run, result = runs.train(Config(**TINY | {"epochs": 300, "patience": 3, "lr": 0.05}), out=tmp_path / "run")
    objectives = [row["validation_elbo"] for row in read_metrics(run)]
    best = max(range(len(objectives)), key=objectives.__getitem__)
    assert result.progress.finished == "patience"
    assert result.progress.best_epoch == best + 1
    assert len(objectives) == best + 1 + 3
    assert torch.load(run / "best.pt", weights_only=True)["epoch"] == best + 1


def test_model_selection_never_sees_the_test_images(tmp_path, monkeypatch):
    make_dataset = Config.make_dataset

    def poisoned(config):
        dataset = make_dataset(config)
        dataset.test.pixels.fill_(math.nan)
        return dataset

    config = Config(**TINY)
    clean, _ = runs.train(config, out=tmp_path / "clean")
    monkeypatch.setattr(Config, "make_dataset", poisoned)
    other, _ = runs.train(config, out=tmp_path / "poisoned")
    assert_same_run(clean, other)


@pytest.mark.parametrize(
    ("images", "batch_size", "sizes"),
    [
        (40, 16, [16, 16, 8]),
        (33, 16, [16, 17]),
        (32, 16, [16, 16]),
        (3, 1, [1, 1, 1]),
        (1, 16, [1]),
        (5, 8, [5]),
    ],
)
def test_batches_cover_the_images_and_none_is_left_with_one(make_vae, monkeypatch, images, batch_size, sizes):
    train, seen = Images(torch.arange(images * 64.0).reshape(images, 1, 8, 8) / (images * 64)), []
    step = pyrovae.training.loop.Trainer._step

    def recorded(trainer, pixels, labels):
        seen.append(pixels)
        step(trainer, pixels, labels)

    monkeypatch.setattr(pyrovae.training.loop.Trainer, "_step", recorded)
    fit(make_vae(hidden=(8,)), train, train, epochs=1, batch_size=batch_size, quiet=True)
    assert [len(pixels) for pixels in seen] == sizes
    order = torch.cat(seen)[:, 0].argsort()
    assert torch.equal(torch.cat(seen)[order], train.pixels.flatten(1))


# What is measured


def test_warm_up_is_linear_in_the_step_and_ends_at_beta(make_vae, monkeypatch):
    vae, images, betas = make_vae(hidden=(8,), beta=2.0), Images(torch.rand(40, 1, 8, 8)), []
    step = pyrovae.training.loop.Trainer._step

    def recorded(trainer, *batch):
        step(trainer, *batch)
        betas.append(vae.beta)

    monkeypatch.setattr(pyrovae.training.loop.Trainer, "_step", recorded)
    fit(vae, images, images, epochs=3, batch_size=10, kl_warmup=2, quiet=True)
    assert betas == pytest.approx([2 * min(1, (i + 1) / 8) for i in range(12)])


def test_a_tighter_bound_stands_beside_the_elbo_and_chooses_the_best_epoch(tmp_path):
    config = Config(**TINY | {"estimator": "iwae", "particles": 20})
    run, result = runs.train(config, out=tmp_path / "run")
    rows = read_metrics(run)
    assert all(row["validation_bound"] > row["validation_elbo"] and row["bound"] > row["elbo"] for row in rows)
    assert rows[result.progress.best_epoch - 1] == max(rows, key=lambda row: row["validation_bound"])
    assert "bound" in describe(rows[0])


def test_reported_terms_do_not_depend_on_beta(make_vae):
    """One step of an epoch's metrics, before any update has had an effect, at two betas."""
    images, rows = Images(torch.rand(16, 1, 8, 8).round()), []
    for beta in (1.0, 5.0):
        vae = make_vae(hidden=(8,), beta=beta)
        rows.append(fit(vae, images, images, epochs=1, batch_size=16, lr=1e-12, quiet=True).history[0])
    for term in (
        "elbo",
        "reconstruction",
        "kl",
        "validation_elbo",
        "validation_reconstruction",
        "validation_kl",
    ):
        assert rows[0][term] == pytest.approx(rows[1][term], rel=1e-5)
    assert rows[0]["elbo"] == pytest.approx(rows[0]["reconstruction"] - rows[0]["kl"], rel=1e-5)


def test_a_gaussian_loss_without_constant_is_sse_over_2c_plus_kl(make_vae):
    vae, x = (
        make_vae(likelihood="gaussian", c=0.3, hidden=(8,)).double(),
        torch.rand(10, 64, dtype=torch.float64),
    )
    result = evaluate(vae, Images(x.reshape(10, 1, 8, 8)), seed=3)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(3)
        q = vae.posterior(x)
        z = q.rsample()
        sse = ((vae.likelihood.mean(vae.decoder(z)) - x) ** 2).sum(-1)
        prior = torch.distributions.Normal(z.new_zeros(()), 1.0)
        kl = q.log_prob(z) - prior.log_prob(z).sum(-1)
    assert without_constant(vae.likelihood, result.bound, 64) == pytest.approx(
        (sse / 0.6 + kl).mean().item(), rel=1e-10
    )


def test_bits_per_dimension_of_a_uniform_categorical_are_log2_levels():
    uniform = -64 * math.log(17)
    assert bits_per_dim(Categorical(levels=17), uniform, 64) == pytest.approx(math.log2(17))
    for other in (Gaussian(), ContinuousBernoulli(), Bernoulli(binarize="soft")):
        assert bits_per_dim(other, uniform, 64) is None


def test_evaluation_is_repeatable_and_touches_no_random_state(make_vae):
    vae, images = make_vae(hidden=(8,)), Images(torch.rand(30, 1, 8, 8))
    state = torch.get_rng_state()
    assert evaluate(vae, images, seed=1) == evaluate(vae, images, seed=1)
    assert evaluate(vae, images, seed=1) != evaluate(vae, images, seed=2)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("which", ["best", "last"])
def test_load_gives_back_what_was_trained(tmp_path, which):
    run, _ = runs.train(Config(**TINY), out=tmp_path / "run")
    vae = runs.load(run, which=which)
    file = {"best": "best.pt", "last": "checkpoint.pt"}[which]
    assert tensors_equal(dict(vae.state_dict()), torch.load(run / file, weights_only=True)["model"])
    assert not vae.training
    with pytest.raises(ValueError, match="expected which in best, last"):
        runs.load(run, which="worst")


def test_training_on_mnist_improves(mnist_dir, tmp_path):
    config = Config(dataset="mnist", data_dir=str(mnist_dir), limit=(2000, 500), hidden=(64,), epochs=3)
    run, _ = runs.train(config, out=tmp_path / "run")
    elbo = [row["validation_elbo"] for row in read_metrics(run)]
    assert elbo[2] > elbo[1] > elbo[0]
    assert elbo[2] > -250  # a decoder that knows nothing gives -784 log 2 = -543

"""Training by two processes: the gradients of one, one directory, and one end for all.

Most checks share one pair of processes: `work` is what each of them does, and the tests judge what they left.
"""

import contextlib
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from pyrovae import runs
from pyrovae.cli.group import main
from pyrovae.data import Images
from pyrovae.programs.graphs import Step
from pyrovae.runs.config import Config
from pyrovae.runtime import distributed
from pyrovae.training import DivergedError, Trainer, fit, steps
from pyrovae.training.checkpoints import load_checkpoint, read_metrics
from pyrovae.training.progress import Fit
from tests.test_graphs import traced
from tests.test_training import tensors_equal

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_figures", "unchecked")]

ROOT = Path(__file__).parent.parent
TINY = {"limit": (67, 20), "batch_size": 16, "hidden": (8,), "epochs": 4, "figure_epochs": ()}
# Five batches, the last of 3 images. Without noise, so that one process and two compute the same.
STILL = TINY | {"guide": "bernoulli-code", "estimator": "enumerate", "binarize": "threshold"}
NOISY = TINY | {"estimator": "learned-baseline"}
COMPILED = NOISY | {"compile": "on"}
IN_PARTS = {"still": STILL, "noisy": NOISY, "compiled": COMPILED}
ENDLESS = ["--limit", "500/50", "-b", "16", "--hidden", "8", "-e", "9999", "--figure-epochs", ""]
ENDLESS += ["--compile", "off"]  # to begin with an epoch sooner
SIZES = 8, 5, 3, 2, 1  # of a whole batch; for two processes also of unlike shards, and an empty one
OF_GRADIENTS = {  # settings without noise
    "enumerated codes": {"guide": "bernoulli-code", "estimator": "enumerate", "binarize": "threshold"},
    "autoencoder": {"guide": "point", "estimator": "reconstruction", "likelihood": "gaussian"},
}
CASES = [(name, size, False) for name in OF_GRADIENTS for size in SIZES]
CASES += [("autoencoder", size, True) for size in (5, 3, 1)]  # name, size, whether compiled


# What each process does


def work(directory: Path) -> None:
    """All checks of one process, in order; what they find goes to a file."""
    torch.set_num_threads(1)
    runs.training.draw_figures = lambda *args: None
    steps.Step = partial(Step, backend=traced)  # to compile takes seconds
    with distributed.joined():
        rank, found = distributed.rank(), {}
        found["gradients"] = {case: gradients(*case) for case in CASES}
        for compile in (False, True):
            found["unlike weights", compile] = gradients("autoencoder", 8, compile, unlike=True)
        found["directory"], found["whole"] = runs.train(Config(**STILL))
        runs.train(Config(**NOISY), out="noisy-whole")
        runs.train(Config(**COMPILED), out="compiled-whole")
        for name, config in IN_PARTS.items():
            with interrupted(7, of_rank=1):
                _, result = runs.train(Config(**config), out=name)
            found[name] = result.progress, result.stopped_by
        distributed.from_first(lambda: shutil.copytree("still", "still-for-one"))
        distributed.from_first(lambda: shutil.copytree("noisy", "noisy-for-one"))
        runs.resume("noisy")
        runs.resume("compiled")
        runs.resume("of-one")
        found["patience"] = runs.train(
            Config(**TINY | {"epochs": 300, "patience": 2, "lr": 0.05}), out="patience"
        )[1]
        found["diverged"] = diverge()
        for estimator in ("running-mean", "learned-baseline"):
            found[estimator] = adapted(estimator)
        small = ["--limit", "67/20", "-b", "16", "--hidden", "8", "-e", "3", "--figure-epochs", ""]
        with interrupted(2, of_rank=1):
            found["stopped"] = command("train", *small, "-o", "stopped")
        found["refused"] = command("train", *small, "-o", "taken")
        torch.save(found, directory / f"{rank}.pt")
        os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"  # another attempt, which says anew what failed
        main(["train", *ENDLESS, "-o", "killed"])


def gradients(name: str, size: int, compile: bool = False, *, unlike: bool = False) -> list[torch.Tensor]:
    """Of a batch of this size, the only one of an epoch; `unlike`: from other weights in the second process."""
    config = Config(hidden=(8,), latent_dim=3, **OF_GRADIENTS[name])
    torch.manual_seed(1)
    images = Images(torch.rand(size, 1, 8, 8, dtype=torch.float64))
    vae = config.make_vae((1, 8, 8), 17).double()
    if unlike and distributed.rank() == 1:
        for parameter in vae.parameters():
            parameter.data.zero_()
    options = {"epochs": 1, "batch_size": size, "compile": compile, "quiet": True}
    fit(vae, images, images, estimator=config.make_estimator(), **options)
    return [parameter.grad for parameter in vae.parameters()]


@contextlib.contextmanager
def interrupted(at: int, *, of_rank: int):
    """SIGINT in a training step, counted from 1, of one process."""
    original, taken = Trainer._step, 0

    def step(trainer, *batch):
        nonlocal taken
        original(trainer, *batch)
        taken += 1
        if taken == at and distributed.rank() == of_rank:
            signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_step", step)
        yield


def diverge() -> str:
    """One process's weights are spoiled after the second epoch; the error."""
    config = Config(**TINY)
    dataset, vae = config.make_dataset(), config.make_vae((1, 8, 8), 17)

    def spoil(epoch: int) -> None:
        if epoch == 2 and distributed.rank() == 1:
            vae.decoder.body[-1].bias.data.fill_(math.nan)

    distributed.from_first(lambda: Path("diverged").mkdir())
    options = {"epochs": 4, "batch_size": 16, "directory": Path("diverged"), "quiet": True}
    try:
        fit(vae, dataset.train, dataset.validation, on_epoch=spoil, **options)
    except DivergedError as error:
        return str(error)
    return "none"


def adapted(name: str) -> list[torch.Tensor]:
    """What an estimator has learned."""
    config = Config(**TINY | {"estimator": name})
    dataset, estimator = config.make_dataset(), config.make_estimator()
    vae = config.make_vae((1, 8, 8), 17)
    fit(vae, dataset.train, dataset.validation, estimator=estimator, epochs=1, batch_size=16, quiet=True)
    return [tensor.clone() for tensor in distributed.tensors_in(estimator.state_dict())]


def command(*arguments: str) -> tuple[int, str, str]:
    """Of a command line: exit code, standard output and errors."""
    result = CliRunner().invoke(main, arguments)
    return result.exit_code, result.stdout, result.stderr


# Processes


def start(*arguments: str, cwd: Path, world: int = 2) -> list[subprocess.Popen]:
    """Processes as torchrun starts them, without it, so that nothing ends one when another ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | group
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": cwd}
    return [
        subprocess.Popen(
            [sys.executable, *arguments], env=environment | {"RANK": str(r), "LOCAL_RANK": str(r)}, **pipes
        )
        for r in range(world)
    ]


def ended(processes: list[subprocess.Popen]) -> list[tuple[int, str]]:
    """The exit code and the errors of each; none is left."""
    try:
        return [(p.wait(timeout=100), p.communicate()[1]) for p in processes]
    finally:
        for process in processes:
            process.kill()


def await_epochs(run: Path, epochs: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 100
    while len(read_metrics(run)) < epochs:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Where the processes work."""
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def alone(place) -> Fit:
    """The run without noise by this one process; an interrupted copy of it lies in `of-one`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyrovae.runs.training.draw_figures", lambda *args: None)
        _, result = runs.train(Config(**STILL), out=place / "alone")
        with interrupted(8, of_rank=0):
            runs.train(Config(**STILL), out=place / "of-one")
    return result


@pytest.fixture(scope="module")
def both(place, alone) -> list[dict]:
    """What the two processes found, by rank."""
    (place / "taken").mkdir()
    (place / "taken" / "file").touch()
    call = f"import tests.test_two_processes as t; t.work(t.Path({str(place)!r}))"
    first, second = start("-c", call, cwd=place)
    await_epochs(place / "killed", 2, first)
    second.kill()
    ends = ended([first, second])
    found = [torch.load(place / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    return [of_one | {"end": end} for of_one, end in zip(found, ends, strict=True)]


def state_of(run: Path) -> dict:
    return load_checkpoint(run / "checkpoint.pt", "cpu")


def metrics_of(run: Path) -> list[dict]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in read_metrics(run)]


def check_same_metrics(run: Path, history: list[dict], first: int = 0) -> None:
    rows = read_metrics(run)
    assert [row["epoch"] for row in rows] == [row["epoch"] for row in history]
    for ours, theirs in zip(rows[first:], history[first:], strict=True):
        for name in ours.keys() - {"seconds"}:
            assert ours[name] == pytest.approx(theirs[name], rel=2e-5), name


# Gradients and figures


@pytest.mark.parametrize(("name", "size", "compile"), CASES)
def test_two_processes_have_the_gradients_of_one(both, name, size, compile):
    expected = gradients(name, size)
    for found in both:
        for ours, theirs in zip(found["gradients"][name, size, compile], expected, strict=True):
            assert theirs.abs().max() > 1e-6
            assert (ours - theirs).abs().max() <= 1e-12 * theirs.abs().max()


@pytest.mark.parametrize("compile", [False, True], ids=["uncompiled", "compiled"])
def test_all_start_from_the_weights_of_the_first(both, compile):
    for found in both:
        for ours, theirs in zip(found["unlike weights", compile], gradients("autoencoder", 8), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_without_noise_two_processes_report_what_one_does(both, alone, place):
    check_same_metrics(place / both[0]["directory"], alone.history)


def test_one_directory_is_written_and_all_return_the_same(both, place):
    assert both[0]["directory"] == both[1]["directory"] == Path("runs/digits-bernoulli-1")
    assert [path.name for path in (place / "runs").iterdir()] == ["digits-bernoulli-1"]
    assert both[0]["whole"].history == both[1]["whole"].history == read_metrics(place / both[0]["directory"])


def test_every_process_draws_noise_of_its_own(both, place):
    state = load_checkpoint(place / "noisy-whole" / "checkpoint.pt", "cpu")
    (other,) = state["others"]
    assert not torch.equal(state["random"]["torch"], other["random"]["torch"])


@pytest.mark.parametrize("name", ["running-mean", "learned-baseline"])
def test_all_learn_the_same_baseline(both, name):
    assert tensors_equal(both[0][name], both[1][name])
    assert len(both[0][name]) == len(list(distributed.tensors_in(adapted(name))))
    assert any(tensor.any() for tensor in both[0][name])


# Ends, and what comes after


@pytest.mark.parametrize("run", IN_PARTS)
def test_a_signal_to_one_process_stops_all_after_the_same_batch(both, run):
    for found in both:
        progress, stopped_by = found[run]
        assert stopped_by == signal.SIGINT
        assert (progress.epoch, progress.batch) == (1, 3)  # the signal came in the batch before


@pytest.mark.parametrize("run", ["noisy", "compiled"])
def test_a_resumed_run_of_as_many_processes_is_bit_identical(both, place, run):
    assert tensors_equal(metrics_of(place / run), metrics_of(place / f"{run}-whole"))
    assert tensors_equal(state_of(place / run), state_of(place / f"{run}-whole"))


def test_a_compiled_run_is_the_uncompiled_one_up_to_rounding(both, place):
    check_same_metrics(place / "compiled-whole", read_metrics(place / "noisy-whole"))


@pytest.mark.usefixtures("both")
def test_one_process_goes_on_where_two_stopped(place, alone):
    runs.resume(place / "still-for-one")
    check_same_metrics(place / "still-for-one", alone.history)
    _, result = runs.resume(place / "noisy-for-one")
    assert result.progress.finished == "epochs"
    assert state_of(place / "noisy-for-one")["others"] == []


@pytest.mark.usefixtures("both")
def test_two_processes_go_on_where_one_stopped(place, alone):
    check_same_metrics(place / "of-one", alone.history)
    assert len(state_of(place / "of-one")["others"]) == 1


def test_all_stop_early_together(both):
    results = [found["patience"] for found in both]
    assert results[0].progress == results[1].progress
    assert results[0].progress.finished == "patience"


def test_all_diverge_together(both, place):
    assert both[0]["diverged"] == both[1]["diverged"]
    assert "in epoch 3; diverged/checkpoint.pt keeps the state before" in both[0]["diverged"]
    assert load_checkpoint(place / "diverged" / "checkpoint.pt", "cpu")["progress"]["epoch"] == 2


def test_ctrl_c_gives_the_exit_code_of_one_process_and_one_hint(both):
    (first, said, hint), (second, *nothing) = (found["stopped"] for found in both)
    assert first == second == 130
    assert said == ""
    *_, stopped, again = hint.splitlines()
    assert stopped == "Stopped in epoch 1; nothing is lost. To go on:"
    assert again.startswith("  torchrun --nproc-per-node 2 ")
    assert again.endswith(" train --resume stopped")
    assert "".join(nothing) == ""


def test_an_error_of_the_first_is_one_line_and_ends_all(both):
    (first, *said), (second, *again) = (found["refused"] for found in both)
    assert first == second == 2
    lines = [line for line in "".join(said + again).splitlines() if line.startswith("Error")]
    assert lines == ["Error: expected a new or empty directory for out, got taken, which has files"]


def test_a_killed_process_ends_the_run_with_a_usable_checkpoint(both, place):
    (code, errors), (killed, _) = (found["end"] for found in both)
    assert (code, killed) == (1, -signal.SIGKILL)
    assert errors.splitlines()[-1].startswith("Error: lost another process of the run")
    assert "Traceback" not in errors
    assert "Warning" not in errors
    done = state_of(place / "killed")["progress"]["epoch"]
    assert done >= 2
    _, result = runs.resume(place / "killed", changes={"epochs": done + 1})
    assert result.progress.finished == "epochs"


def test_torchrun_trains_and_its_ctrl_c_loses_nothing(tmp_path):
    call = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(ROOT / "cli.py")]
    process = subprocess.Popen(
        [sys.executable, *call, "train", *ENDLESS, "-o", "run"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    await_epochs(tmp_path / "run", 2, process)
    process.send_signal(signal.SIGINT)
    ((code, errors),) = ended([process])
    assert code != 0
    assert errors.count("nothing is lost. To go on:") == 1
    assert f"  torchrun --nproc-per-node 2 {ROOT / 'cli.py'} train --resume run" in errors.splitlines()
    state = state_of(tmp_path / "run")
    assert len(state["others"]) == 1
    done = state["progress"]["epoch"]
    _, result = runs.resume(tmp_path / "run", changes={"epochs": done + 1})
    assert result.progress.finished == "epochs"

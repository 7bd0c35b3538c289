"""What befalls runs: kills, a second writer, full disks, damaged files; at random in `benchmarks/faults/`.

Processes are forks, which start in milliseconds.
"""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from matplotlib.figure import Figure

from benchmarks.faults.shared import Child, ForkedCell, command, equal
from pyrovae import figures, runs
from pyrovae.cli.group import main
from pyrovae.runs import training
from pyrovae.runs.config import Config
from pyrovae.runtime import locks, processes
from pyrovae.training import Trainer
from pyrovae.training.checkpoints import CheckpointError, load_checkpoint, read_metrics
from tests.test_training import assert_same_run

pytestmark = [
    pytest.mark.usefixtures("unchecked", "whole"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]

OPTIONS = "--limit 64/32 -b 16 --hidden 8 --compile off --figure-epochs 1,2 --quiet"
TINY = Config(limit=(64, 32), batch_size=16, hidden=(8,), compile="off", figure_epochs=(1, 2), epochs=2)
WRITER = "Error: expected no other process to write to {}, got process {} on "
ENDLESS = f"{OPTIONS} -e 99999"


class Sketch(Figure):
    """A word in place of a picture, made at once and written as a figure is."""

    def __init__(self, word: str = "drawn"):
        self.word = word

    def savefig(self, file, **_) -> None:
        file.write(self.word.encode())


@pytest.fixture(scope="module", autouse=True)
def _sketched():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("curves", "overlaid_curves", "reconstructions", "grid", "manifold", "latent_cloud"):
            patch.setattr(figures, name, lambda *arguments, **settings: Sketch())
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory, _sketched) -> Path:
    """A run that nobody disturbs; what it imports on its way, forks then need not."""
    return runs.train(TINY, out=tmp_path_factory.mktemp("faults") / "whole")[0]


def slowly(call):
    """Does something with a pause in each training step, in which it can be stopped."""

    def work() -> None:
        step = Trainer._step
        Trainer._step = lambda *arguments: (time.sleep(0.02), step(*arguments))
        call()

    return work


def call(*arguments) -> tuple[int, str]:
    """Of a command line in this process: the exit code, and what it says beside results."""
    words = [word for text in arguments for word in str(text).split()]
    result = CliRunner().invoke(main, words)
    return result.exit_code, result.stderr


def await_epochs(run: Path, epochs: int, child: Child) -> None:
    deadline = time.monotonic() + 60
    while len(read_metrics(run)) < epochs:
        assert child.poll() is None, child.said
        assert time.monotonic() < deadline
        time.sleep(0.005)


def names(run: Path) -> set[str]:
    return {str(path.relative_to(run)) for path in run.rglob("*")}


# Kills


@contextmanager
def counted(at_step=lambda step: None):
    """Steps in which something that a process has written becomes lasting, numbered from 1."""
    steps = 0

    def step(original):
        def call(*arguments):
            nonlocal steps
            steps += 1
            at_step(steps)
            return original(*arguments)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("fsync", "replace", "mkdir"):
            patch.setattr(os, name, step(getattr(os, name)))
        yield lambda: steps


def killed_at(step: int, log: Path, work) -> None:
    """Does some work in a process that dies before this step, as by SIGKILL."""

    def do() -> None:
        with counted(lambda number: number == step and os.kill(os.getpid(), signal.SIGKILL)):
            work()

    assert Child(do, log).wait() == -signal.SIGKILL, log.read_text()


def test_a_run_killed_before_any_step_goes_on_as_if_nothing_had_happened(tmp_path, whole):
    with counted() as steps:
        runs.train(TINY, out=tmp_path / "counted")
    assert steps() > 25
    for step in [*range(2, 8), *range(8, steps() + 1, 4)]:
        run = tmp_path / str(step)
        killed_at(step, tmp_path / "log", lambda run=run: runs.train(TINY, out=run))
        if step > 10:  # and once more
            killed_at(1, tmp_path / "log", lambda run=run: runs.resume(run))
        if (run / "checkpoint.pt").exists() or (step % 2 and (run / "config.json").exists()):
            runs.resume(run)
        else:
            runs.train(TINY, out=run)
        assert_same_run(whole, run)
        assert names(run) == names(whole)


def test_a_figure_of_an_epoch_that_a_kill_came_before_is_drawn_by_the_next_process(tmp_path, whole):
    def die(*arguments):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "save_figure", die)
        with pytest.raises(KeyboardInterrupt):
            runs.train(TINY, out=tmp_path / "run")
    assert len(read_metrics(tmp_path / "run")) == 1
    run, _ = runs.resume(tmp_path / "run")
    assert names(run) == names(whole)


def test_figures_of_a_run_that_was_extended_and_killed_are_drawn_anew(tmp_path, monkeypatch):
    run, _ = runs.train(TINY, out=tmp_path / "run")
    monkeypatch.setattr(figures, "curves", lambda history: Sketch(f"{len(history)} epochs"))
    runs.resume(run)
    assert (run / "figures" / "curves.png").read_bytes() == b"drawn"  # it is there
    before = (run / "figures" / "samples.png").stat().st_mtime_ns

    def die(*arguments):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyrovae.runs.training.draw_figures", die)
        with pytest.raises(KeyboardInterrupt):
            runs.resume(run, changes={"epochs": 3})
    assert not runs.is_complete(run)
    runs.resume(run)
    assert runs.is_complete(run)
    assert (run / "figures" / "curves.png").read_bytes() == b"3 epochs"
    assert (run / "figures" / "samples.png").stat().st_mtime_ns > before


def test_a_stopped_process_leaves_one_line_and_a_checkpoint_however_often_it_is_told(tmp_path):
    run = tmp_path / "run"
    child = Child(slowly(command(f"train {ENDLESS} -o", run)), tmp_path / "log")
    await_epochs(run, 2, child)
    for _ in range(3):  # a supervisor, and a launcher
        child.kill(signal.SIGTERM)
    assert child.wait() == 128 + signal.SIGTERM
    stopped, again = child.said.splitlines()
    assert stopped.endswith("nothing is lost. To go on:")
    assert again == f"  pyrovae train --resume {run}"
    done = len(read_metrics(run)) + 1
    runs.resume(run, changes={"epochs": done})
    whole, _ = runs.train(runs.read_config(run)[0], out=tmp_path / "whole")
    assert_same_run(whole, run)


def test_a_signal_between_the_first_file_and_the_first_batch_is_not_lost(tmp_path, monkeypatch):
    prepare = training._prepare

    def told(directory: Path) -> None:
        signal.raise_signal(signal.SIGTERM)
        prepare(directory)

    monkeypatch.setattr(training, "_prepare", told)
    run, result = runs.train(TINY, out=tmp_path / "run")
    assert result.stopped_by == signal.SIGTERM
    assert load_checkpoint(run / "checkpoint.pt", "cpu")["progress"]["batch"] == 0


# Two writers


def test_a_second_writer_is_refused_in_one_line_and_readers_are_not(tmp_path):
    run = tmp_path / "run"
    child = Child(slowly(command(f"train {ENDLESS} -o", run)), tmp_path / "log")
    try:
        await_epochs(run, 1, child)
        for again in (["train --resume", run], ["train", OPTIONS, "-o", run]):
            code, said = call(*again)
            assert (code, said.count("\n")) == (2, 1)
        code, said = call("train --resume", run)
        assert said.startswith(WRITER.format(run, child.pid))
        runs.load(run)
        assert call("encode", run)[0] == 0
    finally:
        child.kill(signal.SIGTERM)
    assert child.wait() == 128 + signal.SIGTERM
    assert [row["epoch"] for row in read_metrics(run)] == list(range(1, len(read_metrics(run)) + 1))


# Sweeps


@pytest.fixture
def forked_cells(monkeypatch):
    """A sweep's cells are forks."""
    names = {name: getattr(subprocess, name) for name in ("PIPE", "STDOUT")}
    monkeypatch.setattr(processes, "subprocess", SimpleNamespace(Popen=ForkedCell, **names))


SWEEP = f"sweep {OPTIONS} -e 5 --over latent_dim=1,3"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_stopped_sweep_leaves_no_cell_at_work_and_goes_on_where_it_was(tmp_path, forked_cells, number):
    out = tmp_path / "sweep"
    child = Child(slowly(command(SWEEP, "-o", out)), tmp_path / "log")
    await_epochs(out / "latent_dim-1", 2, child)
    child.kill(number)
    code = child.wait()
    if number != signal.SIGKILL:
        assert code == 128 + number
        assert locks.holder(out / "latent_dim-1") == ""  # it was waited for
        *_, stopped, again = child.said.splitlines()
        assert stopped == "Stopped; nothing is lost. To go on:"
        assert again == f"  pyrovae {SWEEP} -o {out}"
    deadline = time.monotonic() + 60
    while locks.holder(out / "latent_dim-1") and time.monotonic() < deadline:  # the dead sweep's, until it ends
        time.sleep(0.01)
    before = read_metrics(out / "latent_dim-1")
    assert len(before) < 5
    assert call(SWEEP, "-o", out)[0] == 0
    assert read_metrics(out / "latent_dim-1")[: len(before)] == before  # to the seconds: it was continued
    for z in (1, 3):
        assert [row["epoch"] for row in read_metrics(out / f"latent_dim-{z}")] == [1, 2, 3, 4, 5]
    assert call(SWEEP, "-o", out)[0] == 0  # nothing is left to do


def test_a_second_sweep_in_the_same_directory_is_refused_in_one_line(tmp_path, forked_cells):
    out = tmp_path / "sweep"
    child = Child(slowly(command(SWEEP, "-e 99999 -o", out)), tmp_path / "log")
    try:
        await_epochs(out / "latent_dim-1", 1, child)
        code, said = call(SWEEP, "-e 99999 -o", out)
    finally:
        child.kill(signal.SIGTERM)
    assert code == 2
    assert said.startswith(WRITER.format(out, child.pid))
    assert said.count("\n") == 1
    assert child.wait() == 128 + signal.SIGTERM


@pytest.mark.parametrize("left", [".sweep.json.0123abcd.part", "sweep.json.part", "cells"])
def test_a_sweep_killed_in_its_first_moments_is_as_good_as_new(tmp_path, forked_cells, left):
    out = tmp_path / "sweep"
    (out / left).mkdir(parents=True) if left == "cells" else (out.mkdir(), (out / left).write_text("{"))
    assert call(SWEEP, "-e 1 -o", out)[0] == 0


def test_a_cell_is_a_program():
    call = [sys.executable, "-m", "pyrovae.cli.cell", "--version"]
    with subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        assert process.wait(timeout=60) == 0


# Disks


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("step", [6, 9, 16])
def test_a_full_or_read_only_disk_is_one_line_with_the_command_that_goes_on(tmp_path, whole, step, number):
    run, config = tmp_path / "run", f"{OPTIONS} -e 2"

    def refuse(at: int) -> None:
        if at == step:
            raise OSError(number, os.strerror(number))

    with counted(refuse):
        code, said = call("train", config, "-o", run)
    assert (code, said.count("\n")) == (1, 1)
    assert said.startswith(f"Error: expected to write {run}/")
    assert f", got: {os.strerror(number).lower()}; nothing before is lost" in said.lower()
    assert said.endswith(f" train --resume {run}\n")
    assert call("train --resume", run)[0] == 0
    assert_same_run(whole, run)
    assert names(run) == names(whole)


@pytest.mark.parametrize("made_anew", [False, True])
def test_a_directory_that_is_deleted_while_it_trains_is_one_line(tmp_path, monkeypatch, made_anew):
    run, finish = tmp_path / "run", Trainer._finish_epoch

    def delete(trainer, started) -> None:
        shutil.rmtree(run)
        if made_anew:
            run.mkdir()
        finish(trainer, started)

    monkeypatch.setattr(Trainer, "_finish_epoch", delete)
    code, said = call("train", OPTIONS, "-e 2 -o", run)
    assert (code, said) == (1, f"Error: expected to write {run}, got: the directory was deleted or moved\n")
    assert not list(run.glob("*"))


# Damaged files


def test_no_flipped_bit_of_a_checkpoint_loads_as_other_contents(tmp_path, no_figures):
    run, _ = runs.train(TINY, out=tmp_path / "run")
    path, generator, caught = run / "checkpoint.pt", random.Random(0), 0
    contents, expected = path.read_bytes(), load_checkpoint(path, "cpu")
    for _ in range(60):
        damaged, bit = bytearray(contents), generator.randrange(8 * len(contents))
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            loaded = load_checkpoint(path, "cpu")
        except CheckpointError:
            caught += 1
            continue
        assert equal(loaded, expected), bit
    assert caught > 40


def test_a_compressed_checkpoint_is_refused_before_it_is_unpacked(tmp_path):
    torch.save({"format": "pyrovae checkpoint 1", "zeros": torch.zeros(10)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "bomb.pt", "w") as bomb:
        for part in plain.infolist():
            bomb.writestr(part.filename, plain.read(part), zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="a compressed part"):
        load_checkpoint(tmp_path / "bomb.pt", "cpu")

"""Processes of the command line that start in milliseconds, and a comparison of what they leave.

A program that imports PyTorch takes seconds to start. Here it is imported once, and each process is a fork that
calls the command line. Nothing is computed before the fork, so that no thread is lost in it.
"""

import ctypes
import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from pyrovae.cli import cell
from pyrovae.cli.group import main
from pyrovae.runtime import processes
from pyrovae.training.checkpoints import load_checkpoint

TINY = "--limit 64/32 -b 16 --hidden 8 --epochs 4 --figure-epochs 1,3 --compile off"
ADOPTS_ORPHANS = 36  # Linux's PR_SET_CHILD_SUBREAPER


class Child:
    """A forked process that runs a function, with what it prints in a file."""

    def __init__(self, function: Callable[[], object], log: Path | None = None):
        self.log, self.code = log, None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            if log is not None:
                descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(descriptor, 1)
                os.dup2(descriptor, 2)
            os._exit(exit_code(function))

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        if self.code is None:
            os.kill(self.pid, number)

    def poll(self) -> int | None:
        """The exit code, minus a signal's number, or None while it runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def wait(self, seconds: float = 600.0) -> int | None:
        """The exit code, or None after so many seconds."""
        deadline = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        return self.code

    @property
    def said(self) -> str:
        return self.log.read_text()


def exit_code(function: Callable[[], object]) -> int:
    """The exit code of a forked process that calls a function, which may raise SystemExit."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    code = 1
    try:
        torch.set_num_threads(1)
        function()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def command(*arguments: str | Path) -> Callable[[], object]:
    """The command line with these arguments, each of which may be several words."""
    words = [
        word for text in arguments for word in (shlex.split(text) if isinstance(text, str) else [str(text)])
    ]

    def call() -> None:
        sys.argv = ["pyrovae", *words]
        main(words, prog_name="pyrovae")

    return call


class ForkedCell:
    """Stands in for `subprocess.Popen` in a sweep: a fork, where there is a command of a cell."""

    pipes: set[int] = set()  # the ends that this process writes to, which children must not keep open

    def __init__(self, command: list[str], *, stdin: int, stdout, stderr: int, env: dict[str, str]):
        words = command[command.index("train") :]
        reading, self.writing = os.pipe()
        self.pipes.add(self.writing)
        self.stdin = self
        self.returncode = None
        self.pid = os.fork()
        if self.pid == 0:
            for descriptor in self.pipes:
                os.close(descriptor)
            os.dup2(reading, 0)
            os.dup2(stdout.fileno(), 1)
            os.dup2(stdout.fileno(), 2)
            cell.watch()
            os._exit(exit_code(command_of(words)))
        os.close(reading)

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def wait(self) -> int:
        _, status = os.waitpid(self.pid, 0)
        self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def close(self) -> None:
        self.pipes.discard(self.writing)
        os.close(self.writing)


def command_of(words: list[str]) -> Callable[[], object]:
    return command(*map(shlex.quote, words))


def prepare() -> None:
    """Imports what a run imports on its way, and adopts the orphans of killed sweeps."""
    processes.subprocess = SimpleNamespace(**vars(subprocess) | {"Popen": ForkedCell})
    with tempfile.TemporaryDirectory() as place:
        names = Path(place) / "modules.json"

        def learn() -> None:
            try:
                command(f"train {TINY} --quiet -o", Path(place) / "run")()
            finally:
                names.write_text(json.dumps(list(sys.modules)))

        child = Child(learn, Path(place) / "log")
        assert child.wait() == 0, child.said
        for name in json.loads(names.read_text()):
            try:
                importlib.import_module(name)
            except Exception:
                continue
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(ADOPTS_ORPHANS, 1, 0, 0, 0)


def left_over(seconds: float = 30.0) -> int:
    """How many processes that this one has adopted do not end by themselves in so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return 0
        if pid == 0:
            time.sleep(0.01)
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    for pid in children:
        os.kill(int(pid), signal.SIGKILL)
    return len(children)


def differences(found: Path, expected: Path) -> list[str]:
    """The files of a directory of runs that differ from another's, in more than the seconds of metrics."""

    def names(place: Path) -> set[str]:
        files = (path.relative_to(place) for path in place.rglob("*") if path.is_file())
        return {str(path) for path in files if path.name != ".lock" and path.suffix != ".log"}

    ours, theirs = names(found), names(expected)
    wrong = sorted(ours ^ theirs)
    return wrong + [name for name in sorted(ours & theirs) if not same(found / name, expected / name)]


def same(ours: Path, theirs: Path) -> bool:
    """Whether two files of runs have the same contents."""
    if ours.suffix == ".pt":
        return equal(load_checkpoint(ours, "cpu"), load_checkpoint(theirs, "cpu"))
    if ours.name == "metrics.jsonl":
        return rows(ours) == rows(theirs)
    return ours.read_bytes() == theirs.read_bytes()


def rows(path: Path) -> list[dict]:
    return [json.loads(line) | {"seconds": 0} for line in path.read_text().splitlines()]


def equal(a, b) -> bool:
    """Whether two checkpoints are the same to the last bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@contextmanager
def workplace() -> Iterator[Path]:
    """A temporary directory, as the current one."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="pyrovae-faults-") as place:
        os.chdir(place)
        try:
            yield Path(place)
        finally:
            os.chdir(before)


def report(what: str, tried: int, failures: list[str], **counts: object) -> None:
    """Prints what was tried and what failed, and ends the program accordingly."""
    for failure in failures:
        print(f"FAILED {failure}")
    versions = f"Python {sys.version.split()[0]}, torch {torch.__version__}"
    also = "".join(f", {value} {name.replace('_', ' ')}" for name, value in counts.items())
    print(f"{what}: {tried} tried, {len(failures)} failed{also} ({versions})")
    sys.exit(bool(failures))

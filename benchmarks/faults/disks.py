"""Fills the disk, forbids to write, or deletes the directory while a run trains, and goes on afterwards.

    python benchmarks/faults/disks.py [--runs N] [--seed S]

A disk is a small tmpfs, which only root may mount; without that, the largest size of a file is limited instead.
Whoever is not to write is another user, where this is root. Each failure must be one line with the system's
reason, the command that goes on, and exit code 1 (2 where the run could not be begun). That command, or
the same one where nothing was begun, must then finish the run, with the bytes of an undisturbed one. A
deleted directory is the exception: nothing is left that could go on.
"""

import os
import random
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import click
from shared import TINY, Child, command, differences, left_over, prepare, report, workplace

NOBODY = 65534
WORDS = f"train --quiet {TINY} -o"
SWEEP = f"sweep --quiet {TINY} --over latent_dim=1,2 -o"
GO_ON = re.compile(r"go on: (pyrovae train --resume \S+)")
REASONS = {
    "full": "no space left on device|file too large",
    "full for a sweep": "no space left on device|file too large|runs failed",
    "read-only": "permission denied|read-only file system",
    "deleted": "no such file or directory|deleted or moved",
}


class Disk:
    """A place for files that can be filled: a tmpfs, or a limit for files of children."""

    def __init__(self, place: Path):
        place.mkdir()
        self.place, self.limit = place, None
        call = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
        self.mounted = sys.platform == "linux" and subprocess.run(call, capture_output=True).returncode == 0

    def fill(self, left: int) -> None:
        """Leaves room for so many bytes."""
        if not self.mounted:
            self.limit = left // 10  # which the largest of the files shall exceed
            return
        free = os.statvfs(self.place).f_bavail * os.statvfs(self.place).f_bsize
        (self.place / "filler").write_bytes(bytes(max(0, free - left)))

    def free(self) -> None:
        self.limit = None
        with suppress(FileNotFoundError):
            (self.place / "filler").unlink()

    def limited(self, call: Callable[[], object]) -> Callable[[], object]:
        limit = self.limit

        def work() -> None:
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            call()

        return work

    def close(self) -> None:
        if self.mounted:
            subprocess.run(["umount", "-l", str(self.place)], check=True)


def as_nobody(call: Callable[[], object]) -> Callable[[], object]:
    def work() -> None:
        if os.getuid() == 0:
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        call()

    return work


def owned(directory: Path) -> None:
    """Gives all in a directory to the user that `as_nobody` becomes."""
    if os.getuid() == 0:
        for path in (directory, *directory.rglob("*")):
            os.chown(path, NOBODY, NOBODY)


def trial(
    kind: str, disk: Disk, size: int, expected: Path, generator: random.Random
) -> tuple[str, int | None, list[str]]:
    """One run that meets a failure at a random moment: what it said, its exit code, and what is wrong."""
    out, log = disk.place / "run", disk.place.parent / "log"
    call = command(SWEEP if kind == "full for a sweep" else WORDS, out)
    if kind.startswith("full"):
        disk.fill(generator.randrange(size))
        child = Child(disk.limited(call), log)
    else:
        disk.place.chmod(0o777)
        child = Child(as_nobody(call) if kind == "read-only" else call, log)
        while child.poll() is None and not (out / "checkpoint.pt").exists():
            time.sleep(0.001)
        time.sleep(generator.uniform(0, 0.2))
        if kind == "deleted":
            while child.poll() is None and out.exists():  # as `rm -r` would, were it alone
                shutil.rmtree(out, ignore_errors=True)
        for path in (out / "figures", out) if kind == "read-only" else ():
            path.chmod(0o555)
    child.wait()
    said = child.said.strip()
    failures = judged(kind, child.code, said)
    disk.free()
    first = said, child.code
    if kind == "deleted" or child.code == 0:
        return *first, failures
    if kind == "read-only":
        again = Child(as_nobody(call_to_go_on(kind, call, said)), log)  # refused as well
        failures += judged(kind, again.wait(), again.said.strip())
        for path in (out / "figures", out):
            path.chmod(0o755)
    child = Child(call_to_go_on(kind, call, said), log)
    if child.wait() != 0:
        failures.append(f"exit code {child.code}: {child.said[-300:]}")
    return *first, failures + differences(out, expected)


def call_to_go_on(kind: str, call: Callable[[], object], said: str) -> Callable[[], object]:
    found = None if kind.endswith("sweep") else GO_ON.search(said)  # a sweep goes on by the same command
    return command(found[1].removeprefix("pyrovae ") + " --quiet") if found else call


def judged(kind: str, code: int | None, said: str) -> list[str]:
    """What is wrong with how a run ended."""
    if code == 0:  # nothing went wrong before its end
        return []
    lines = [line for line in said.splitlines() if not (kind.endswith("sweep") and "expected to write" in line)]
    wrong = []
    if code != 1:
        wrong.append(f"exit code {code}")
    if "Traceback" in said:
        wrong.append("a traceback")
    if not re.search(REASONS[kind], said):
        wrong.append("another reason")
    if not kind.endswith("sweep") and len(lines) != 1:
        wrong.append(f"{len(lines)} lines")
    return [f"{what}: {said[-400:]}" for what in wrong]


@click.command()
@click.option("--runs", default=12, show_default=True, help="How many.")
@click.option("--seed", default=0, show_default=True, help="Of the moments.")
@click.option("--verbose", is_flag=True, help="Print each trial.")
def main(runs: int, seed: int, verbose: bool) -> None:
    prepare()
    generator, failures, hits = random.Random(seed), [], 0
    kinds = ["full", "read-only", "full", "full for a sweep", "full", "deleted", "read-only", "full"]
    with workplace() as place:
        place.chmod(0o755)
        expected = {"run": place / "expected", "sweep": place / "expected-sweep"}
        assert Child(command(WORDS, expected["run"]), place / "log").wait() == 0
        assert Child(command(SWEEP, expected["sweep"]), place / "log").wait() == 0
        for number in range(runs):
            kind, disk = kinds[number % len(kinds)], Disk(place / f"disk-{number}")
            whole = expected["sweep" if "sweep" in kind else "run"]
            size = sum(path.stat().st_size + 4096 for path in whole.rglob("*") if path.is_file())
            try:
                said, code, wrong = trial(kind, disk, size, whole, generator)
                wrong += ["processes left over"] if left_over() else []
            finally:
                disk.close()
            hits += code != 0
            if verbose:
                print(f"{kind}, exit code {code}: {said}", *wrong, sep="\n  ")
            failures += [f"{kind}: {failure}" for failure in wrong]
    report("disks", runs, failures, stopped=hits)


if __name__ == "__main__":
    main()

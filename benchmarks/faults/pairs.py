"""Starts two writers of one directory at the same time, and looks at what they leave.

    python benchmarks/faults/pairs.py [--pairs N] [--seed S]

Most pairs resume one interrupted run; others begin a run in the same new directory, or run the same sweep. One
of them must finish, and the other must be refused in one line that names the first, or find nothing left
to do. The directory must hold the same bytes as an undisturbed one, but for the seconds in the metrics.
"""

import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import click
from shared import TINY, Child, command, differences, left_over, prepare, report, workplace

LONG = f"{TINY} --epochs 12 -b 4"
REFUSED = re.compile(
    r"Error: expected (no other process to write to .*, got process \d+ on .* since 2.*"
    r"|.*a new or empty directory for out, got .*)"
)
KINDS = {
    "resume": "train --quiet --resume",
    "train": f"train --quiet {LONG} -o",
    "sweep": f"sweep --quiet {TINY} --over latent_dim=1,2 -o",
}


def interrupted(out: Path) -> None:
    """A run that was stopped after its first checkpoint, about the beginning of its second epoch."""
    child = Child(command(f"train --quiet {LONG} -o", out), out.with_suffix(".log"))
    while child.poll() is None and not (out / "best.pt").exists():
        time.sleep(0.002)
    child.kill(signal.SIGTERM)
    assert child.wait() == 128 + signal.SIGTERM, child.said


def trial(call: Callable[[], object], out: Path, delay: float) -> tuple[bool, list[str]]:
    """Two processes that do the same; whether one was refused, and what is wrong."""
    first = Child(call, out.with_suffix(".1.log"))
    time.sleep(delay)
    second = Child(call, out.with_suffix(".2.log"))
    codes = sorted([first.wait(), second.wait()])
    failures = []
    if codes not in ([0, 0], [0, 2]):
        failures.append(f"exit codes {codes}: {first.said[-300:]} {second.said[-300:]}")
    refused = codes == [0, 2]
    if refused:
        said = (first if first.code else second).said.strip()
        if not REFUSED.fullmatch(said):
            failures.append(f"refused with other words: {said}")
    if left := left_over():
        failures.append(f"{left} processes left over")
    return refused, failures


@click.command()
@click.option("--pairs", default=20, show_default=True, help="How many.")
@click.option("--seed", default=0, show_default=True, help="Of the moments.")
def main(pairs: int, seed: int) -> None:
    prepare()
    generator, failures, refused = random.Random(seed), [], 0
    with workplace() as place:
        for kind in ("train", "sweep"):
            assert Child(command(KINDS[kind], place / kind), place / f"{kind}.log").wait() == 0
        interrupted(place / "interrupted")
        for number in range(pairs):
            kind = "train" if number % 10 == 8 else "sweep" if number % 10 == 9 else "resume"
            out = place / f"pair-{number}"
            if kind == "resume":
                shutil.copytree(place / "interrupted", out)
            one_refused, wrong = trial(command(KINDS[kind], out), out, generator.choice((0, 0.02, 0.2, 0.5)))
            wrong += differences(out, place / ("sweep" if kind == "sweep" else "train"))
            refused += one_refused
            failures += [f"{kind}: {failure}" for failure in wrong]
            shutil.rmtree(out)
    report("pairs", pairs, failures, refused=refused)


if __name__ == "__main__":
    main()

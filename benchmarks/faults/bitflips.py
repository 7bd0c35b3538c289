"""Flips single bits of the files that are read back, and counts those that load with other contents.

    python benchmarks/faults/bitflips.py [--flips N] [--seed S]

The files are a run's checkpoint.pt and best.pt, and a dataset as a `.npz`. A flip is caught if loading is
refused in one line, harmless if the contents are the same to the last bit (it hit padding, say, or a date),
and silent otherwise. It prints as well what the check of a checkpoint costs beside loading it.
"""

import random
import time
from pathlib import Path

import click
import numpy as np
import torch
from shared import TINY, Child, command, equal, prepare, report, workplace

from pyrovae.data import read_arrays
from pyrovae.training.checkpoints import FORMAT, CheckpointError, _verify, load_checkpoint, save_atomically

SIZES = 10_000, 1_000_000, 50_000_000  # numbers in the checkpoints that are timed


def load(path: Path):
    """The contents, or the one line with which they are refused."""
    try:
        if path.suffix == ".pt":
            return load_checkpoint(path, "cpu")
        source = read_arrays(path)
        return {"pixels": source.train.pixels, "labels": source.train.labels, "levels": source.levels}
    except (CheckpointError, ValueError) as error:
        return str(error)


def seconds(work) -> float:
    """The least of five times."""
    times = []
    for _ in range(5):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def print_cost(place: Path) -> None:
    for size in SIZES:
        path = place / "large.pt"
        save_atomically({"format": FORMAT, "numbers": torch.rand(size)}, path)

        def verify(path=path) -> None:
            with open(path, "rb") as file:
                _verify(file)

        check, whole = seconds(verify), seconds(lambda path=path: load_checkpoint(path, "cpu"))
        megabytes = path.stat().st_size / 1e6
        print(f"{megabytes:.2f} MB: {1e3 * check:.1f} ms to check, of {1e3 * whole:.1f} ms to load")


@click.command()
@click.option("--flips", default=300, show_default=True, help="How many.")
@click.option("--seed", default=0, show_default=True, help="Of the bits.")
def main(flips: int, seed: int) -> None:
    prepare()
    generator, failures, caught = random.Random(seed), [], 0
    with workplace() as place:
        assert Child(command(f"train --quiet {TINY} -o", place / "run"), place / "log").wait() == 0
        labels = np.arange(40) % 10
        np.savez(place / "images.npz", images=np.random.default_rng(0).random((40, 8, 8)), labels=labels)
        files = [place / "run" / "checkpoint.pt", place / "run" / "best.pt", place / "images.npz"]
        whole = {path: (path.read_bytes(), load(path)) for path in files}
        for number in range(flips):
            path = files[number % len(files)]
            contents, expected = whole[path]
            damaged, bit = bytearray(contents), generator.randrange(8 * len(contents))
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            found = load(path)
            caught += isinstance(found, str)
            if isinstance(found, str) and "\n" in found:
                failures.append(f"several lines: {found}")
            if not isinstance(found, str) and not equal(found, expected):
                failures.append(f"silent: bit {bit} of {path.name}")
        print_cost(place)
    report("bit flips", flips, failures, caught=caught)


if __name__ == "__main__":
    main()

"""Malforms files at random (see `tests/fuzzing.py`), and counts what ends in neither success nor one line.

    python benchmarks/faults/malformed.py [--mutations N] [--seed S]

The files are a run's settings, metrics, checkpoints and results, recipes, sweeps, arrays and pictures. Nothing
in them may be unpickled or imported, and reading them may take no more than 2 GB beside the imports.
"""

import resource
import sys
from pathlib import Path

import click
import torch
from shared import report, workplace

sys.path.insert(0, str(Path(__file__).parents[2]))

from pyrovae import runs
from tests import fuzzing

MOST_MEMORY = 2 * 10**9  # bytes


def address_space() -> int:
    """The bytes of addresses that this process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


@click.command()
@click.option("--mutations", default=1000, show_default=True, help="How many.")
@click.option("--seed", default=0, show_default=True, help="Of the mutations.")
def main(mutations: int, seed: int) -> None:
    torch.set_num_threads(1)
    runs.training.draw_figures = lambda *arguments: None  # whose time is not that of reading
    with workplace() as place:
        (place / "made").mkdir()
        fuzzing.prepare(place / "made")
        limit = address_space() + MOST_MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        failures = []
        for number in range(mutations):
            failure = fuzzing.attempt(place / "made", number, seed)
            if failure:
                print(f"FAILED {failure}", flush=True)
                failures.append(failure)
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    report("mutations", mutations, failures, GB_of_memory_at_most=f"{largest:.2f}")


if __name__ == "__main__":
    main()

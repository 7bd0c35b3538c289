"""Kills one of two processes that train one model, and stops all at once as a supervisor does.

    python benchmarks/faults/ranks.py [--runs N] [--seed S]

The processes are started by torchrun's own agent, as forks. In every second trial one of them is killed by
SIGKILL at a random moment. In the others SIGTERM goes to the agent and to both processes, as systemd and Slurm
send it, and the agent passes it on as well. No process may be left over; after a SIGTERM there must be
exactly one line that says how to go on. The run then goes on with as many processes, and must hold the
bytes of an undisturbed one, but for the seconds in the metrics.
"""

import os
import random
import signal
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import click
from shared import TINY, Child, command, differences, exit_code, left_over, prepare, report, workplace
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from pyrovae.runs.drawing import is_complete

LONG = f"{TINY} --limit 500/50 --epochs 9 -b 16"


def of_rank(words: list[str]) -> None:
    """What each of the processes does; the agent waits until it returns, or ends with a code."""
    code = exit_code(command(*words))
    if code:
        os._exit(code)


def launched(*words: str | Path) -> Callable[[], object]:
    """The command line by two processes, as torchrun starts and watches them."""

    def work() -> None:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=2,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            start_method="fork",
        )
        elastic_launch(config, of_rank)([str(word) for word in words])

    return work


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def await_ranks(agent: Child) -> list[int]:
    """The two processes, once they are there."""
    while agent.poll() is None and len(children(agent.pid)) < 2:
        time.sleep(0.002)
    return children(agent.pid)


def trial(out: Path, kind: str, begun: float, seconds: float, generator: random.Random) -> list[str]:
    """One disturbed run, and its end."""
    agent = Child(launched(f"train --quiet {LONG} -o", out), out.with_suffix(".log"))
    ranks = await_ranks(agent)
    agent.wait(generator.uniform(begun, seconds))
    if kind == "killed":
        victims, number = [generator.choice(ranks)], signal.SIGKILL
    else:
        victims, number = [agent.pid, *ranks], signal.SIGTERM
    for pid in victims:
        if Path(f"/proc/{pid}").exists():
            os.kill(pid, number)
    agent.wait()
    failures, said = [], agent.said
    if left := left_over():
        failures.append(f"{left} processes left over")
    over = not (out / "checkpoint.pt").exists() or is_complete(out)
    if kind == "stopped" and "To go on:" not in said and not over:
        failures.append("no line")
    if said.count("To go on:") + said.count("Error: lost") > 1:
        failures.append("several lines")
    if failures:
        failures[-1] += f": {said[-1500:]}"
    if (out / "checkpoint.pt").exists():
        agent = Child(launched("train --quiet --resume", out), out.with_suffix(".log"))
    else:
        agent = Child(launched(f"train --quiet {LONG} -o", out), out.with_suffix(".log"))
    if agent.wait() != 0:
        failures.append(f"exit code {agent.code}: {agent.said[-1500:]}")
    return failures


@click.command()
@click.option("--runs", default=6, show_default=True, help="How many.")
@click.option("--seed", default=0, show_default=True, help="Of the moments.")
@click.option("--verbose", is_flag=True, help="Print each trial.")
def main(runs: int, seed: int, verbose: bool) -> None:
    prepare()
    generator, failures = random.Random(seed), []
    with workplace() as place:
        expected = place / "expected"
        started = time.monotonic()
        agent = Child(launched(f"train --quiet {LONG} -o", expected), place / "log")
        await_ranks(agent)
        started = time.monotonic()
        while agent.poll() is None and not (expected / "checkpoint.pt").exists():
            time.sleep(0.01)
        begun = time.monotonic() - started
        assert agent.wait() == 0, agent.said
        seconds = time.monotonic() - started
        for number in range(runs):
            kind, out = ("killed", "stopped")[number % 2], place / f"run-{number}"
            wrong = trial(out, kind, begun, seconds, generator) + differences(out, expected)
            if verbose:
                print(f"{kind}, {begun:.2f} to {seconds:.2f} s", *wrong, sep="\n  ")
            failures += [f"{kind}: {failure}" for failure in wrong]
    report("ranks", runs, failures)


if __name__ == "__main__":
    main()

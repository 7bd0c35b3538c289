"""Kills training at random moments, goes on, and compares what is left with a run that nobody disturbed.

    python benchmarks/faults/kills.py [--kills N] [--seed S] [--only NAME]

Each trial starts a run or a sweep, kills it by SIGKILL up to five times, in its first moments, while it trains
or while it draws, and goes on each time: by the same command while there is no checkpoint, or by `--resume`.
In the end the directory must hold the same bytes as an undisturbed one, but for the seconds in the
metrics. A trial fails if a file is lost, torn, left over or different, if a command that goes on is
refused, or if a process is left over. It prints how many kills hit a process that was still at work.
"""

import random
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
from shared import TINY, Child, command, differences, left_over, prepare, report, workplace

from pyrovae.training.checkpoints import CheckpointError, load_checkpoint

CELLS = "--over latent_dim=1,2"
CONFIGS = {
    "bernoulli": "",
    "many epochs": "--epochs 9",
    "gaussian with learned c": "--likelihood gaussian --c learned",
    "categorical": "--likelihood categorical",
    "convolutional with batch norm": "--network cnn --channels 4,4",
    "autoencoder": "--autoencoder -l gaussian",
    "bits": "--guide bernoulli-code --estimator disarm --particles 4",
    "importance weights": "--estimator dreg --particles 3",
    "running mean": "--estimator running-mean",
    "learned baseline": "--estimator learned-baseline",
    "warm-up": "--kl-warmup 3 --beta 2",
    "patience": "--patience 1 --epochs 12 --lr 0.05",
    "a flow": "--guide coupling",
    "one latent dimension": "--latent-dim 1",
    "five latent dimensions": "--latent-dim 5",
    "conditional": "--conditional",
    "no figures on the way": "--figure-epochs ''",
    "sweep": f"sweep {CELLS}",
    "sweep with two jobs": f"sweep {CELLS} --over seed=0,1 --jobs 2",
    "sweep of autoencoders": f"sweep {CELLS} --autoencoder -l gaussian",
}


@dataclass
class Case:
    """A configuration, and what it leaves if nobody disturbs it.

    Attributes:
        begun: Seconds to the first checkpoint of all.
        seconds: Seconds to the end.
    """

    name: str
    words: str
    expected: Path
    begun: float
    seconds: float

    @property
    def of_sweep(self) -> bool:
        return self.words.startswith("sweep")

    def start(self, out: Path, generator: random.Random) -> Child:
        return Child(go_on(self, out, generator), out.with_suffix(".log"))


def go_on(case: Case, out: Path, generator: random.Random) -> Callable[[], object]:
    """The command that begins or continues a case."""
    tiny = TINY.replace("--hidden 8", "") if "cnn" in case.words else TINY
    if case.of_sweep:
        return command(f"{case.words} {tiny} --quiet -o", out)
    begun, resumable = (out / "checkpoint.pt").exists(), (out / "config.json").exists()
    if begun or (resumable and generator.random() < 0.5):
        return command("train --resume", out, "--quiet")
    return command(f"train {tiny} {case.words} --quiet -o", out)


def undisturbed(name: str, words: str, place: Path) -> Case:
    case = Case(name, words, place / name.replace(" ", "-"), 0.0, 0.0)
    started = time.monotonic()
    child = case.start(case.expected, random.Random(0))
    while child.poll() is None and not list(case.expected.rglob("checkpoint.pt")):
        time.sleep(0.002)
    case.begun = time.monotonic() - started
    assert child.wait() == 0, child.said
    case.seconds = time.monotonic() - started
    return case


def torn(out: Path) -> list[str]:
    """The checkpoints that do not load."""
    found = []
    for path in out.rglob("*.pt"):
        try:
            load_checkpoint(path, "cpu")
        except CheckpointError as error:
            found.append(str(error))
    return found


def trial(case: Case, out: Path, generator: random.Random, most: int) -> tuple[int, list[str]]:
    """Kills a case at most so often; how often it was at work, and what is wrong in the end."""
    kills, failures = 0, []
    for _ in range(most):
        child = case.start(out, generator)
        latest = case.begun if generator.random() < 0.3 else case.seconds
        if child.wait(generator.uniform(0, latest)) is not None:
            break
        child.kill()
        child.wait()
        kills += 1
        failures += torn(out)
    child = case.start(out, generator)
    if child.wait() != 0:
        failures.append(f"exit code {child.code}: {child.said.strip()[-300:]}")
    if left := left_over():
        failures.append(f"{left} processes left over")
    failures += differences(out, case.expected) if out.exists() else ["lost"]
    return kills, [f"{case.name}: {failure}" for failure in failures]


@click.command()
@click.option("--kills", default=60, show_default=True, help="Stop after so many.")
@click.option("--seed", default=0, show_default=True, help="Of the moments.")
@click.option("--only", help="Of the configurations, those with this in their name.")
@click.option("--verbose", is_flag=True, help="Print each trial.")
def main(kills: int, seed: int, only: str | None, verbose: bool) -> None:
    prepare()
    chosen = {name: words for name, words in CONFIGS.items() if only is None or only in name}
    done, trials, failures = 0, 0, []
    generator = random.Random(seed)
    with workplace() as place:
        cases = [undisturbed(name, words, place) for name, words in chosen.items()]
        while done < kills:
            case, out = cases[trials % len(cases)], place / f"trial-{trials}"
            hits, wrong = trial(case, out, generator, min(5, kills - done))
            done, trials, failures = done + hits, trials + 1, failures + wrong
            if verbose:
                moments = f"{case.begun:.2f} of {case.seconds:.2f} s"
                print(f"{case.name}, {moments}: {hits} kills", *wrong, sep="\n  ")
            if not wrong:
                shutil.rmtree(out, ignore_errors=True)
            sys.stdout.flush()
    report("kills", done, failures, trials=trials, configurations=len(cases))


if __name__ == "__main__":
    main()

"""How often the laboratory's 95 % intervals hold the truth, on gradients whose moments are known.

    python -m benchmarks.coverage [--draws N]... [--repeats N]
    python -m benchmarks.coverage --slopes [--draws N]... [--repeats N]

The subject is the linear-Gaussian pair of `pyrovae.LinearGaussian` at its default numbers, one datum. The
table has a line for each estimator, from light tails to heavy: coverage of tr Cov, of its ratio to the plain
estimator with the same noise, and of the signal-to-noise ratio. The tails are the kurtosis of a draw's
squared distance from the mean, over all repeats; that of a normal distribution would be 3.

`--slopes` is about the slope of log SNR in log K of iwae's encoder, K = 1, 4, 16, 64, where q is the prior: how
many measurements resolve it, and how many of the intervals that are printed then hold the slope of a long run.

With 1,000 repeats, a coverage of 95 % is found between 93.6 and 96.4 % in 95 of 100 calls.
"""

import math
from collections.abc import Iterator

import click
import numpy as np
import torch

from pyrovae.estimators import AnalyticKL, Elbo, Estimator, Iwae, Rloo, RunningMean, StickingTheLanding
from pyrovae.variance.intervals import Slope, slope
from pyrovae.variance.testbed import LinearGaussian
from tests.linear_gaussian import Copies, runs, stats_of

ENCODER, PARTICLES = ("mu", "rho"), (1, 4, 16, 64)
TRUE_DRAWS, TRUE_SEED = 2**20, 10**6  # of the run that a slope is compared with


def centred(value: float) -> RunningMean:
    """The score function with this baseline."""
    estimator = RunningMean()
    estimator.mean = torch.tensor(value, dtype=torch.float64)
    return estimator


def cases(subject: LinearGaussian) -> dict[str, tuple[Estimator, Estimator]]:
    """By name, an estimator and what its ratio is taken to."""
    score, baseline = Elbo(use_rep=False), centred(subject.elbo)
    return {
        "elbo": (Elbo(), AnalyticKL()),
        "analytic-kl": (AnalyticKL(), Elbo()),
        "stl": (StickingTheLanding(), Elbo()),
        "elbo:score": (score, Elbo()),
        "rloo, K = 4": (Rloo(num_particles=4), Elbo(num_particles=4)),
        "rloo, K = 2": (Rloo(num_particles=2), Elbo(num_particles=2)),
        "baseline": (baseline, Elbo()),
        "baseline, to elbo:score": (baseline, score),
    }


def true_snr(subject: LinearGaussian, estimator: Estimator) -> float:
    truth = subject.truth(estimator)
    return math.sqrt(sum(mean**2 for mean in truth.mean.values()) / sum(truth.variance.values()))


def coverage_of(
    subject: LinearGaussian, estimator: Estimator, plain: Estimator, draws: int, repeats: int
) -> tuple[float, list[float]]:
    """The kurtosis of distances, and coverage in percent."""
    true, reference = (sum(subject.truth(e).variance.values()) for e in (estimator, plain))
    truths = true, true / reference, true_snr(subject, estimator)
    held, distances = np.zeros(3), []
    for stats, theirs in zip(*(runs(e, draws, repeats, subject) for e in (estimator, plain)), strict=True):
        found = stats.interval(), stats.ratio(theirs)[1:], stats.snr_interval()
        held += [low <= truth <= high for truth, (low, high) in zip(truths, found, strict=True)]
        distances.append(stats.distances["encoder"])
    around = np.concatenate(distances) - true
    return float((around**4).mean() / (around**2).mean() ** 2), list(100 * held / repeats)


def slopes_of(subject: LinearGaussian, draws: int, seeds: range) -> Iterator[Slope]:
    """The slope of each measurement."""
    for seed in seeds:
        ratios, intervals = [], []
        for k in PARTICLES:
            gradients = Copies(subject, draws).gradients_of(Iwae(num_particles=k), seed)
            stats = stats_of(torch.stack([gradients[name] for name in ENCODER], dim=1))
            ratios.append(stats.snr())
            intervals.append(stats.snr_interval())
        yield slope(PARTICLES, ratios, intervals)


@click.command()
@click.option("--draws", multiple=True, type=int, default=(256,), show_default=True, help="Of each gradient.")
@click.option("--repeats", default=1000, show_default=True, help="Measurements of each number.")
@click.option("--slopes", is_flag=True, help="Measure slopes of signal-to-noise ratios.")
def main(draws: tuple[int, ...], repeats: int, slopes: bool) -> None:
    """Measure the coverage of the laboratory's intervals."""
    if slopes:
        subject = LinearGaussian(x=2.0, mu=0.0, s=1.0)
        (true,) = slopes_of(subject, TRUE_DRAWS, range(TRUE_SEED, TRUE_SEED + 1))
        click.echo(f"slope of a run of {TRUE_DRAWS:,} draws: {true.value:.3f} {true.interval}")
        for n in draws:
            found = [s for s in slopes_of(subject, n, range(repeats)) if not s.unresolved]
            held = sum(s.interval[0] <= true.value <= s.interval[1] for s in found)
            mean = np.mean([s.value for s in found]) if found else math.nan
            click.echo(f"{n:>7,} draws: {len(found)} of {repeats} resolved, mean {mean:.3f}, {held} hold it")
        return
    subject = LinearGaussian()
    click.echo(f"{'estimator':<24}{'draws':>7}{'tails':>8}{'tr Cov':>8}{'ratio':>8}{'SNR':>8}")
    for name, (estimator, plain) in cases(subject).items():
        for n in draws:
            tails, percent = coverage_of(subject, estimator, plain, n, repeats)
            click.echo(f"{name:<24}{n:>7}{tails:>8.0f}" + "".join(f"{p:>8.1f}" for p in percent))


if __name__ == "__main__":
    main()

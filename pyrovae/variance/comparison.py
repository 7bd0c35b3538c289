"""Gradient estimators side by side: one row of measurements for each of them and each number of particles."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from pyrovae.estimators import Estimator
from pyrovae.programs.pairs import untouched
from pyrovae.runtime.errors import FieldError
from pyrovae.variance.bench import Bench, Key
from pyrovae.variance.names import USUAL, parse
from pyrovae.variance.results import Comparison, Row, snr_slopes
from pyrovae.variance.stats import GradientStats, Parts
from pyrovae.variance.testbed import LinearGaussian


def compare(
    model: Callable,
    guide: Callable,
    x: Tensor,
    estimators: Sequence[str] = USUAL,
    *,
    particles: Sequence[int] = (1, 4, 16, 64),
    draws: int = 256,
    seed: int = 0,
    parts: Parts | None = None,
    alpha: float | None = None,
    batches: Sequence[Tensor] = (),
    exact: LinearGaussian | None = None,
    settings: Mapping[str, Any] | None = None,
    compile: bool = False,
    progress: Callable[[int, int, str], Any] = lambda done, total, what: None,
) -> Comparison:
    """Measures estimators at these parameters on this batch, with common noise.

    Baselines are fitted to the batch for WARMUP draws and then held. Every estimator is tested for
    bias against an independent run of a reference that it names, with other noise and twice the draws,
    or against exact gradients. An estimator that names none is measured, and not tested.

    Args:
        model, guide: As for `gradient_moments`.
        x: The batch.
        estimators: Names as `parse` reads them, of which those that apply are measured.
        particles: Each is a row of each estimator that takes it.
        draws: Of each gradient.
        seed: Of the noise.
        parts: Groups of parameters.
        alpha: The order of `renyi`.
        batches: Further batches, over which the mean gradient's own variance is found.
        exact: The test-bed that the pair is of, whose truth stands beside every row.
        settings: What else belongs into the record.
        compile: As for `gradient_moments`.
        progress: Called with the gradients drawn so far, their total, and what is being measured.

    Raises:
        ValueError: An unknown estimator, a bad number, or none that was named applies.
    """
    if not particles or min(particles) < 1:
        raise FieldError(
            f"expected particles of at least 1, got {', '.join(map(str, particles)) or 'none'}",
            field="particles",
        )
    with untouched(model, guide):
        bench = Bench(model, guide, x, draws, seed, parts, exact, compile, alpha)
        candidates, skipped = _candidates(estimators, particles, bench)
        if not candidates:
            raise ValueError(f"expected an estimator that applies, got none: {'; '.join(skipped.values())}")
        references = _with_plain(candidates, bench)
        longs = {long: bench.make(long) for _, long in references.values() if long is not None}
        of_references = sum(bench.draws_for(estimator) for estimator in longs.values())
        total = draws * (len(candidates) + len(batches) * (len(batches) > 1)) + of_references
        counter = _Counter(total, progress)
        fitted, stats, memory = {}, {}, {}
        for key, estimator in candidates.items():
            with_name = counter(f"{key[0]}, K = {key[1]}")
            fitted[key] = bench.fitted(estimator)
            stats[key], memory[key] = bench.moments(fitted[key], draws, seed, with_name)
        truths = {key: bench.long_run(estimator, counter("reference")) for key, estimator in longs.items()}
        seconds = bench.timed(fitted)
        rows = []
        for key, estimator in fitted.items():
            plain, long = references[key]
            bias, verdict = bench.verdict(estimator, stats[key], truths.get(long), len(fitted))
            evaluations = bench.evaluations(estimator)
            rows.append(
                Row(
                    estimator=key[0],
                    particles=key[1],
                    verdict=verdict,
                    bias=bias,
                    seconds=seconds[key],
                    evaluations=evaluations,
                    work=stats[key].tr_cov() * seconds[key],
                    work_evaluations=stats[key].tr_cov() * evaluations,
                    peak_memory=memory[key],
                    truth=bench.truth(estimator, fitted.get(plain)),
                    **_ratio(stats[key], plain, stats),
                    **_summary(stats[key]),
                )
            )
        between = bench.between_batches(batches, counter("other batches")) if len(batches) > 1 else {}
    record = dict(settings or {}) | bench.settings() | {"draws": draws, "seed": seed}
    return Comparison(rows, skipped, snr_slopes(rows), between, record)


def _with_plain(candidates: dict[Key, Estimator], bench: Bench) -> dict[Key, tuple[Key | None, Key | None]]:
    """The references of all candidates, to which it adds the plain estimators that nobody has named.

    A ratio's denominator is measured, whether it is listed or not.
    """
    references = {key: bench.references(estimator) for key, estimator in candidates.items()}
    for plain, _ in list(references.values()):
        if plain is not None:
            candidates.setdefault(plain, bench.make(plain))
            references.setdefault(plain, bench.references(candidates[plain]))
    return references


def _ratio(stats: GradientStats, plain: Key | None, every: Mapping[Key, GradientStats]) -> dict[str, Any]:
    """What a row says of its reference."""
    if plain is None:
        return {"reference": "", "ratio": math.nan, "ratio_interval": (math.nan, math.nan)}
    ratio, *interval = stats.ratio(every[plain])
    return {"reference": plain[0], "ratio": ratio, "ratio_interval": tuple(interval)}


def _summary(stats: GradientStats) -> dict[str, Any]:
    """What a row says of its moments alone."""
    squared_norm = stats.squared_norm()
    return {
        "tr_cov": stats.tr_cov(),
        "tr_cov_interval": stats.interval(),
        "relative": stats.tr_cov() / squared_norm if squared_norm > 0 else math.inf,
        "mean_variance": stats.tr_cov() / stats.num_parameters,
        "largest_variance": stats.largest_variance(),
        "snr_encoder": stats.snr("encoder"),
        "snr_decoder": stats.snr("decoder"),
        "snr_encoder_interval": stats.snr_interval("encoder"),
        "snr_decoder_interval": stats.snr_interval("decoder"),
        "noise_floor": stats.noise_floor,
        "effective_draws": stats.effective_draws(),
        "by_group": {group: stats.tr_cov(group) for group in stats.parts},
        "by_group_interval": {group: stats.interval(group) for group in stats.parts},
        "by_parameter": stats.tr_cov_of,
        "looped": stats.looped,
    }


class _Counter:
    """Tells how many of all gradients have been drawn, and what for."""

    def __init__(self, total: int, progress: Callable[[int, int, str], Any]):
        self.done, self.total, self.progress = 0, total, progress

    def __call__(self, what: str) -> Callable[[int], None]:
        def count(number: int) -> None:
            self.done += number
            self.progress(self.done, self.total, what)

        count(0)
        return count


def _candidates(
    labels: Sequence[str], particles: Sequence[int], bench: Bench
) -> tuple[dict[Key, Estimator], dict[str, str]]:
    """Those that take the number of particles and the pair; of the others, why not."""
    candidates: dict[Key, Estimator] = {}
    skipped: dict[str, str] = {}
    for label in dict.fromkeys(labels):
        parse(label)  # a name that is wrong is no estimator that does not apply
        for k in dict.fromkeys(particles):
            try:
                estimator = bench.make((label, k))
            except ValueError as error:
                skipped.setdefault(label, str(error))
                continue
            try:
                bench.check(estimator)
            except ValueError as error:
                skipped[label] = str(error).split("\n")[0]  # what the pair lacks says more than a K
            else:
                candidates[label, k] = estimator
        if any(key[0] == label for key in candidates):
            skipped.pop(label, None)
    return candidates, skipped

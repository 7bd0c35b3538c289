"""Gradient estimators side by side: one row of measurements for each of them and each number of particles."""

import copy
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from pyrovae.estimators import ESTIMATORS, Elbo, Enumerate, Estimator, Iwae, Renyi, Rws
from pyrovae.estimators.layout import plates_of
from pyrovae.programs.pairs import modules_of, parameters_of, untouched
from pyrovae.runtime.random_states import seeded
from pyrovae.runtime.schemas import BetweenBatches, Compared, Measured, check, converted
from pyrovae.runtime.texts import to_csv
from pyrovae.variance.bias import BiasTest, check_bias
from pyrovae.variance.intervals import Slope, slope
from pyrovae.variance.moments import GradientStats, Parts, gradient_moments
from pyrovae.variance.per_draw import layout_of
from pyrovae.variance.testbed import LinearGaussian

WARMUP = 200  # draws that a baseline is fitted to before it is held
REFERENCE_PARTICLES = 16  # of the long run that an estimator of the ELBO is compared with
FALSE_ALARM = 1e-3  # that any unbiased estimator of a table is called biased
TIMINGS = 7  # of one gradient, whose median is reported


@dataclass(frozen=True)
class Row:
    """One estimator with so many particles.

    Attributes:
        estimator: Its name, as `parse` reads it.
        particles: K.
        verdict: "unbiased", "biased", or why that was not tested.
        bias: The test behind the verdict, None where there was none.
        tr_cov: The trace of the covariance of one draw of the gradient, all parameters together.
        tr_cov_interval: Its 95 % confidence interval.
        reference: The plain estimator of the same bound.
        ratio: tr_cov over that of the reference with as many particles; nan where there is none.
        ratio_interval: Its 95 % confidence interval.
        relative: tr_cov over ||mean||^2.
        mean_variance: Of an entry of the gradient.
        largest_variance: Of all entries.
        snr_encoder: ||mean|| / sqrt(tr Cov) of the guide's parameters.
        snr_decoder: The same of the model's.
        noise_floor: A ratio below this cannot be told from zero.
        seconds: For one draw of the gradient, by a plain backward pass: a median.
        evaluations: Of the decoder for one datum, in one draw.
        work: tr_cov times seconds: what a given precision costs.
        work_evaluations: tr_cov times evaluations, the same where the decoder is all that costs.
        peak_memory: In bytes, on a GPU; None on a CPU.
        by_group: tr_cov by group of parameters.
        by_group_interval: Their 95 % confidence intervals.
        by_parameter: tr_cov by parameter.
        looped: Why draws were taken one by one, or "".
        truth: Exact values of tr_cov, ratio, snr_encoder and snr_decoder where they are known.
        snr_encoder_interval: The 95 % confidence interval of snr_encoder, from 0 on where it cannot be told
            from zero.
        snr_decoder_interval: The same of snr_decoder.
        effective_draws: How many of the draws hold the noise; see `GradientStats.effective_draws`.
    """

    estimator: str
    particles: int
    verdict: str
    bias: BiasTest | None
    tr_cov: float
    tr_cov_interval: tuple[float, float]
    reference: str
    ratio: float
    ratio_interval: tuple[float, float]
    relative: float
    mean_variance: float
    largest_variance: float
    snr_encoder: float
    snr_decoder: float
    noise_floor: float
    seconds: float
    evaluations: int
    work: float
    work_evaluations: float
    peak_memory: int | None
    by_group: dict[str, float]
    by_group_interval: dict[str, tuple[float, float]]
    by_parameter: dict[str, float]
    looped: str
    truth: dict[str, float] = field(default_factory=dict)
    snr_encoder_interval: tuple[float, float] = (math.nan, math.nan)
    snr_decoder_interval: tuple[float, float] = (math.nan, math.nan)
    effective_draws: float = math.nan


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        rows: In the order of estimators, then particles.
        skipped: Estimators that do not apply, and why.
        slopes: The slopes of log SNR in log K, by estimator and by "encoder" and "decoder"; see `snr_slopes`.
        between_batches: The trace of the covariance of the mean gradient over batches, where several
            were given, and that of the noise within one, both of the estimator named, with its least K.
        settings: How this was measured.
    """

    rows: list[Row]
    skipped: dict[str, str]
    slopes: dict[str, dict[str, Slope]]
    between_batches: dict[str, Any]
    settings: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain types, for `from_json`; None for what is not finite, which JSON does not have."""
        return _finite(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, contents: dict[str, Any]) -> "Comparison":
        """The inverse of `to_json`, but that what is not finite comes back as nan.

        Raises:
            ValueError: It is not what `to_json` gives.
        """
        check(contents, Compared)
        rows = []
        for row in contents["rows"]:
            kept = {name: row[name] for name in ("bias", "peak_memory") if row[name] is None}
            rows.append(_restored(row) | kept)
        between = _restored(contents["between_batches"])
        found = converted(contents | {"rows": rows, "slopes": {}, "between_batches": between}, cls)
        check(found.settings, Measured)
        if between:
            check(between, BetweenBatches)
        with np.errstate(invalid="raise"):  # a negative SNR, say
            return dataclasses.replace(found, slopes=snr_slopes(found.rows))

    def to_csv(self) -> str:
        """One line per row, with what is a number or a name; the settings in every line."""
        lines = []
        for row in self.rows:
            line: dict[str, Any] = {}
            for name, value in dataclasses.asdict(row).items():
                if isinstance(value, tuple):
                    line |= {f"{name}_low": value[0], f"{name}_high": value[1]}
                elif name in ("bias", "truth", "by_group"):
                    line |= {f"{name}_{key}": v for key, v in (value or {}).items()}
                elif name == "by_group_interval":
                    for group, (low, high) in value.items():
                        line |= {f"by_group_{group}_low": low, f"by_group_{group}_high": high}
                elif name != "by_parameter":
                    line[name] = value
            lines.append(line | {name: str(value) for name, value in self.settings.items()})
        return to_csv(lines)


def parse(text: str) -> tuple[type[Estimator], dict[str, bool]]:
    """An estimator's name with what differs from its defaults: `iwae`, `iwae:score`, `stl:antithetic`.

    Raises:
        ValueError: There is no such estimator or difference.
    """
    name, *changes = text.split(":")
    if name not in ESTIMATORS:
        raise ValueError(f"expected estimators in {', '.join(ESTIMATORS)}, got {name!r}")
    meanings = {"score": {"use_rep": False}, "pathwise": {"use_rep": True}, "antithetic": {"antithetic": True}}
    settings: dict[str, bool] = {}
    for change in changes:
        if change not in meanings:
            raise ValueError(f"expected {name} with {', '.join(meanings)} after a colon, got {change!r}")
        settings |= meanings[change]
    return ESTIMATORS[name], settings


USUAL = (
    "elbo",
    "elbo:score",
    "analytic-kl",
    "stl",
    "antithetic",
    "running-mean",
    "rloo",
    "disarm",
    "iwae",
    "vimco",
    "dreg",
    "stl-iwae",
)  # what is compared unless others are named


def every_estimator() -> list[str]:
    """The names of all estimators of a bound, with both gradients where there are two."""
    labels = []
    for name, family in ESTIMATORS.items():
        if not family.needs_density:
            continue
        labels.append(name)
        labels += [f"{name}:{'pathwise' if use_rep else 'score'}" for use_rep in family.gradients[1:]]
    return labels


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
    bias against an independent run of the plain estimator of its bound, with other noise and twice
    the draws, or against exact gradients.

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
        raise ValueError(f"expected particles of at least 1, got {', '.join(map(str, particles)) or 'none'}")
    with untouched(model, guide):
        bench = _Bench(model, guide, x, draws, seed, parts, exact, compile)
        candidates, skipped = _candidates(estimators, particles, alpha, bench)
        if not candidates:
            raise ValueError(f"expected an estimator that applies, got none: {'; '.join(skipped.values())}")
        references = {key: bench.reference(estimator) for key, estimator in candidates.items()}
        for plain, _ in list(references.values()):  # what a ratio is taken to is measured, listed or not
            candidates.setdefault(plain, _make(*plain, alpha, bench.nesting))
            references.setdefault(plain, bench.reference(candidates[plain]))
        longs = {
            long: _make(*long, alpha, bench.nesting) for _, long in references.values() if long is not None
        }
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
            ratio, *interval = stats[key].ratio(stats[plain])
            evaluations = bench.evaluations(estimator)
            rows.append(
                Row(
                    estimator=key[0],
                    particles=key[1],
                    verdict=verdict,
                    bias=bias,
                    reference=plain[0],
                    ratio=ratio,
                    ratio_interval=tuple(interval),
                    seconds=seconds[key],
                    evaluations=evaluations,
                    work=stats[key].tr_cov() * seconds[key],
                    work_evaluations=stats[key].tr_cov() * evaluations,
                    peak_memory=memory[key],
                    truth=bench.truth(estimator, fitted[plain]),
                    **_summary(stats[key]),
                )
            )
        between = bench.between_batches(batches, counter("other batches")) if len(batches) > 1 else {}
    record = dict(settings or {}) | bench.settings() | {"draws": draws, "seed": seed}
    return Comparison(rows, skipped, snr_slopes(rows), between, record)


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


def snr_slopes(rows: Iterable[Row]) -> dict[str, dict[str, Slope]]:
    """The slopes of log SNR in log K by least squares, of the estimators that were measured at several K.

    As K grows, the pathwise importance-weighted gradient falls as K^-1/2 in phi and rises as K^1/2 in
    theta (Tighter Variational Bounds are Not Necessarily Better, Rainforth et al., 2018,
    https://arxiv.org/abs/1802.04537, theorem 1); the doubly reparameterized one rises in both.
    """
    slopes: dict[str, dict[str, Slope]] = {}
    rows = list(rows)
    for label in dict.fromkeys(row.estimator for row in rows):
        for group in ("encoder", "decoder"):
            points = [
                (row.particles, getattr(row, f"snr_{group}"), getattr(row, f"snr_{group}_interval"))
                for row in rows
                if row.estimator == label and getattr(row, f"snr_{group}") < math.inf
            ]
            if len({particles for particles, *_ in points}) > 1:
                slopes.setdefault(label, {})[group] = slope(*map(list, zip(*points, strict=True)))
    return slopes


def _make(label: str, k: int, alpha: float | None, nesting: int = 1) -> Estimator:
    family, settings = parse(label)
    extra = {"alpha": alpha} if alpha is not None and family is Renyi else {}
    return family(num_particles=k, max_plate_nesting=nesting, **settings, **extra)


Key = tuple[str, int]  # an estimator's name, and K


def _candidates(
    labels: Sequence[str], particles: Sequence[int], alpha: float | None, bench: "_Bench"
) -> tuple[dict[Key, Estimator], dict[str, str]]:
    """Those that take the number of particles and the pair; of the others, why not."""
    candidates: dict[Key, Estimator] = {}
    skipped: dict[str, str] = {}
    for label in dict.fromkeys(labels):
        parse(label)  # a name that is wrong is no estimator that does not apply
        for k in dict.fromkeys(particles):
            try:
                estimator = _make(label, k, alpha, bench.nesting)
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


class _Count(Messenger):
    """Counts the particles at which a model's first observed site is evaluated."""

    def __init__(self):
        super().__init__()
        self.name, self.total = None, 0

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if msg["is_observed"]:
            self.name = self.name or msg["name"]
            cells = math.prod(plate.size for plate in plates_of(msg))
            self.total += (msg["name"] == self.name) * msg["fn"].batch_shape.numel() // cells


@dataclass
class _Bench:
    """The pair, its parameters and its batch, on which estimators are measured."""

    model: Callable
    guide: Callable
    x: Tensor
    draws: int
    seed: int
    parts: Parts | None
    exact: LinearGaussian | None
    compile: bool

    def __post_init__(self):
        self.parameters, _ = parameters_of(self.model, self.guide, self.x)
        layout = layout_of(self.model, self.guide, (self.x,), self.x.device)
        self.nesting, self.batch_size = layout.depth, layout.batch_size
        self.reparameterized = self._applies(Elbo())
        self.enumerable = not self.reparameterized and self._applies(Enumerate())

    def _applies(self, estimator: Estimator) -> bool:
        try:
            self.check(estimator)
        except ValueError:
            return False
        return True

    def check(self, estimator: Estimator) -> None:
        """Checks that the estimator takes the pair.

        Raises:
            ValueError: It refuses.
        """
        with seeded(self.seed, self.x.device), pyro.validation_enabled(False), torch.no_grad():
            estimator.surrogate(estimator.draws(self.model, self.guide, self.x))

    def settings(self) -> dict[str, Any]:
        device = self.x.device
        dtype = next(iter(self.parameters.values())).dtype
        return {
            "batch_size": self.batch_size,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "dtype": str(dtype).removeprefix("torch."),
            "parameters": sum(p.numel() for p in self.parameters.values()),
            "baseline_warmup": WARMUP,
            "batch_norm": any(isinstance(module, _BatchNorm) for module in modules_of(self.model, self.guide)),
        }

    def reference(self, estimator: Estimator) -> tuple[Key, Key | None]:
        """The plain estimator of the same bound, and the long run to compare with (None: exact)."""
        k = estimator.num_particles
        kind = "" if self.reparameterized else ":score"
        if estimator.importance_weighted:
            name = "renyi" if isinstance(estimator, Renyi) else "iwae"
            plain = f"{name}{kind}", k
        else:
            plain = f"elbo{kind}", k
        if estimator.importance_weighted and k > 1:
            long = plain if self.reparameterized or name == "renyi" else ("vimco", k)
        elif self.reparameterized:
            long = "elbo", REFERENCE_PARTICLES
        else:
            long = ("enumerate", 1) if self.enumerable else ("rloo", REFERENCE_PARTICLES)
        return plain, long if self._exact_mean(estimator) is None else None

    def fitted(self, estimator: Estimator) -> Estimator:
        """A copy whose baseline has been fitted to the batch."""
        estimator = copy.deepcopy(estimator)
        if estimator.adapts:
            with seeded(self.seed + 2, self.x.device), pyro.validation_enabled(False):
                for _ in range(WARMUP):
                    with torch.no_grad():
                        draws = estimator.draws(self.model, self.guide, self.x)
                        log_weight, observations = draws.log_weight, draws.observations
                    estimator.adapt(log_weight, observations)
        return estimator

    def moments(
        self, estimator: Estimator, draws: int, seed: int, progress: Callable[[int], None]
    ) -> tuple[GradientStats, int | None]:
        on_gpu = self.x.is_cuda
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.x.device)
            held = torch.cuda.memory_allocated(self.x.device)
            self._gradient(estimator)
            peak = torch.cuda.max_memory_allocated(self.x.device) - held
        stats = gradient_moments(
            self.model,
            self.guide,
            estimator,
            self.x,
            draws=draws,
            seed=seed,
            parts=self.parts,
            compile=self.compile,
            progress=progress,
        )
        return stats, peak if on_gpu else None

    def long_run(
        self, estimator: Estimator, progress: Callable[[int], None]
    ) -> GradientStats | dict[str, Tensor]:
        """Of a reference, with other noise and twice the draws; of one without noise, its gradient."""
        stats, _ = self.moments(estimator, self.draws_for(estimator), self.seed + 1, progress)
        return stats.mean if isinstance(estimator, Enumerate) else stats

    def draws_for(self, estimator: Estimator) -> int:
        """So many for a reference."""
        return 4 if isinstance(estimator, Enumerate) else 2 * self.draws

    def _gradient(self, estimator: Estimator) -> None:
        """One draw of the gradient, as training takes it."""
        loss = -estimator.surrogate(estimator.draws(self.model, self.guide, self.x)).mean()
        torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
        if self.x.is_cuda:
            torch.cuda.synchronize(self.x.device)

    def timed(self, estimators: Mapping[Key, Estimator]) -> dict[Key, float]:
        """Seconds for one draw of the gradient: medians of rounds over all of them."""
        times: dict[Key, list[float]] = {key: [] for key in estimators}
        with seeded(self.seed, self.x.device), pyro.validation_enabled(False):
            for _ in range(TIMINGS):
                for key, estimator in estimators.items():
                    started = time.perf_counter()
                    self._gradient(estimator)
                    times[key].append(time.perf_counter() - started)
        return {key: statistics.median(values) for key, values in times.items()}

    def evaluations(self, estimator: Estimator) -> int:
        with seeded(self.seed, self.x.device), _Count() as count:
            estimator.surrogate(estimator.draws(self.model, self.guide, self.x))
        return count.total

    def verdict(
        self,
        estimator: Estimator,
        stats: GradientStats,
        long: GradientStats | dict[str, Tensor] | None,
        comparisons: int,
    ) -> tuple[BiasTest | None, str]:
        """Whether the mean gradient is right; of reweighted wake-sleep, the decoder's."""
        reference = self._exact_mean(estimator) if long is None else long
        wake = isinstance(estimator, Rws) and long is not None  # its own exact mean counts where it is known
        bias = check_bias(
            stats, reference, groups=("decoder",) if wake else ("all",), false_alarm=FALSE_ALARM / comparisons
        )
        verdict = "biased" if bias.biased else "unbiased"
        return bias, f"{verdict} (decoder; phi follows another objective)" if wake else verdict

    def _exact_mean(self, estimator: Estimator) -> dict[str, Tensor] | None:
        truth = None if self.exact is None else self.exact.truth(estimator)
        if truth is None:
            return None
        of_bound = truth if isinstance(estimator, Rws) else self.exact.truth(_plain_of_bound(estimator))
        return None if of_bound is None else _by_parameter(of_bound.mean)

    def truth(self, estimator: Estimator, plain: Estimator) -> dict[str, float]:
        truth, reference = (None if self.exact is None else self.exact.truth(e) for e in (estimator, plain))
        if truth is None or reference is None:
            return {}
        total = sum(truth.variance.values())

        def snr(*names: str) -> float:
            noise = sum(truth.variance[name] for name in names)
            return math.sqrt(sum(truth.mean[name] ** 2 for name in names) / noise) if noise > 0 else math.inf

        return {
            "tr_cov": total,
            "ratio": total / sum(reference.variance.values()),
            "snr_encoder": snr("mu", "rho"),
            "snr_decoder": snr("w", "b"),
        }

    def between_batches(self, batches: Sequence[Tensor], progress: Callable[[int], None]) -> dict[str, Any]:
        """By the law of total variance: that of the mean over batches, and the mean of that within one."""
        label = "elbo" if self.reparameterized else "rloo"
        estimator = ESTIMATORS[label](max_plate_nesting=self.nesting)
        means, within = [], []
        for number, batch in enumerate(batches):
            stats = gradient_moments(
                self.model,
                self.guide,
                estimator,
                batch,
                draws=self.draws,
                seed=self.seed + 3 + number,
                elementwise=False,
                progress=progress,
            )
            means.append(torch.cat([mean.flatten() for mean in stats.mean.values()]))
            within.append(stats.tr_cov())
        noise = statistics.mean(within)
        spread = torch.stack(means).var(0).sum().item()
        return {
            "estimator": label,
            "batches": len(means),
            "within": noise,
            "between": spread - noise / self.draws,
        }


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _restored(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _restored(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(map(_restored, value))
    return math.nan if value is None else value


def _plain_of_bound(estimator: Estimator) -> Estimator:
    k = estimator.num_particles
    if isinstance(estimator, Renyi):
        return Renyi(num_particles=k, alpha=estimator.alpha)
    return Iwae(num_particles=k) if estimator.importance_weighted else Elbo()


def _by_parameter(values: dict[str, float]) -> dict[str, Tensor]:
    """The test-bed's numbers as gradients of its pair's parameters."""
    double = torch.float64
    return {
        "encoder.bias": torch.tensor([values["mu"], values["rho"]], dtype=double),
        "decoder.weight": torch.tensor([[values["w"]]], dtype=double),
        "decoder.bias": torch.tensor([values["b"]], dtype=double),
    }

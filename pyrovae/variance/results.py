"""What a comparison of estimators found: its rows, as JSON and as CSV, and slopes over K."""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pyrovae.runtime.schemas import BetweenBatches, Compared, Measured, check, converted
from pyrovae.runtime.texts import to_csv
from pyrovae.variance.bias import BiasTest
from pyrovae.variance.intervals import Slope, slope


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
        reference: The plain estimator of the same bound, or "" where the estimator names none.
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

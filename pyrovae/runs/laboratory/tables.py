"""A comparison of estimators as text: a title, a table, and notes on what the numbers mean."""

import math

from pyrovae.variance.bias import BiasTest
from pyrovae.variance.intervals import Slope
from pyrovae.variance.results import Comparison

FEW_DRAWS = 30  # effective ones, below which intervals hold less than they say


def title(comparison: Comparison, over_training: bool = False) -> str:
    """Names everything that all numbers of a comparison are conditional on."""
    s = comparison.settings
    what = (
        s.get("testbed")
        or f"{s['dataset']}, {s['likelihood']}, {s['guide']}, {s['latent_dim']} latent dimensions"
    )
    when = f" after epoch {s['epoch']}" if "epoch" in s and not over_training else ""
    return (
        f"{what}{when}; one batch of {s['batch_size']}, {s['draws']} draws, seed {s['seed']}, "
        f"{s['device']}, {s['dtype']}"
    )


def table(comparison: Comparison) -> str:
    """The comparison as text, one line per row."""
    lines = rows(comparison)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [title(comparison)]
    for line in lines:
        cells = [
            cell.ljust(w) if i in (0, 2) else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ]
        text.append("  ".join(cells).rstrip())
    return "\n".join(text + notes(comparison))


def rows(comparison: Comparison) -> list[list[str]]:
    """The table's cells, a head first."""
    head = [
        "estimator",
        "K",
        "bias",
        "found from",
        "tr Cov [95 %]",
        "ratio [95 %]",
        "SNR enc",
        "SNR dec",
        "ms/draw",
        "work",
    ]
    lines = [head]
    known = any(row.truth for row in comparison.rows)
    for row in comparison.rows:
        cells = {
            "tr_cov": _with_interval(row.tr_cov, row.tr_cov_interval),
            "ratio": _with_interval(row.ratio, row.ratio_interval),
            "snr_encoder": _snr(row.snr_encoder, row.snr_encoder_interval),
            "snr_decoder": _snr(row.snr_decoder, row.snr_decoder_interval),
        }
        if known:
            cells = {
                name: f"{cell} ({f'{row.truth[name]:.3g}' if row.truth else 'unknown'})"
                for name, cell in cells.items()
            }
        cost = f"{1e3 * row.seconds:.2f}", f"{row.work:.3g}"
        found_from = _found_from(row.bias)
        lines.append([row.estimator, str(row.particles), row.verdict, found_from, *cells.values(), *cost])
    return lines


def _found_from(bias: BiasTest | None) -> str:
    """The bias that a test would have found, as a part of ||mean|| where that is known, else in nats."""
    if bias is None:
        return ""
    return f"{100 * bias.relative:.2g} %" if bias.relative < math.inf else f"{bias.detectable:.2g}"


def _snr(value: float, interval: tuple[float, float]) -> str:
    return f"< {interval[1]:.2g}" if interval[0] == 0 else f"{value:.2f}"


def _slope(found: Slope) -> str:
    if found.unresolved:
        particles = ", ".join(map(str, found.unresolved))
        return f"not resolved (SNR at K = {particles} cannot be told from zero; take more draws)"
    return f"{found.value:+.2f} [{found.interval[0]:+.2f}, {found.interval[1]:+.2f}]"


def _with_interval(value: float, interval: tuple[float, float]) -> str:
    return f"{value:.3g} [{interval[0]:.3g}, {interval[1]:.3g}]"


def notes(comparison: Comparison) -> list[str]:
    """Explains the numbers, and names estimators that were not measured, a line each."""
    rows, between = comparison.rows, comparison.between_batches
    plain = ", ".join(dict.fromkeys(row.reference for row in rows if row.reference))
    lines = [
        f"ratio: to {plain} of the same bound and K, under common noise. work: tr Cov x seconds per draw.",
        "found from: the bias that the test finds with probability 0.95, as a part of ||mean||.",
        "SNR: ||mean|| / sqrt(tr Cov); with < where it cannot be told from zero, the end of its interval.",
    ]
    if any(row.truth for row in rows):
        lines.append("in brackets (): the exact value.")
    for label, slopes in comparison.slopes.items():
        if label in ("iwae", "dreg", "vimco"):
            each = "; ".join(f"{group} {_slope(found)}" for group, found in slopes.items())
            lines.append(f"slope of log SNR in log K [95 %], {label}: {each}")
    few = dict.fromkeys(row.estimator for row in rows if row.effective_draws < FEW_DRAWS)
    if few:
        lines.append(
            f"a few draws hold most of the noise of {', '.join(few)}: intervals meant to hold 95 % are known "
            "to hold 91 to 95 % for tr Cov, 71 to 94 % for ratios, 72 to 90 % for SNR; more draws mend it."
        )
    if between:
        lines.append(
            f"over {between['batches']} batches: tr Cov of the mean gradient {between['between']:.3g}, "
            f"beside {between['within']:.3g} of the noise within one ({between['estimator']})"
        )
    if comparison.settings["batch_norm"]:
        lines.append("batch norm uses its running statistics, so that data do not touch each other.")
    looped = {row.looped for row in rows if row.looped}
    lines += [f"slower, one draw at a time: {reason}" for reason in sorted(looped)]
    reasons: dict[str, list[str]] = {}
    for label, reason in comparison.skipped.items():
        reasons.setdefault(reason.split(", got")[0], []).append(label)
    lines += [f"not measured: {', '.join(labels)}: {reason}" for reason, labels in reasons.items()]
    return lines

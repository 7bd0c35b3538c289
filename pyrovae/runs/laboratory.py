"""The variance laboratory: estimators compared on a trained run, a fresh one, along one, or on a test-bed.

It leaves a directory with `variance.json`, `variance.csv` and `variance.png`.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from pyrovae.data.datasets import Dataset
from pyrovae.figures import figures
from pyrovae.runs.config import COMPILE, LONG, Config
from pyrovae.runs.directories import RunError, new_directory, read_config
from pyrovae.runs.training import load
from pyrovae.runtime.inputs import check_count
from pyrovae.runtime.random_states import seeded
from pyrovae.runtime.schemas import Best, OfModel, check, refused
from pyrovae.runtime.whole_files import save_figure, write_atomically
from pyrovae.training import fit
from pyrovae.training.checkpoints import load_checkpoint
from pyrovae.vae import VAE
from pyrovae.variance.bias import BiasTest
from pyrovae.variance.comparison import USUAL, Comparison, compare
from pyrovae.variance.intervals import Slope
from pyrovae.variance.testbed import LinearGaussian

TESTBEDS = {"linear-gaussian": LinearGaussian}
FEW_DRAWS = 30  # effective ones, below which intervals hold less than they say


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What to measure, and how well.

    Attributes:
        estimators: Names as `comparison.parse` reads them.
        particles: Values of K.
        draws: Of each gradient.
        batch_size: Validation images in the batch that all is conditional on.
        batches: Such batches over which the mean gradient's own variance is found; 0 to leave it out.
        seed: Of the noise and of stochastic binarization.
        alpha: The order of `renyi`.
        compile: Whether to compile programs whose draws are taken one by one: "on", "off", or "auto", where
            there are enough draws to repay it.
        quiet: No progress bar.

    Raises:
        ValueError: A number is out of range.
    """

    estimators: tuple[str, ...] = USUAL
    particles: tuple[int, ...] = (1, 4, 16, 64)
    draws: int = 256
    batch_size: int = 16
    batches: int = 4
    seed: int = 0
    alpha: float | None = None
    compile: str = "auto"
    quiet: bool = True

    def __post_init__(self):
        least = {"draws": 16, "batch_size": 1, "batches": 0}
        for name, value in least.items():
            check_count(name, getattr(self, name), value)
        if not self.particles or min(self.particles) < 1:
            raise ValueError(f"expected particles of at least 1, got {','.join(map(str, self.particles))}")
        check_count("particles", max(self.particles))
        if self.compile not in COMPILE:
            raise ValueError(f"expected compile in {', '.join(COMPILE)}, got {self.compile!r}")
        check_count("seed", self.seed, least=0)

    def of_vae(self, vae: VAE, dataset: Dataset, settings: dict[str, Any] | None = None) -> Comparison:
        """At the VAE's parameters, on the first validation images; settings go into the record."""
        if not vae.posterior.density:
            raise ValueError("expected a VAE, got an autoencoder, which has no ELBO to take gradients of")
        device = vae.zeros.device
        with seeded(self.seed, device):
            images = dataset.validation[: self.batch_size * max(1, self.batches)].to(device)
            vae.check(images, "validation")
            starts = range(0, len(images), self.batch_size)
            parts = [images[start : start + self.batch_size] for start in starts]
            x, *others = (vae.observe(part.pixels.flatten(1), part.labels) for part in parts)
        batches = [batch for batch in (x, *others) if len(batch) == len(x)][: self.batches]
        record = (settings or {}) | {"beta": vae.beta}  # which a warm-up changes from epoch to epoch
        return self._compare(vae, x, parts=vae.parts(), batches=batches, settings=record)

    def of_testbed(self, case: LinearGaussian) -> Comparison:
        """On a pair whose gradients are known exactly."""
        x = torch.full((1, 1), case.x, dtype=torch.float64)
        pair = case.pair()
        return self._compare(pair, x, parts=pair.parts(), exact=case, settings={"testbed": repr(case)})

    def of_run(self, run: str | Path, config: Config | None = None, *, trust: bool = False) -> Comparison:
        """At a trained run's best parameters.

        Args:
            config: The run's settings, which may say where this is done and where the data lie.
            trust: Whether to import foreign code that the run names.
        """
        config = config or read_config(Path(run))[0]
        vae = load(run, device=config.device(), trust=trust)
        epoch = load_checkpoint(Path(run) / "best.pt", "cpu", holds=Best)["epoch"]
        return self.of_vae(vae, config.make_dataset(), {"run": str(run), "epoch": epoch} | _described(config))

    def of_config(self, config: Config) -> Comparison:
        """At a new run's parameters before training."""
        dataset = config.make_dataset()
        vae = config.make_vae_for(dataset).to(config.device())
        return self.of_vae(vae, dataset, {"epoch": 0} | _described(config))

    def along(self, config: Config, epochs: tuple[int, ...]) -> dict[int, Comparison]:
        """At epochs of one training run, 0 being its start; the run is trained for it, as its seed has it.

        Raises:
            ValueError: An epoch is below 0.
        """
        if min(epochs) < 0:
            raise ValueError(f"expected at of epochs >= 0, got {min(epochs)}")
        check_count("at", max(epochs), least=0)
        dataset = config.make_dataset()
        config = config.resolved(dataset.levels)
        vae = config.make_vae_for(dataset).to(config.device())
        on_device = dataset.to(config.device())
        found: dict[int, Comparison] = {}

        def measure(epoch: int) -> None:
            if epoch in epochs:
                found[epoch] = self.of_vae(vae, dataset, {"epoch": epoch} | _described(config))

        measure(0)
        if max(epochs) > 0:
            fit(
                vae,
                on_device.train,
                on_device.validation,
                estimator=config.make_estimator(),
                epochs=max(epochs),
                batch_size=config.batch_size,
                lr=config.lr,
                kl_warmup=config.kl_warmup,
                seed=config.seed,
                compile=config.compile == "on",
                bf16=config.bf16,
                on_epoch=measure,
                quiet=self.quiet,
            )
        return found

    def _compare(self, pair: Any, x: torch.Tensor, **settings: Any) -> Comparison:
        interval = 0.2 if os.isatty(2) else 10
        with tqdm(unit="draw", disable=self.quiet, dynamic_ncols=True, mininterval=interval, delay=0.5) as bar:

            def progress(done: int, total: int, what: str) -> None:
                bar.total = total
                bar.set_description(what, refresh=False)
                bar.update(done - bar.n)

            model, guide = (pair.model, pair.guide) if settings.get("exact") else pair.pair
            return compare(
                model,
                guide,
                x,
                self.estimators,
                particles=self.particles,
                draws=self.draws,
                seed=self.seed,
                alpha=self.alpha,
                compile=self.compile == "on" or (self.compile == "auto" and self.draws >= LONG),
                progress=progress,
                **settings,
            )


def _described(config: Config) -> dict[str, Any]:
    names = ("dataset", "likelihood", "network", "guide", "latent_dim", "beta")
    return {name: getattr(config, name) for name in names} | {"model_seed": config.seed}


def write(directory: Path, found: Comparison | dict[int, Comparison]) -> None:
    """`variance.json`, `variance.csv` and `variance.png`; by epoch, also a figure over training."""
    by_epoch = found if isinstance(found, dict) else {None: found}
    contents = {e: c.to_json() for e, c in by_epoch.items()} if isinstance(found, dict) else found.to_json()
    write_atomically(directory / "variance.json", json.dumps(contents, indent=2) + "\n")
    texts = [comparison.to_csv() for comparison in by_epoch.values()]
    rest = [text.split("\n", 1)[1] for text in texts[1:]]
    write_atomically(directory / "variance.csv", "".join([texts[0], *rest]))
    for epoch, comparison in by_epoch.items():
        name = "variance" if epoch is None else f"variance-{epoch:04}"
        figure = figures.variance(comparison.rows, comparison.slopes, title(comparison))
        save_figure(figure, directory / f"{name}.png")
    if isinstance(found, dict):
        rows = {epoch: comparison.rows for epoch, comparison in found.items()}
        first = next(iter(found.values()))
        figure = figures.variance_over_training(rows, title(first, over_training=True))
        save_figure(figure, directory / "variance-over-training.png")


def read(directory: Path) -> Comparison | dict[int, Comparison]:
    """The numbers that `write` left in a directory.

    Raises:
        RunError: They are damaged, or of another version.
    """
    path = directory / "variance.json"
    with refused(RunError, f"what variance writes in {path}", "; measure again"):
        contents = json.loads(path.read_bytes())
        check(contents, dict[str, Any])
        if "rows" in contents or not contents:
            return _titled(contents)
        return {int(epoch): _titled(one) for epoch, one in contents.items()}


def _titled(contents: dict[str, Any]) -> Comparison:
    found = Comparison.from_json(contents)
    if not found.settings.get("testbed"):
        check(found.settings, OfModel)
    return found


def title(comparison: Comparison, over_training: bool = False) -> str:
    """What all numbers of a comparison are conditional on."""
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


def directory_for(run: str | Path | None, out: str | Path | None) -> Path:
    """Where results go: `out`, or else a new directory in the run or under runs/.

    Raises:
        RunError: There is no such place.
    """
    return new_directory(Path(run or "runs") / "variance", out)


@contextlib.contextmanager
def results_directory(run: str | Path | None, out: str | Path | None) -> Iterator[Path]:
    """The same, made before anything is measured; gone again if it stays empty."""
    if run is not None:
        read_config(Path(run))  # no directory is made in what is no run
    place = Path(out if out is not None else run or "runs")
    made = [path for path in (place, *place.parents) if not path.exists()]
    directory = directory_for(run, out)
    try:
        yield directory
    finally:
        if not any(directory.iterdir()):
            for path in made if out is not None else (directory, *made):
                with contextlib.suppress(OSError):  # someone else's by now
                    path.rmdir()


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
    """What the numbers mean, and what was not measured, a line each."""
    rows, between = comparison.rows, comparison.between_batches
    plain = ", ".join(dict.fromkeys(row.reference for row in rows))
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

"""Measures the noise of gradient estimators: on a run, a new model, along a training run, or on a test-bed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pyrovae.data.datasets import Dataset
from pyrovae.runs.config import COMPILE, LONG, Config
from pyrovae.runs.directories import read_config
from pyrovae.runs.loading import load
from pyrovae.runs.progress import progress_bar
from pyrovae.runtime.errors import FieldError
from pyrovae.runtime.inputs import check_count
from pyrovae.runtime.random_states import seeded
from pyrovae.runtime.schemas import Best
from pyrovae.training.checkpoints import load_checkpoint
from pyrovae.training.fitting import fit
from pyrovae.vae import VAE
from pyrovae.variance.comparison import compare
from pyrovae.variance.names import USUAL
from pyrovae.variance.results import Comparison
from pyrovae.variance.testbed import LinearGaussian

TESTBEDS = {"linear-gaussian": LinearGaussian}


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A comparison of gradient estimators: which of them, and how exactly.

    Attributes:
        estimators: Names as `comparison.parse` reads them.
        particles: Values of K.
        draws: The number of draws of each gradient.
        batch_size: The number of validation images in the batch on which all numbers are conditional.
        batches: The number of such batches over which the mean gradient's own variance is found; 0 for none.
        seed: The seed of the noise and of stochastic binarization.
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
            raise FieldError(
                f"expected particles of at least 1, got {','.join(map(str, self.particles))}", field="particles"
            )
        check_count("particles", max(self.particles))
        if self.compile not in COMPILE:
            raise FieldError(f"expected compile in {', '.join(COMPILE)}, got {self.compile!r}", field="compile")
        check_count("seed", self.seed, least=0)

    def of_vae(self, vae: VAE, dataset: Dataset, settings: dict[str, Any] | None = None) -> Comparison:
        """Measures at the VAE's parameters, on the first validation images. The record has the settings."""
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
        """Measures on a pair whose gradients are known exactly."""
        x = torch.full((1, 1), case.x, dtype=torch.float64)
        pair = case.pair()
        return self._compare(pair, x, parts=pair.parts(), exact=case, settings={"testbed": repr(case)})

    def of_run(self, run: str | Path, config: Config | None = None, *, trust: bool = False) -> Comparison:
        """Measures at a trained run's best parameters.

        Args:
            config: The run's settings, which may say where this is done and where the data lie.
            trust: Whether to import foreign code that the run names.
        """
        config = config or read_config(Path(run))[0]
        vae = load(run, device=config.device(), trust=trust)
        epoch = load_checkpoint(Path(run) / "best.pt", "cpu", holds=Best)["epoch"]
        return self.of_vae(vae, config.make_dataset(), {"run": str(run), "epoch": epoch} | config.recorded())

    def of_config(self, config: Config) -> Comparison:
        """Measures at a new run's parameters before training."""
        dataset = config.make_dataset()
        vae = config.make_vae_for(dataset).to(config.device())
        return self.of_vae(vae, dataset, {"epoch": 0} | config.recorded())

    def along(self, config: Config, epochs: tuple[int, ...]) -> dict[int, Comparison]:
        """Measures at epochs of one training run, 0 being its start; the run is trained anew from its seed.

        Raises:
            ValueError: An epoch is below 0.
        """
        if min(epochs) < 0:
            raise FieldError(f"expected at of epochs >= 0, got {min(epochs)}", field="at")
        check_count("at", max(epochs), least=0)
        dataset = config.make_dataset()
        config = config.resolved(dataset.levels)
        vae = config.make_vae_for(dataset).to(config.device())
        on_device = dataset.to(config.device())
        found: dict[int, Comparison] = {}

        def measure(epoch: int) -> None:
            if epoch in epochs:
                found[epoch] = self.of_vae(vae, dataset, {"epoch": epoch} | config.recorded())

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
        with progress_bar(quiet=self.quiet, unit="draw") as progress:
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

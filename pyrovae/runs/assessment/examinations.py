"""Evaluates a VAE on its test images: its bounds of log p(x), and what its latents hold."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pyrovae.data import Dataset, Images
from pyrovae.evaluation import Bidirectional, annealed, bidirectional, importance_weighted, naive
from pyrovae.evaluation.bounds import (
    ACTIVE,
    Probes,
    bits_per_dim,
    kl_per_image,
    latent_means,
    probe,
    variance_of_means,
    without_constant,
)
from pyrovae.evaluation.weights import Evidence
from pyrovae.runs.assessment.doubts import warnings_of
from pyrovae.runs.assessment.results import Annealing, Assessment, Average, Bounds, Latents, Weighing
from pyrovae.runs.directories import VERSIONS, RunError, read_config, same_data
from pyrovae.runs.loading import load
from pyrovae.runs.progress import progress_bar
from pyrovae.runtime.errors import FieldError
from pyrovae.runtime.inputs import check_count
from pyrovae.runtime.random_states import seeded
from pyrovae.runtime.schemas import Best, State
from pyrovae.runtime.versions import recorded
from pyrovae.training.checkpoints import load_checkpoint
from pyrovae.vae import VAE

MADE_WITH = (*VERSIONS, "scikit-learn")
PROBED = 10_000  # training latents that the probes are fitted on, at most
ENCODED = 1000  # images at a time


@dataclass(frozen=True, kw_only=True)
class Examination:
    """An evaluation of a VAE on its test images: which estimates to make, and how exactly.

    Attributes:
        particles: K for importance sampling and for the estimate from prior samples.
        ais: The number of images that get annealed importance sampling too, with ais_steps and ais_chains.
        bidirectional: The number of images drawn from the model whose log p(x) is bounded from both sides,
            with ais_steps and ais_chains.
        limit: The number of test images to use, the first ones; all if None.
        batch_size: The number of images decoded at a time; if None, one that keeps memory small.
        seed: The seed of stochastic binarization and of all noise.
        quiet: No progress bar.

    Raises:
        ValueError: A number is out of range.

    Example:
        >>> from pyrovae import Config, train
        >>> run, _ = train(Config(epochs=1, limit=(64, 32)), out="runs/examined")
        >>> found = Examination(particles=10, limit=20).of_run(run)
        >>> found.elbo.mean < found.importance_weighted.log_evidence.mean < 0
        True
    """

    particles: int = 1000
    ais: int = 0
    ais_steps: int = 1000
    ais_chains: int = 16
    bidirectional: int = 0
    limit: int | None = None
    batch_size: int | None = None
    seed: int = 0
    quiet: bool = True

    def __post_init__(self):
        for name in ("particles", "ais_steps", "ais_chains", "limit", "batch_size"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        for name in ("ais", "bidirectional"):
            check_count(name, getattr(self, name), least=0)
        if not 0 <= self.seed < 2**32:
            raise FieldError(f"expected seed from 0 to 2**32 - 1, got {self.seed}", field="seed")

    def of_run(
        self,
        run: str | Path,
        *,
        which: str = "best",
        device: torch.device | str = "cpu",
        data_dir: str | None = None,
        trust: bool = False,
    ) -> Assessment:
        """Evaluates a run's best parameters or its last on the test set of its data.

        Args:
            data_dir: Where its data now lie; as the run has it if None.
            trust: Whether to import foreign code that the run names.

        Raises:
            RunError: The directory is no run, its data have changed, or it names foreign code and `trust` is
                False.
            CheckpointError: The checkpoint is missing, damaged or of another run.
        """
        config, described = read_config(Path(run))
        vae = load(run, which=which, device=device, trust=trust)
        if data_dir is not None:
            config = dataclasses.replace(config, data_dir=data_dir)
        dataset = config.make_dataset()
        if not same_data(described, dataset, config):
            raise RunError(f"expected the data that {run} was trained on, got others from {config.dataset}")
        of_run = {"run": str(run), "which": which, "epoch": _epoch(Path(run), which)}
        return self.of_vae(vae, dataset, of_run | config.recorded())

    def of_vae(self, vae: VAE, dataset: Dataset, settings: dict[str, Any] | None = None) -> Assessment:
        """Evaluates a VAE on the dataset's test images, and does not change it. The record has the settings.

        Raises:
            ValueError: q(z|x) has no density, so that there is no ELBO; or the VAE does not take the images.
        """
        if not vae.posterior.density:
            raise ValueError(
                "expected a VAE to evaluate, got an autoencoder, which gives x no probability: "
                "side-by-side compares its reconstructions with a VAE's"
            )
        images = dataset.test[: self.limit]
        vae.check(images, "test")
        x, pixels = self._observe(vae, images), math.prod(images.shape)
        weighted, unguided, tight, bounds = self._weigh(vae, x)
        kl_per_dim = kl_per_image(vae, x, batch_size=ENCODED, seed=self.seed)
        kl = weighted.log_lik - weighted.bound if kl_per_dim is None else kl_per_dim.sum(-1)
        elbo = weighted.log_lik - kl
        found = Assessment(
            settings=(settings or {}) | self._settings(vae, len(images)),
            versions=recorded(MADE_WITH),
            elbo=Average.of(elbo),
            reconstruction=Average.of(weighted.log_lik),
            kl=Average.of(kl),
            without_constant=_without_constant(vae, elbo.mean().item(), pixels),
            importance_weighted=Weighing.of(weighted),
            naive=Weighing.of(unguided),
            annealing=tight and Annealing.of(tight, weighted, unguided, elbo),
            bounds=bounds and Bounds.of(bounds),
            bits_per_dim=bits_per_dim(vae.likelihood, weighted.log_evidence.mean().item(), pixels),
            latents=self._latents(vae, x, kl_per_dim, images, dataset.train),
            notes=[],
        )
        return dataclasses.replace(found, notes=warnings_of(vae, found))

    def _weigh(self, vae: VAE, x: Tensor) -> tuple[Evidence, Evidence, Evidence | None, Bidirectional | None]:
        with progress_bar(quiet=self.quiet) as progress:
            noise = {"seed": self.seed, "batch_size": self.batch_size, "progress": progress}
            chains = {"steps": self.ais_steps, "chains": self.ais_chains}
            # First, for these alone may be refused.
            tight = annealed(vae, x[: self.ais], **chains, **noise) if self.ais else None
            made = self.bidirectional
            bounds = bidirectional(vae, images=made, **chains, **noise) if made else None
            weighted, unguided = (
                estimate(vae, x, particles=self.particles, **noise) for estimate in (importance_weighted, naive)
            )
        return weighted, unguided, tight, bounds

    def _settings(self, vae: VAE, images: int) -> dict[str, Any]:
        own = {name: value for name, value in dataclasses.asdict(self).items() if name != "quiet"}
        device, dtype = str(vae.zeros.device), str(vae.zeros.dtype).removeprefix("torch.")
        return own | {"images": images, "ais": min(self.ais, images), "device": device, "dtype": dtype}

    def _observe(self, vae: VAE, images: Images) -> Tensor:
        with seeded(self.seed, vae.zeros.device):
            labels = None if images.labels is None else images.labels.to(vae.zeros.device)
            return vae.observe(images.pixels.flatten(1).to(vae.zeros), labels)

    def _latents(
        self,
        vae: VAE,
        x: Tensor,
        kl_per_dim: Float[Tensor, "N L"] | None,
        images: Images,
        train: Images,
    ) -> Latents:
        means = latent_means(vae, x, batch_size=ENCODED)
        variances = variance_of_means(means)
        return Latents(
            active=None if variances is None else int((variances > ACTIVE).sum()),
            variance_of_means=None if variances is None else variances.tolist(),
            kl=None if kl_per_dim is None else kl_per_dim.mean(0).tolist(),
            probes=self._probe(vae, train, means, images.labels),
        )

    def _probe(
        self, vae: VAE, train: Images, means: Float[Tensor, "N L"], labels: Int[Tensor, " N"] | None
    ) -> Probes | str:
        if train.labels is None:
            return "no labels"  # and no image need be read
        generator = torch.Generator().manual_seed(self.seed)
        train = train[torch.randperm(len(train), generator=generator)[:PROBED]]
        fitted = latent_means(vae, self._observe(vae, train), batch_size=ENCODED)
        return probe(fitted, train.labels, means, labels)


def _without_constant(vae: VAE, elbo: float, pixels: int) -> float | None:
    """The ELBO without its constant; None also if the likelihood has no such constant."""
    return without_constant(vae.likelihood, elbo, pixels) if vae.likelihood.log_constant(pixels) else None


def _epoch(run: Path, which: str) -> int:
    if which == "best":
        return load_checkpoint(run / "best.pt", "cpu", holds=Best)["epoch"]
    return load_checkpoint(run / "checkpoint.pt", "cpu", holds=State)["progress"]["epoch"]

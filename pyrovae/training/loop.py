"""The training loop: the order of the data, epochs, validation, early stopping, and where a run stands."""

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from jaxtyping import Float, Int
from torch import Tensor

from pyrovae.data import Images
from pyrovae.estimators import Estimator
from pyrovae.evaluation.bounds import Evaluation, evaluate, without_constant
from pyrovae.runtime import distributed
from pyrovae.runtime.optimizers import load_adam
from pyrovae.runtime.random_states import random_states, set_random_states
from pyrovae.runtime.schemas import Row
from pyrovae.training.checkpoints import CheckpointError, explained, load_model
from pyrovae.training.precision import Bfloat16Layers
from pyrovae.training.progress import DivergedError, Progress
from pyrovae.training.saving import RunFiles
from pyrovae.training.steps import TERMS, CompiledStep, PlainStep, TrainingStep, can_be_compiled
from pyrovae.vae import VAE


@dataclass(frozen=True)
class Settings:
    """How to train; see `fit`, whose arguments these are."""

    epochs: int = 100
    batch_size: int = 128
    lr: float = 1e-3
    kl_warmup: int = 0
    patience: int | None = None
    seed: int = 0
    compile: bool = False
    bf16: bool = False


def batch_sizes(num_images: int, batch_size: int) -> list[int]:
    """The sizes of an epoch's batches. A last one of one image joins the one before: batch norm needs two."""
    full, rest = divmod(num_images, batch_size)
    sizes = [batch_size] * full + [rest] * (rest > 0)
    return [*sizes[:-2], batch_size + 1] if full and rest == 1 else sizes


class Trainer:
    """A run in training: its state, and the epochs that change it.

    `fit` is what most callers want. An epoch by itself, without files, signals or a progress bar:

        >>> from pyrovae import Config, Elbo
        >>> from pyrovae.training import Settings, Trainer
        >>> config = Config(hidden=(8,), limit=(64, 16))
        >>> data = config.make_dataset()
        >>> vae = config.make_vae(data.shape, data.levels)
        >>> trainer = Trainer(vae, data.train, data.validation, Elbo(), Settings())
        >>> trainer.run_epoch()
        >>> trainer.history[-1]["epoch"]
        1

    Args:
        vae: The model, which is trained in place.
        train, validation: Images on the VAE's device.
        estimator: Its bound is maximised.
        settings: How.
        directory: Where to save; None to save nothing.

    Attributes:
        history: A row of metrics for each epoch.
        progress: Where the run stands.
        batches: The number of batches of an epoch.
    """

    def __init__(
        self,
        vae: VAE,
        train: Images,
        validation: Images,
        estimator: Estimator,
        settings: Settings,
        directory: Path | None = None,
    ):
        self.vae, self.train, self.validation, self.estimator = vae, train, validation, estimator
        self.settings = settings
        self.files = None if directory is None else RunFiles(directory)
        self.history: list[Row] = []
        self.progress = Progress()
        self.beta = vae.beta
        self.sizes = batch_sizes(len(train), settings.batch_size)
        self.batches = len(self.sizes)
        self.device = train.pixels.device
        self.sums = torch.zeros(len(TERMS), dtype=torch.float64, device=self.device)
        on_gpu = self.device.type == "cuda"
        self.optimizer = torch.optim.Adam(vae.parameters(), lr=settings.lr, fused=True, capturable=on_gpu)
        parts = vae, estimator, self.optimizer, self.sums
        self.step: TrainingStep = (
            CompiledStep(*parts, warmed=settings.kl_warmup > 0)
            if settings.compile and can_be_compiled(vae)
            else PlainStep(*parts)
        )

    def distribute(self) -> None:
        """Has all processes start from the first's parameters, draw noise of their own, and share gradients."""
        self.step.distribute(self.train)
        if distributed.rank() > 0:
            self._seed_noise()

    def _seed_noise(self) -> None:
        """Seeds the noise from here on by the seed, by where the run stands, and by the process."""
        entropy = self.settings.seed, self.progress.epoch, self.progress.batch, distributed.rank()
        pyro.set_rng_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))

    def over(self) -> bool:
        """Whether the run has ended; says why in `progress.finished`."""
        if self.settings.patience is not None and self.progress.stale >= self.settings.patience:
            self.progress.finished = "patience"
        elif self.progress.epoch >= self.settings.epochs:
            self.progress.finished = "epochs"
        else:
            self.progress.finished = ""
        return bool(self.progress.finished)

    def run_epoch(self, after_batch: Callable[[], bool] = lambda: False) -> None:
        """Runs the rest of an epoch, with validation and checkpoint.

        Args:
            after_batch: Called after each batch. Where it gives True before the last, the epoch stops there,
                with a checkpoint.

        Raises:
            DivergedError: A term or a parameter is not finite.
        """
        started = time.perf_counter()
        indices = [distributed.shard(chosen) for chosen in self._order().split(self.sizes)]
        train = self.train if self.vae.classes else self.train.without_labels()  # labels where they are seen
        self.vae.train()
        with contextlib.closing(train.batches(indices[self.progress.batch :])) as batches:
            for batch, images in enumerate(batches, self.progress.batch):
                with pyro.validation_enabled(self.progress.epoch == batch == 0), self._precision():
                    self._step(images.pixels.flatten(1), images.labels)
                self.progress.batch = batch + 1
                if after_batch() and self.progress.batch < self.batches:
                    sums = distributed.total(self.sums).tolist()
                    self._check_finite(dict(zip(TERMS, sums, strict=True)))
                    self.check_data()
                    self.save()
                    return
        self._finish_epoch(started)

    def _order(self) -> Int[Tensor, " N"]:
        """The epoch's permutation of the training images: a function of the seed and the epoch."""
        entropy = np.random.SeedSequence((self.settings.seed, self.progress.epoch)).generate_state(1)[0]
        generator = torch.Generator(self.device).manual_seed(int(entropy))
        return torch.randperm(len(self.train), generator=generator, device=self.device)

    def _step(self, pixels: Float[Tensor, "B D"], labels: Int[Tensor, " B"] | None = None) -> None:
        self.vae.beta = self._beta()
        self.step(pixels, labels, self.sizes[self.progress.batch])

    def _precision(self) -> contextlib.AbstractContextManager:
        return Bfloat16Layers(self.device.type) if self.settings.bf16 else contextlib.nullcontext()

    def _beta(self) -> float:
        """The weight of the KL: linear in the step over the warm-up, never 0, then the VAE's beta."""
        steps = self.settings.kl_warmup * self.batches
        step = self.progress.epoch * self.batches + self.progress.batch + 1
        return self.beta * min(1.0, step / steps) if steps else self.beta

    def _finish_epoch(self, started: float) -> None:
        means = (distributed.total(self.sums) / len(self.train)).tolist()
        distributed.share(self.vae.buffers())
        result = distributed.from_first(self._validated)
        if not self.vae.posterior.density:
            means[-1] = None
        row = self._row(Evaluation(*means, result.num_pixels), result)
        row["seconds"] = time.perf_counter() - started
        row = distributed.broadcast(row)  # seconds differ
        self._check_finite(row)
        self.history.append(row)
        self.sums.zero_()
        self.progress.finish_epoch(row["validation_bound"])
        self.check_data(thoroughly=self.over())
        self.save()

    def _validated(self) -> Evaluation:
        size, seed = self.settings.batch_size, self.settings.seed
        return evaluate(self.vae, self.validation, estimator=self.estimator, batch_size=size, seed=seed)

    def _row(self, trained: Evaluation, result: Evaluation) -> Row:
        """The metrics of an epoch, but for its seconds."""
        objective = trained.reconstruction if trained.elbo is None else trained.elbo
        return {
            "epoch": self.progress.epoch + 1,
            "bound": trained.bound,
            "elbo": trained.elbo,
            "reconstruction": trained.reconstruction,
            "kl": trained.kl,
            "loss_without_constant": without_constant(self.vae.likelihood, objective, trained.num_pixels),
            "beta": self.vae.beta,
            "validation_bound": result.bound - (self.beta - 1) * (result.kl or 0.0),
            "validation_elbo": result.elbo,
            "validation_reconstruction": result.reconstruction,
            "validation_kl": result.kl,
            **{name: value.item() for name, value in self.vae.learned.items()},
        }

    def check_data(self, *, thoroughly: bool = False) -> None:
        """Checks, before anything is saved, that images that stay in their file are those of the beginning."""
        with distributed.together():
            if distributed.rank() == 0:
                parts = (images.pixels for images in (self.train, self.validation) if images.on_disk)
                for file in {pixels.file for pixels in parts}:
                    file.check_unchanged(thoroughly=thoroughly)

    def _check_finite(self, terms: Row) -> None:
        """Checks, before anything is saved, these terms and every parameter."""
        # The bound last: it is not finite whenever a term is not.
        for name in sorted(terms, key=lambda name: name.endswith(("elbo", "bound"))):
            if terms[name] is not None and not math.isfinite(terms[name]):
                self._diverged(f"{name.replace('_', ' ')} became {terms[name]}")
        for name, parameter in self.vae.named_parameters():
            if not torch.isfinite(parameter).all():
                self._diverged(f"parameter {name} is no longer finite")

    def _diverged(self, what: str) -> None:
        kept = "" if self.files is None else f"; {self.files.checkpoint} keeps the state before"
        raise DivergedError(f"{what} in epoch {self.progress.epoch + 1}{kept}: try a lower learning rate")

    def save(self) -> None:
        """Saves all that the run needs to continue, and after an epoch its metrics and the best parameters.

        Raises:
            WriteError: The first process cannot; raised by all.
        """
        if self.files is None:
            return
        state = {
            "model": self.vae.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": asdict(self.progress),
            "estimator": self.estimator.state_dict(),
        }
        own = {"sums": self.sums.cpu(), "random": random_states(self.device)}
        row = self.history[-1] if self.history and self.progress.batch == 0 else None
        self.files.save(state, own, row, best=self.progress.stale == 0)

    def restore(self) -> None:
        """Goes back to what `save` saved; metrics of epochs after the checkpoint are dropped."""
        if self.files is None:
            raise CheckpointError("expected a directory to resume from, got None")
        state = self.files.read(self.device)
        with explained(self.files.checkpoint):
            load_model(self.vae, state["model"])
            load_adam(self.optimizer, state["optimizer"])
            self.progress = Progress(**state["progress"])
            self.progress.check(self.batches)
            self.estimator.load_state_dict(state["estimator"])
            self._restore_own([state, *state.get("others", [])])
        self.history = self.files.history(self.progress.epoch)

    def _restore_own(self, saved: list[dict[str, Any]]) -> None:
        """The sums and the random state of this process, from those of the processes that there were."""
        rank, world = distributed.rank(), distributed.world()
        if rank < len(saved):
            self.sums.copy_(saved[rank]["sums"])
            set_random_states(saved[rank]["random"], self.device)
        else:
            self._seed_noise()
        for left in saved[world:] if rank == 0 else ():
            self.sums += left["sums"].to(self.device)

"""`fit`: epochs, progress, validation, early stopping, and checkpoints that continue bit for bit.

What a run needs to continue is in one `checkpoint.pt`: the model, the optimizer, the position in the
epoch, its sums, the early-stopping counters and every random state. The order of the data is a
function of (seed, epoch), and the KL warm-up one of the step, so neither needs state.
"""

import contextlib
import json
import math
import os
import signal
import time
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from pyrovae.data import Images
from pyrovae.estimators import Draws, Elbo, Estimator
from pyrovae.evaluation.bounds import Evaluation, evaluate, without_constant
from pyrovae.programs.graphs import CaptureWarning, Replay, Step, flushed_denormals
from pyrovae.runtime import distributed, locks
from pyrovae.runtime.optimizers import load_adam
from pyrovae.runtime.random_states import preserved_random_states, random_states, set_random_states
from pyrovae.runtime.schemas import Row, State
from pyrovae.runtime.signals import DeferredSignals
from pyrovae.runtime.whole_files import append_line, write_atomically, write_errors
from pyrovae.training.checkpoints import (
    FORMAT,
    CheckpointError,
    explained,
    load_checkpoint,
    load_model,
    read_history,
    save_atomically,
)
from pyrovae.vae import VAE


class DivergedError(ArithmeticError):
    """Training met a value that is not finite; what was saved before is untouched."""


@dataclass
class Progress:
    """Where a training run stands.

    Attributes:
        epoch: Epochs completed.
        batch: Batches completed of the next epoch.
        best: The highest validation objective so far, in nats per image; None before the first.
        best_epoch: Its epoch, from 1.
        stale: Epochs since then.
        finished: Why the run is over ("epochs" or "patience"), or "" if it is not.
    """

    epoch: int = 0
    batch: int = 0
    best: float | None = None
    best_epoch: int = 0
    stale: int = 0
    finished: str = ""

    def check(self, batches: int) -> None:
        """Checks that training can stand here, with these many batches in an epoch.

        Raises:
            ValueError: It cannot.
        """
        if self.batch >= batches:
            raise ValueError(f"{self.batch} batches done of an epoch of {batches}")
        if not (self.best_epoch <= self.epoch and (self.best is None) == (self.best_epoch == 0)):
            raise ValueError(f"epoch {self.best_epoch} as the best of {self.epoch}, with {self.best}")


@dataclass
class Fit:
    """What `fit` returns: one row of metrics per epoch, where it stands, and the signal that stopped it."""

    history: list[Row] = field(default_factory=list)
    progress: Progress = field(default_factory=Progress)
    stopped_by: signal.Signals | None = None


def fit(
    vae: VAE,
    train: Images,
    validation: Images,
    *,
    estimator: Estimator | None = None,
    epochs: int = 100,
    batch_size: int = 128,
    lr: float = 1e-3,
    kl_warmup: int = 0,
    patience: int | None = None,
    seed: int = 0,
    directory: Path | None = None,
    resume: bool = False,
    on_epoch: Callable[[int], None] = lambda epoch: None,
    compile: bool = False,
    bf16: bool = False,
    quiet: bool = False,
) -> Fit:
    """Trains a VAE by Adam on the estimator's surrogate, on the device where it and the data are.

    After each epoch the validation objective, the bound at the VAE's beta, decides which parameters are
    the best so far. With a directory, they are saved there as `best.pt`, the state to continue from as
    `checkpoint.pt`, and the metrics as a line of `metrics.jsonl`. SIGINT (Ctrl-C) and SIGTERM end the
    run after the batch at hand, with its state saved. Random states are the caller's again on return. On a
    CPU denormal numbers count as zero meanwhile, in this thread and those that PyTorch starts.

    Where PyTorch has a process group (see `distributed.joined`), all its processes train this one model:
    each calls this with the same arguments and its own device, and works on its rows of each batch. The
    gradients are then those of the whole batch, but that batch norm on a CPU has the statistics of a
    process's own rows; baselines are averages of what the processes learn. The first validates and writes,
    and all return the same. A signal to one of them stops all after the next batch.

    Args:
        vae: What is trained, in place.
        train: The images to fit.
        validation: The images that decide which parameters are the best, and when to stop.
        estimator: What is maximised; `Elbo()` if None.
        epochs: Passes over the training images.
        batch_size: Images per step, of all processes; a last batch of one image joins the one before it.
        lr: Adam's learning rate.
        kl_warmup: Epochs over which the weight of the KL rises linearly to the VAE's beta.
        patience: Stop after this many epochs without a better validation objective; None never does.
        seed: Of the data order, the noise and stochastic binarization.
        directory: Where to save; None to save nothing.
        resume: Continue from the directory's checkpoint, bit-identically (on a CPU, and on as many
            processes) to a run that was never interrupted. Every other argument must be what it was;
            epochs may be more.
        on_epoch: Called with the epoch's number, from 1, after it was saved; by every process. A resumed run
            calls it for its last epoch again if that was just saved, since a kill may have come between.
        compile: Train by compiled gradients (see `capture`), and on a GPU by whole steps as CUDA graphs.
            That takes some seconds to begin with. The same up to rounding.
        bf16: Products of layers in bfloat16; parameters and all else stay in float32.
        quiet: No progress bar.

    Returns:
        Metrics per epoch, in nats per image: the estimator's `bound` (at the VAE's beta, as it is
        trained), `elbo`, `reconstruction` and `kl` as averages over the training epoch, and over the
        validation images; `loss_without_constant` is SSE/(2c) + KL for a Gaussian. Where q(z|x) has no
        density, `elbo` and `kl` are None, and that loss is SSE/(2c).

    Raises:
        ValueError: epochs or batch_size is less than 1, a parameter is not finite, the images are none that the
            VAE takes (see `VAE.check`) or lie on another device, a KL warm-up would spoil importance weights,
            or the process group is on GPUs only.
        DivergedError: A term or a parameter was not finite at the end of an epoch.
        CheckpointError: There is no checkpoint to resume, or it does not fit.
        LockedError: Another process is writing to the directory.
        WriteError: Something could not be saved; what was saved before is untouched.
        ChangedFileError: Images that stay in their file have changed since training began; nothing of the
            epoch at hand was saved.
        LostProcess: Another process ended.

    Warns:
        CaptureWarning: `compile` was asked for and is not possible.
    """
    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"expected {name} >= 1, got {value}")
    for name, images in (("train", train), ("validation", validation)):
        vae.check(images, name)
        here, there = vae.zeros.device, images.pixels.device
        if not _same_device(here, there):
            raise ValueError(
                f"expected {name} on {here}, the VAE's device, got {there}: use {name}.to({str(here)!r})"
            )
    for name, parameter in vae.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(f"expected a VAE of finite parameters, got others in {name}: make it anew")
    estimator = estimator or Elbo()
    if kl_warmup and estimator.importance_weighted:
        raise ValueError(f"expected kl_warmup 0 for {type(estimator).__name__}, got {kl_warmup}")
    trainer = _Trainer(
        vae=vae,
        train=train,
        validation=validation,
        estimator=estimator,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        kl_warmup=kl_warmup,
        patience=patience,
        seed=seed,
        directory=directory,
        compile=compile,
        bf16=bf16,
    )
    distributed.check_group()
    with (
        contextlib.nullcontext() if directory is None else distributed.locked(directory),
        preserved_random_states(),
        DeferredSignals() as signals,
        distributed.watched(),
        distributed.synchronised_norms(vae),
        flushed_denormals(),
        torch.cuda.device(trainer.device) if trainer.device.type == "cuda" else contextlib.nullcontext(),
    ):
        pyro.set_rng_seed(seed)
        if distributed.world() > 1:
            trainer.distribute()
        trainer.check_data()
        if resume:
            trainer.restore()
        else:
            trainer.save()
        bar = tqdm(
            total=epochs * trainer.batches,
            initial=trainer.progress.epoch * trainer.batches + trainer.progress.batch,
            unit="batch",
            disable=quiet or distributed.rank() > 0,
            dynamic_ncols=True,
            mininterval=0.2 if os.isatty(2) else 10,
        )
        with bar, contextlib.ExitStack() as stack:
            stack.callback(setattr, vae, "beta", vae.beta)
            if trainer.progress.epoch and trainer.progress.batch == 0:
                on_epoch(trainer.progress.epoch)
            while not trainer.over() and not signals.stop():
                trainer.run_epoch(bar, signals)
                if trainer.progress.batch == 0:
                    on_epoch(trainer.progress.epoch)
    return Fit(trainer.history, trainer.progress, signals.received)


def _same_device(one: torch.device, other: torch.device) -> bool:
    """Whether they are the same; "cuda" without a number, as of images in a file, is whichever is current."""
    return one.type == other.type and (None in (one.index, other.index) or one.index == other.index)


def check_trainable(vae: VAE, images: Images, estimator: Estimator, batch_size: int) -> None:
    """Takes the gradient of the smallest batch of an epoch, on a copy: whether the parts fit together.

    Raises:
        ValueError: They do not: the estimator refuses the guide, say, batch norm a batch of one image, or
            a guide of one's own does not run.
    """
    copy = deepcopy(vae).train()
    few = images[: min(batch_sizes(len(images), batch_size))]
    try:
        with preserved_random_states(), flushed_denormals():  # as in `fit`, whose threads it may start
            observed = vae.observe(few.pixels.flatten(1), few.labels)
            estimator.surrogate(estimator.draws(*copy.pair, observed)).sum().backward()
            copy.reconstruct(few.pixels, few.labels)  # as the figures will, when it is too late
    except ValueError as error:
        raise ValueError(str(error).splitlines()[0]) from None  # without the shapes that Pyro appends
    except NotImplementedError:  # torch's word for what a distribution does not know
        raise ValueError("expected a guide whose q(z|x) has a mean, which stands for it, got none") from None
    except (TypeError, LookupError, AttributeError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" in str(error):
            raise
        first = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"expected a guide that runs (see check_guide), got {first}") from error


def batch_sizes(num_images: int, batch_size: int) -> list[int]:
    """The sizes of an epoch's batches. A last one of one image joins the one before: batch norm needs two."""
    full, rest = divmod(num_images, batch_size)
    sizes = [batch_size] * full + [rest] * (rest > 0)
    return [*sizes[:-2], batch_size + 1] if full and rest == 1 else sizes


@dataclass
class _Trainer:
    """The state of a run and the steps that change it."""

    vae: VAE
    train: Images
    validation: Images
    estimator: Estimator
    epochs: int
    batch_size: int
    lr: float
    kl_warmup: int
    patience: int | None
    seed: int
    directory: Path | None
    compile: bool
    bf16: bool
    history: list[Row] = field(default_factory=list)
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self):
        self.beta = self.vae.beta
        self.sizes = batch_sizes(len(self.train), self.batch_size)
        self.batches = len(self.sizes)
        self.device = self.train.pixels.device
        on_gpu = self.device.type == "cuda"
        self.optimizer = torch.optim.Adam(self.vae.parameters(), lr=self.lr, fused=True, capturable=on_gpu)
        self.sums = torch.zeros(len(_TERMS), dtype=torch.float64, device=self.device)
        self.surrogate: nn.Module = _Surrogate(self.vae, self.estimator)
        self.terms = _Terms(self.vae, self.estimator)
        self.weights: dict[int, Tensor] = {}
        if self.compile and distributed.norms_to_synchronise(self.vae):
            if distributed.rank() == 0:
                message = "runs uncompiled: batch norm has the statistics of several GPUs"
                warnings.warn(message, CaptureWarning, stacklevel=4)
            self.compile = False
        if self.compile:
            leaves = dict(self.vae.named_parameters())
            self.compiled = Step(*self.vae.pair, self.estimator, leaves, value=self.terms)
            self.update: Callable[..., None] = self._update
            if on_gpu and not self.estimator.adapts and distributed.world() == 1:
                self.update = Replay(self._update, self._state, self._judged, self.compiled.graph)
            self.warmed_beta = torch.tensor(float(self.beta), device=self.device)

    def distribute(self) -> None:
        """Has all processes start from the first's parameters, draw noise of their own, and share gradients."""
        if self.compile:
            distributed.share(self.vae.parameters())
        else:
            self._wrap()
        if distributed.rank() > 0:
            self._seed_noise()

    def _wrap(self) -> None:
        self.surrogate = distributed.parallel(self.surrogate)
        # PyTorch arranges its messages anew after its first two backward passes, and in another arrangement
        # numbers are added in another order. Two passes before mean that a resumed run begins as it went on.
        few = self.train[: min(2, len(self.train))]
        with preserved_random_states(), pyro.validation_enabled(False):
            for _ in range(2):
                surrogate, _ = self.surrogate(self.vae.eval().observe(few.pixels.flatten(1), few.labels))
                surrogate.sum().backward()

    def _seed_noise(self) -> None:
        """The noise from here on: a function of the seed, of where the run stands, and of the process."""
        entropy = self.seed, self.progress.epoch, self.progress.batch, distributed.rank()
        pyro.set_rng_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))

    def over(self) -> bool:
        """Whether the run has ended; says why in `progress.finished`."""
        if self.patience is not None and self.progress.stale >= self.patience:
            self.progress.finished = "patience"
        elif self.progress.epoch >= self.epochs:
            self.progress.finished = "epochs"
        else:
            self.progress.finished = ""
        return bool(self.progress.finished)

    def run_epoch(self, bar: tqdm, signals: DeferredSignals) -> None:
        """The rest of an epoch, with validation and checkpoint; or up to a signal, with checkpoint."""
        started = time.perf_counter()
        indices = [distributed.shard(chosen) for chosen in self._order().split(self.sizes)]
        train = self.train if self.vae.classes else self.train.without_labels()  # labels where they are seen
        self.vae.train()
        with contextlib.closing(train.batches(indices[self.progress.batch :])) as batches:
            for batch, images in enumerate(batches, self.progress.batch):
                with pyro.validation_enabled(self.progress.epoch == batch == 0), self._precision():
                    self._step(images.pixels.flatten(1), images.labels)
                self.progress.batch = batch + 1
                bar.update()
                if signals.stop(soon=True) and self.progress.batch < self.batches:
                    sums = distributed.total(self.sums).tolist()
                    self._check_finite(dict(zip(_TERMS, sums, strict=True)))
                    self.check_data()
                    self.save()
                    return
        self._finish_epoch(started)
        bar.set_description(f"epoch {self.progress.epoch}/{self.epochs}", refresh=False)
        bar.set_postfix_str(describe(self.history[-1]), refresh=False)

    def _order(self) -> Int[Tensor, " N"]:
        """The epoch's permutation of the training images: a function of the seed and the epoch."""
        entropy = np.random.SeedSequence((self.seed, self.progress.epoch)).generate_state(1)[0]
        generator = torch.Generator(self.device).manual_seed(int(entropy))
        return torch.randperm(len(self.train), generator=generator, device=self.device)

    def _step(self, pixels: Float[Tensor, "B D"], labels: Int[Tensor, " B"] | None = None) -> None:
        self.vae.beta = self._beta()
        if self.compile:
            self._compiled_step(pixels, labels)
            return
        self.optimizer.zero_grad(set_to_none=True)
        draws = self._gradients(self.vae.observe(pixels, labels, check=False), self._weights(pixels))
        self.optimizer.step()
        if self.estimator.adapts:
            self.estimator.adapt(draws.log_weight.detach(), draws.observations)
        with torch.no_grad():
            self._done(self.terms(draws))

    def _done(self, terms: Float[Tensor, "rows terms"]) -> None:
        """After a step: counts its terms, and averages over processes what the estimator has learned."""
        self.sums += distributed.own(terms, self._batch_size()).sum(0)
        if self.estimator.adapts:
            distributed.average(distributed.tensors_in(self.estimator.state_dict()))

    def _compiled_step(self, pixels: Float[Tensor, "B D"], labels: Int[Tensor, " B"] | None) -> None:
        beta = self.vae.beta
        if self.kl_warmup:  # as a number it would be frozen
            self.vae.beta = self.warmed_beta.fill_(beta)
        self.update(pixels, labels, self._weights(pixels))
        self.vae.beta = beta

    def _update(self, pixels: Tensor, labels: Tensor | None, weights: Tensor) -> None:
        terms = self.compiled(self.vae.observe(pixels, labels, check=False), weights=weights)
        distributed.average(p.grad for p in self.compiled.parameters if p.grad is not None)
        self.optimizer.step()
        self._done(terms)

    def _state(self) -> list[Tensor]:
        """All that a step changes."""
        of_optimizer = [value for state in self.optimizer.state.values() for value in state.values()]
        return [*self.vae.parameters(), *self.vae.buffers(), *of_optimizer, self.sums]

    def _judged(self) -> list[list[Tensor]]:
        """What tells a step: not the parameters, for Adam makes whole steps of what is only rounding."""
        states = self.optimizer.state.values()
        of_optimizer = [[state[name] for state in states] for name in ("step", "exp_avg", "exp_avg_sq")]
        return [*of_optimizer, list(self.vae.buffers()), [self.sums]]

    def _precision(self) -> contextlib.AbstractContextManager:
        return Bfloat16Layers(self.device.type) if self.bf16 else contextlib.nullcontext()

    def _gradients(self, observed: Shaped[Tensor, "B E"], weights: Float[Tensor, " B"]) -> Draws:
        """Leaves the gradients of the whole batch, from this process's shard of it."""
        surrogate, draws = self.surrogate(observed)
        (-(surrogate * weights).sum()).backward()
        return draws

    def _weights(self, shard: Float[Tensor, "B D"]) -> Float[Tensor, " B"]:
        """What each row of this process's shard counts in the loss, kept on the device."""
        size = self._batch_size()
        if size not in self.weights:
            self.weights[size] = distributed.weights(shard, size)
        return self.weights[size]

    def _batch_size(self) -> int:
        """Images in the batch at hand, of all processes."""
        return self.sizes[self.progress.batch]

    def _beta(self) -> float:
        """The weight of the KL: linear in the step over the warm-up, never 0, then the VAE's beta."""
        steps = self.kl_warmup * self.batches
        step = self.progress.epoch * self.batches + self.progress.batch + 1
        return self.beta * min(1.0, step / steps) if steps else self.beta

    def _finish_epoch(self, started: float) -> None:
        means = (distributed.total(self.sums) / len(self.train)).tolist()
        distributed.share(self.vae.buffers())
        result = distributed.from_first(
            lambda: evaluate(
                self.vae, self.validation, estimator=self.estimator, batch_size=self.batch_size, seed=self.seed
            )
        )
        if not self.vae.posterior.density:
            means[-1] = None
        trained = Evaluation(*means, result.num_pixels)
        row: Row = {
            "epoch": self.progress.epoch + 1,
            "bound": trained.bound,
            "elbo": trained.elbo,
            "reconstruction": trained.reconstruction,
            "kl": trained.kl,
            "loss_without_constant": self._without_constant(trained),
            "beta": self.vae.beta,
            "validation_bound": result.bound - (self.beta - 1) * (result.kl or 0.0),
            "validation_elbo": result.elbo,
            "validation_reconstruction": result.reconstruction,
            "validation_kl": result.kl,
            **{name: value.item() for name, value in self.vae.learned.items()},
            "seconds": time.perf_counter() - started,
        }
        row = distributed.broadcast(row)  # seconds differ
        self._check_finite(row)
        self.history.append(row)
        self.sums.zero_()
        p = self.progress
        p.epoch, p.batch = p.epoch + 1, 0
        objective = row["validation_bound"]
        if p.best is None or objective > p.best:
            p.best, p.best_epoch, p.stale = objective, p.epoch, 0
        else:
            p.stale += 1
        self.check_data(thoroughly=self.over())
        self.save()

    def _without_constant(self, result: Evaluation) -> float | None:
        objective = result.reconstruction if result.elbo is None else result.elbo
        return without_constant(self.vae.likelihood, objective, result.num_pixels)

    def check_data(self, *, thoroughly: bool = False) -> None:
        """Before anything is saved: whether images that stay in their file are still those of the beginning."""
        with distributed.together():
            if distributed.rank() == 0:
                parts = (images.pixels for images in (self.train, self.validation) if images.on_disk)
                for file in {pixels.file for pixels in parts}:
                    file.check_unchanged(thoroughly=thoroughly)

    def _check_finite(self, terms: Row) -> None:
        """Before anything is saved: these terms, and every parameter."""
        # The bound last: it is not finite whenever a term is not.
        for name in sorted(terms, key=lambda name: name.endswith(("elbo", "bound"))):
            if terms[name] is not None and not math.isfinite(terms[name]):
                self._diverged(f"{name.replace('_', ' ')} became {terms[name]}")
        for name, parameter in self.vae.named_parameters():
            if not torch.isfinite(parameter).all():
                self._diverged(f"parameter {name} is no longer finite")

    def _diverged(self, what: str) -> None:
        kept = "" if self.directory is None else f"; {self.directory / 'checkpoint.pt'} keeps the state before"
        raise DivergedError(f"{what} in epoch {self.progress.epoch + 1}{kept}: try a lower learning rate")

    def save(self) -> None:
        """Writes best.pt, metrics.jsonl and checkpoint.pt, in this order, each as a whole or not at all.

        Raises:
            WriteError: The first process cannot; raised by all.
        """
        if self.directory is None:
            return
        own, *others = distributed.gathered({"sums": self.sums.cpu(), "random": random_states(self.device)})
        with distributed.together():
            if distributed.rank() == 0:
                self._write(self.directory, {**own, "others": others})  # others: of the other processes

    def _write(self, directory: Path, states: dict[str, Any]) -> None:
        with write_errors(directory):
            locks.check(directory)
        model = self.vae.state_dict()
        if self.progress.batch == 0 and self.history:
            if self.progress.stale == 0:
                best = {"format": FORMAT, "epoch": self.progress.epoch, "model": model}
                save_atomically(best, directory / "best.pt")
            append_line(directory / "metrics.jsonl", json.dumps(self.history[-1]))
        state = {
            "format": FORMAT,
            "model": model,
            "optimizer": self.optimizer.state_dict(),
            "progress": asdict(self.progress),
            **states,
            "estimator": self.estimator.state_dict(),
        }
        save_atomically(state, directory / "checkpoint.pt")

    def restore(self) -> None:
        """The inverse of `save`; metrics of epochs after the checkpoint are dropped."""
        if self.directory is None:
            raise CheckpointError("expected a directory to resume from, got None")
        path = self.directory / "checkpoint.pt"
        state = self._read(path)
        with explained(path):
            load_model(self.vae, state["model"])
            load_adam(self.optimizer, state["optimizer"])
            self.progress = Progress(**state["progress"])
            self.progress.check(self.batches)
            self.estimator.load_state_dict(state["estimator"])
            self._restore_own([state, *state.get("others", [])])
        self.history = distributed.from_first(lambda: read_history(self.directory, self.progress.epoch))
        text = "".join(json.dumps(row) + "\n" for row in self.history)
        distributed.from_first(lambda: write_atomically(self.directory / "metrics.jsonl", text))

    def _read(self, path: Path) -> dict[str, Any]:
        """A checkpoint that the first process alone may have at hand."""
        if distributed.world() == 1:
            return load_checkpoint(path, self.device, holds=State)
        distributed.from_first(lambda: load_checkpoint(path, "cpu", holds=State) and None)
        return load_checkpoint(path, self.device, distributed.from_first(path.read_bytes), holds=State)

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


_TERMS = ("bound", "reconstruction", "kl")


class _Terms:
    """Gives the bound, the reconstruction and the KL of each datum.

    It refers to nothing that changes from step to step, so that a captured step may hold it.
    """

    def __init__(self, vae: VAE, estimator: Estimator):
        self.vae, self.estimator = vae, estimator

    def __call__(self, draws: Draws) -> Float[Tensor, "rows terms"]:
        bound, reconstruction = self.estimator.bound(draws), self.estimator.reconstruction(draws)
        return torch.stack([bound, reconstruction, self.estimator.kl(draws) / self.vae.beta], 1)


class _Surrogate(nn.Module):
    """What is differentiated, of observations, and its draws: as a forward pass, which PyTorch can wrap."""

    def __init__(self, vae: VAE, estimator: Estimator):
        super().__init__()
        self.vae, self.estimator = vae, estimator

    def forward(self, observed: Shaped[Tensor, "B E"]) -> tuple[Float[Tensor, " B"], Draws]:
        draws = self.estimator.draws(*self.vae.pair, observed)
        return self.estimator.surrogate(draws), draws


def describe(row: Row) -> str:
    """One epoch in a few words: ELBO, reconstruction and KL, the validation ELBO, and a tighter bound."""
    if row["elbo"] is None:
        return f"rec {row['reconstruction']:.2f}, validation {row['validation_reconstruction']:.2f}"
    text = (
        f"ELBO {row['elbo']:.2f} = rec {row['reconstruction']:.2f} - KL {row['kl']:.2f}, "
        f"validation {row['validation_elbo']:.2f}"
    )
    of_weights = row["validation_bound"] != row["validation_reconstruction"]  # which bounds nothing
    tighter = row["beta"] == 1 and of_weights and row["validation_bound"] - row["validation_elbo"] > 1e-3
    return f"{text} (bound {row['validation_bound']:.2f})" if tighter else text


class Bfloat16Layers(TorchFunctionMode):
    """While entered, the products of layers are taken in bfloat16; what they give is float32 again."""

    def __init__(self, device: str):
        super().__init__()
        self.device = device

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func not in _LAYERS:
            return func(*args, **(kwargs or {}))
        with torch.autocast(self.device, torch.bfloat16, cache_enabled=False):
            return func(*args, **(kwargs or {})).float()


_LAYERS = {linear, torch.conv2d, torch.conv_transpose2d}

"""`fit`: trains a VAE, with progress, early stopping, and checkpoints that continue bit for bit."""

import contextlib
import os
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pyro
import torch
from tqdm import tqdm

from pyrovae.data import Images
from pyrovae.estimators import Elbo, Estimator
from pyrovae.programs.graphs import flushed_denormals
from pyrovae.runtime import distributed
from pyrovae.runtime.errors import FieldError
from pyrovae.runtime.random_states import preserved_random_states
from pyrovae.runtime.signals import DeferredSignals
from pyrovae.runtime.texts import first_line
from pyrovae.training.loop import Settings, Trainer, batch_sizes
from pyrovae.training.progress import Fit, describe
from pyrovae.vae import VAE


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
        vae: The model, which is trained in place.
        train: The images to fit.
        validation: The images that decide which parameters are the best, and when to stop.
        estimator: Its bound is maximised; `Elbo()` if None.
        epochs: Passes over the training images.
        batch_size: Images per step, of all processes; a last batch of one image joins the one before it.
        lr: Adam's learning rate.
        kl_warmup: Epochs over which the weight of the KL rises linearly to the VAE's beta.
        patience: Stop after this many epochs without a better validation objective; None never does.
        seed: Seeds the data order, the noise and stochastic binarization.
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
            raise FieldError(f"expected {name} >= 1, got {value}", field=name)
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
        raise FieldError(
            f"expected kl_warmup 0 for {type(estimator).__name__}, got {kl_warmup}", field="kl_warmup"
        )
    trainer = Trainer(
        vae,
        train,
        validation,
        estimator,
        Settings(
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            kl_warmup=kl_warmup,
            patience=patience,
            seed=seed,
            compile=compile,
            bf16=bf16,
        ),
        directory,
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
        _train(trainer, signals, on_epoch, quiet)
    return Fit(trainer.history, trainer.progress, signals.received)


def _train(trainer: Trainer, signals: DeferredSignals, on_epoch: Callable[[int], None], quiet: bool) -> None:
    """Runs epochs until the run is over or a signal comes, under a progress bar."""
    vae, progress, epochs = trainer.vae, trainer.progress, trainer.settings.epochs
    bar = tqdm(
        total=epochs * trainer.batches,
        initial=progress.epoch * trainer.batches + progress.batch,
        unit="batch",
        disable=quiet or distributed.rank() > 0,
        dynamic_ncols=True,
        mininterval=0.2 if os.isatty(2) else 10,
    )

    def after_batch() -> bool:
        bar.update()
        return signals.stop(soon=True)

    with bar, contextlib.ExitStack() as stack:
        stack.callback(setattr, vae, "beta", vae.beta)
        if progress.epoch and progress.batch == 0:
            on_epoch(progress.epoch)
        while not trainer.over() and not signals.stop():
            trainer.run_epoch(after_batch)
            if progress.batch == 0:
                bar.set_description(f"epoch {progress.epoch}/{epochs}", refresh=False)
                bar.set_postfix_str(describe(trainer.history[-1]), refresh=False)
                on_epoch(progress.epoch)


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
        first = first_line(error)  # without the shapes that Pyro appends
        raise FieldError(first, field=getattr(error, "field", None)) from None
    except NotImplementedError:  # torch's word for what a distribution does not know
        raise ValueError("expected a guide whose q(z|x) has a mean, which stands for it, got none") from None
    except (TypeError, LookupError, AttributeError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" in str(error):
            raise
        first = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"expected a guide that runs (see check_guide), got {first}") from error

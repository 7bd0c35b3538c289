"""The MNIST column of table 1 of Importance Weighted Autoencoders: ours beside the published figures.

    python benchmarks/iwae_table.py [--cuda] [--minutes M] [--out DIR]             the published setting
    python benchmarks/iwae_table.py --epochs 16 --growth 1 --test-images 500       a short schedule

Burda, Grosse & Salakhutdinov, 2016, https://arxiv.org/abs/1509.00519, one stochastic layer: 784-200-200-50 and
back with tanh, Glorot's uniform weights, zero biases but for the logits of the mean image at the output, images
binarized anew in each batch of 20, Adam with eps 1e-4 on sums over the batch, and eight stages: 3^i passes at
the learning rate 0.001 * 10^(-i/7), 3,280 in all. The figure is minus the mean of log p(x) over test images by
5,000 importance samples, in nats; ours are binarized once, by the seed. A short schedule has the same stages,
with `growth`^i times as many passes in stage i, and `epochs` in all.

Ours differs in this: all 60,000 training images, in another order at each pass, where theirs are 59,600 in the
order of the file; the network gives the log of a variance, theirs that of a scale; Adam is as published, where
their code has beta1 = 0.99, second moments that start at 1, and learning rates in two digits.

A cell is a model and its k: `vae-5` maximises the mean of five log weights, `iwae-5` the log of their mean, and
`dreg-5` that by doubly reparameterized gradients. A call that ends, by `--minutes` or Ctrl-C, saves its cell's
state in `out`; the same call goes on, on a CPU bit for bit. Finished cells stay as they are.
"""

import json
import math
import platform
import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import click
import pyro
import torch
from torch import Tensor, nn

from pyrovae import VAE, Config, Dataset, Dreg, Elbo, Estimator, Iwae, importance_weighted, load_dataset
from pyrovae.programs.graphs import capture
from pyrovae.runtime.random_states import preserved_random_states, random_states, set_random_states
from pyrovae.runtime.signals import DeferredSignals
from pyrovae.runtime.whole_files import write_atomically
from pyrovae.training.checkpoints import FORMAT, load_checkpoint, save_atomically

MODELS = {"vae": Elbo, "iwae": Iwae, "dreg": Dreg}
CELLS = ("vae-1", "vae-5", "vae-50", "iwae-5", "iwae-50", "dreg-5", "dreg-50")
PUBLISHED = dict(zip(CELLS, (86.76, 86.47, 86.35, 85.54, 84.78), strict=False))
EPOCHS, STAGES, BATCH = 3280, 8, 20
BLOCK, CHUNK = 100, 50  # steps, and test images, between looks at the clock


@dataclass(frozen=True)
class Settings:
    """What a cell's figure depends on, besides its name; the published setting by default."""

    dataset: str = "mnist"
    epochs: float = EPOCHS
    growth: float = 3.0
    limit: int | None = None
    test_images: int | None = None
    particles: int = 5000
    seed: int = 0
    device: str = "cpu"
    compiled: bool = True

    def title(self) -> str:
        """What a table is of, the part of the published schedule above all."""
        published = self == Settings(seed=self.seed, device=self.device, compiled=self.compiled)
        train, test = self.limit or "all", self.test_images or "all"
        return (
            f"{self.dataset}, {'' if published else 'NOT '}the published setting: "
            f"{self.epochs:g} of {EPOCHS:,} epochs ({self.epochs / EPOCHS:.2%}), growth {self.growth:g}, "
            f"{train} training images\n-log p(x) in nats by {self.particles:,} samples, {test} test images"
        )


def stage_ends(epochs: float, growth: float, batches: int) -> list[int]:
    """The step at which each stage ends, for so many steps of a pass."""
    passes = [growth**stage for stage in range(STAGES)]
    return [round(epochs * batches * done / sum(passes)) for done in accumulate(passes)]


def learning_rate(stage: int) -> float:
    return 1e-3 * 10 ** (-stage / (STAGES - 1))


def make_vae(data: Dataset) -> VAE:
    """The published network with the published start."""
    parts = {"hidden": (200, 200), "activation": "tanh", "latent_dim": 50, "scale_head": "exp"}
    vae = Config(**parts, binarize="stochastic").make_vae(data.shape, data.levels)
    with torch.no_grad():
        for layer in [module for module in vae.modules() if isinstance(module, nn.Linear)]:
            rows = vae.latent_dim if layer is vae.posterior.head else layer.out_features
            for weight in layer.weight.split(rows):
                nn.init.xavier_uniform_(weight)
            layer.bias.zero_()
        mean = data.train.pixels.flatten(1).mean(0)
        vae.decoder.body[-1].bias.copy_(mean.clamp(0.001, 0.999).logit())
    return vae


class Cell:
    """A model and its k, trained and then measured in pieces; saved in between."""

    def __init__(self, name: str, settings: Settings, data: Dataset, path: Path):
        self.name, self.settings, self.path = name, settings, path
        self.device = torch.device(settings.device)
        self.batches = len(data.train) // BATCH
        if not self.batches:
            raise ValueError(f"expected {BATCH} training images or more, got {len(data.train)}")
        self.ends = stage_ends(settings.epochs, settings.growth, self.batches)
        pyro.set_rng_seed(settings.seed)
        self.vae = make_vae(data).to(self.device)
        self.optimizer = torch.optim.Adam(self.vae.parameters(), eps=1e-4, fused=True)
        self.train = data.train.pixels.flatten(1).to(self.device)
        generator = torch.Generator().manual_seed(settings.seed)
        test = self.vae.likelihood.observe(data.test.pixels.flatten(1), generator)
        chosen = torch.randperm(len(test), generator=generator)[: settings.test_images]
        self.test = test[chosen].to(self.device)
        self.step, self.log_evidence = 0, torch.zeros(0, dtype=torch.float64)
        self.seconds = {"training": 0.0, "test": 0.0}
        if path.exists():
            self.restore()
        model, k = name.split("-")
        self.gradients = self._gradients(MODELS[model](num_particles=int(k)))

    def _gradients(self, estimator: Estimator) -> Callable[[Tensor], Tensor]:
        """What sets the gradients and returns the loss; if compiled, it is so before the clock runs."""
        few = self.train[:BATCH].round()
        if self.settings.compiled and self.step < self.ends[-1]:
            with preserved_random_states():
                gradients = capture(*self.vae.pair, estimator, few)
                for _ in range(3):  # a graph's first calls are compared with what it was made from
                    gradients(few)
            return gradients

        def plain(x: Tensor) -> Tensor:
            self.optimizer.zero_grad()
            loss = estimator.differentiable_loss(*self.vae.pair, x)
            loss.backward()
            return loss

        return plain

    def finished(self) -> bool:
        return len(self.log_evidence) == len(self.test)

    def work(self, steps: float, over: Callable[[], bool]) -> float:
        """Trains and measures until it is finished or the call is over; the steps that are left."""
        saved = time.monotonic()
        while not self.finished() and steps > 0 and not over():
            training, started = self.step < self.ends[-1], time.perf_counter()
            steps -= self._train(int(min(steps, BLOCK))) if training else self._measure()
            self.seconds["training" if training else "test"] += time.perf_counter() - started
            if time.monotonic() - saved > 60:
                self.save()
                saved = time.monotonic()
        self.save()
        return steps

    def _train(self, most: int) -> int:
        stage, (epoch, first) = bisect_right(self.ends, self.step), divmod(self.step, self.batches)
        self.optimizer.param_groups[0]["lr"] = learning_rate(stage)
        generator = torch.Generator(self.device).manual_seed(self.settings.seed + epoch)
        order = torch.randperm(len(self.train), generator=generator, device=self.device)
        done = min(most, self.ends[stage] - self.step, self.batches - first)
        for chosen in order[first * BATCH : (first + done) * BATCH].split(BATCH):
            loss = self.gradients(self.vae.observe(self.train.index_select(0, chosen)))
            self.optimizer.step()
        if not loss.isfinite():
            raise ValueError(f"expected a finite loss, got {loss.item()} after step {self.step} of {self.name}")
        self.step += done
        if self.step == self.ends[stage]:
            click.echo(f"{self.name}: {self.step / self.batches:.2f} epochs")
        return done

    def _measure(self) -> int:
        start = len(self.log_evidence)
        seed, x = self.settings.seed + start, self.test[start : start + CHUNK]
        found = importance_weighted(self.vae, x, particles=self.settings.particles, seed=seed)
        self.log_evidence = torch.cat([self.log_evidence, found.log_evidence])
        return 1

    def save(self) -> None:
        kind = torch.cuda.get_device_name() if self.device.type == "cuda" else platform.machine()
        state = {name: getattr(self, name) for name in ("step", "log_evidence", "seconds")}
        state |= {"format": FORMAT, "settings": asdict(self.settings), "random": random_states(self.device)}
        state |= {"model": self.vae.state_dict(), "optimizer": self.optimizer.state_dict(), "device": kind}
        save_atomically(state | {"epochs": self.step / self.batches, "finished": self.finished()}, self.path)

    def restore(self) -> None:
        state = load_checkpoint(self.path, self.device)
        if state["settings"] != asdict(self.settings):
            raise ValueError(
                f"expected {self.path} of these settings, got {state['settings']}: give another --out"
            )
        self.vae.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        set_random_states(state["random"], self.device)
        self.step, self.seconds = state["step"], state["seconds"]
        self.log_evidence = state["log_evidence"].cpu()


def figures(states: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """-log p(x) of each cell, and what it is above vae-1's on the same images, with standard errors."""
    rows = {}
    for name, state in states.items():
        rows[name] = {key: state[key] for key in ("finished", "epochs", "seconds", "device")}
        rows[name]["published"] = PUBLISHED.get(name) if state["settings"]["dataset"] == "mnist" else None
        if state["finished"]:
            rows[name]["ours"] = mean_and_error(-state["log_evidence"])
            if name != "vae-1" and states.get("vae-1", {}).get("finished"):
                above = states["vae-1"]["log_evidence"] - state["log_evidence"]
                rows[name]["above vae-1"] = mean_and_error(above)
    return rows


def mean_and_error(x: Tensor) -> tuple[float, float]:
    return x.mean().item(), x.std().item() / math.sqrt(len(x))


def table(rows: dict[str, dict[str, Any]]) -> str:
    lines = [f"{'cell':<9}{'ours':>16}{'above vae-1':>16}{'published':>11}{'epochs':>10}{'s/epoch':>9}"]
    for name, row in rows.items():
        ours, above = (
            "{:.2f} +- {:.2f}".format(*row[key]) if key in row else "-" for key in ("ours", "above vae-1")
        )
        published, rate = row["published"] or "-", row["seconds"]["training"] / max(row["epochs"], 1e-9)
        lines.append(f"{name:<9}{ours:>16}{above:>16}{published:>11}{row['epochs']:>10.2f}{rate:>9.1f}")
    return "\n".join(lines)


POSITIVE, COUNT = click.FloatRange(min=0, min_open=True), click.IntRange(min=1)


@click.command()
@click.option(
    "--out", default="runs/iwae-table", show_default=True, type=Path, help="For states and the table."
)
@click.option(
    "--cell", "cells", type=click.Choice(CELLS), multiple=True, help="Which; again for more.  [default: all]"
)
@click.option("--minutes", default=math.inf, help="End after about so long.  [default: when finished]")
@click.option("--steps", default=math.inf, help="End after so many batches.  [default: when finished]")
@click.option("--dataset", "-d", default="mnist", show_default=True)
@click.option("--data-dir", type=Path, help="Where MNIST lies.  [default: as pyrovae]")
@click.option(
    "--epochs", default=float(EPOCHS), type=POSITIVE, show_default=True, help="Passes of all stages together."
)
@click.option(
    "--growth", default=3.0, type=POSITIVE, show_default=True, help="Passes for each of the stage before."
)
@click.option("--limit", type=COUNT, help="Training images.  [default: all]")
@click.option("--test-images", type=click.IntRange(min=2), help="So many, drawn by the seed.  [default: all]")
@click.option(
    "--particles", "-K", default=5000, type=COUNT, show_default=True, help="Importance samples of an image."
)
@click.option("--seed", default=0, show_default=True)
@click.option("--cuda", is_flag=True, help="On the GPU.")
@click.option("--compile/--no-compile", "compiled", default=True, show_default=True, help="By pyrovae.capture.")
def main(
    out: Path, cells: tuple[str, ...], minutes: float, steps: float, data_dir: Path | None, cuda: bool, **given
):
    """Train and measure cells of the table, and set them beside the published figures."""
    deadline = time.monotonic() + 60 * minutes
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # small importance weights make a CPU's k = 50 two to three times slower
    settings = Settings(device="cuda" if cuda else "cpu", **given)
    out.mkdir(parents=True, exist_ok=True)
    paths = {name: out / f"{name}.pt" for name in cells or CELLS}
    try:
        limit = None if settings.limit is None else (settings.limit, None)
        data = load_dataset(settings.dataset, data_dir=data_dir, held_out=0, limit=limit, seed=settings.seed)
        with DeferredSignals() as signals, pyro.validation_enabled(False):
            for name, path in paths.items():
                cell = Cell(name, settings, data, path)
                if not cell.finished():
                    steps = cell.work(steps, lambda: bool(signals.received) or time.monotonic() > deadline)
                if not cell.finished():
                    break
        states = {name: load_checkpoint(path, "cpu") for name, path in paths.items() if path.exists()}
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    rows = figures(states)
    versions = {"torch": torch.__version__, "pyro": pyro.__version__, "python": platform.python_version()}
    result = {"title": settings.title(), "settings": asdict(settings), "versions": versions, "cells": rows}
    write_atomically(out / "table.json", json.dumps(result, indent=1))
    click.echo(f"{settings.title()}\n{table(rows)}")
    if not all(name in rows and rows[name]["finished"] for name in paths):
        click.echo("not finished: the same call goes on")


if __name__ == "__main__":
    main()

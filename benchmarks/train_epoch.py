"""Seconds per MNIST epoch of a 784-400-20 VAE: pyrovae beside Pyro's way and a bare PyTorch loop.

    python benchmarks/train_epoch.py [--data-dir DIR] [--repeats N] [--json FILE]

Every contestant trains the same network (soft-label Bernoulli, softplus, Adam 1e-3) for one pass over the
same training images, interleaved in one process with one thread. `pyro` follows Pyro's VAE example:
torchvision's dataset in a DataLoader, `SVI.step`, `pyro.optim.Adam`, and validation on, Pyro's default. `svi`
is that with the images in memory. `bare` is a hand-written loop over a tensor in memory with fused Adam and
the KL in closed form. `pyrovae` is `pyrovae.fit` as `train` calls it, with the sampled KL. Times are medians;
ratios are medians over repeats of the ratio within a repeat.
"""

import json
import platform
import statistics
import time
from functools import partial

import click
import pyro
import torch
import torchvision
from pyro.infer import SVI, Trace_ELBO
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader, Subset

from pyrovae import VAE, Config, Images, fit
from pyrovae.data import default_data_dir

CONFIG = Config(binarize="soft", hidden=(400,), activation="softplus", latent_dim=20, scale_head="exp")


def make_vae() -> VAE:
    return CONFIG.make_vae((1, 28, 28), 256)


class PyroWay:
    """SVI steps over a DataLoader, as in Pyro's example, or over images in memory."""

    def __init__(self, batches):
        self.batches = batches
        vae = make_vae()
        self.svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())

    def run(self) -> None:
        with pyro.get_param_store().scope():
            for images in self.batches():
                self.svi.step(images.reshape(-1, 784))


class Bare:
    """A hand-written loop: no Pyro, data in memory, fused Adam."""

    def __init__(self, batches):
        self.batches = batches
        self.encoder = nn.Sequential(nn.Linear(784, 400), nn.Softplus(), nn.Linear(400, 40))
        self.decoder = nn.Sequential(nn.Linear(20, 400), nn.Softplus(), nn.Linear(400, 784))
        parameters = [*self.encoder.parameters(), *self.decoder.parameters()]
        self.optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True)

    def run(self) -> None:
        for x in self.batches():
            self.optimizer.zero_grad(set_to_none=True)
            loc, logvar = self.encoder(x).chunk(2, dim=-1)
            scale = (0.5 * logvar).exp()
            logits = self.decoder(loc + scale * torch.randn_like(scale))
            reconstruction = binary_cross_entropy_with_logits(logits, x, reduction="none").sum(-1)
            kl = 0.5 * (loc**2 + scale**2 - 1 - logvar).sum(-1)
            (reconstruction + kl).mean().backward()
            self.optimizer.step()


class Pyrovae:
    """`pyrovae.fit` with its metrics and one validation image, without a run directory."""

    def __init__(self, data: torch.Tensor, batch_size: int):
        self.train = Images(data.reshape(-1, 1, 28, 28))
        self.batch_size = batch_size
        self.vae = make_vae()

    def run(self) -> None:
        fit(self.vae, self.train, self.train[:1], epochs=1, batch_size=self.batch_size, quiet=True)


def shuffled(data: torch.Tensor, batch_size: int):
    for index in torch.randperm(len(data)).split(batch_size):
        yield data.index_select(0, index)


def seconds(contestant) -> float:
    started = time.perf_counter()
    contestant.run()
    return time.perf_counter() - started


@click.command()
@click.option("--data-dir", default=None, help="Where MNIST lies.  [default: as pyrovae]")
@click.option("--repeats", default=5, show_default=True, help="Interleaved rounds.")
@click.option("--images", default=60_000, show_default=True, help="Training images; times scale to 60,000.")
@click.option("--json", "json_file", default=None, help="Write all times to this file.")
def main(data_dir: str | None, repeats: int, images: int, json_file: str | None) -> None:
    """Time one MNIST epoch of each contestant, interleaved."""
    torch.set_num_threads(1)
    to_tensor = torchvision.transforms.ToTensor()
    mnist = torchvision.datasets.MNIST(data_dir or str(default_data_dir()), transform=to_tensor, download=True)
    subset = Subset(mnist, range(images))
    memory = (mnist.data[:images] / 255).reshape(-1, 784)
    results: dict[int, list[dict[str, float]]] = {}
    versions = {"torch": torch.__version__, "pyro": pyro.__version__, "python": platform.python_version()}
    click.echo(f"{versions}, one thread")
    click.echo(f"{'batch':>5}  {'contestant':<10}{'s/epoch':>8}  {'ratio to pyrovae':>16}")
    for batch_size in (256, 128, 32):
        loader = DataLoader(subset, batch_size, shuffle=True)
        in_memory = partial(shuffled, memory, batch_size)
        contestants = {
            "pyro": PyroWay(lambda loader=loader: (images for images, _ in loader)),
            "svi": PyroWay(in_memory),
            "bare": Bare(in_memory),
            "pyrovae": Pyrovae(memory, batch_size),
        }
        Pyrovae(memory[: 20 * batch_size], batch_size).run()  # imports and allocations, once
        rounds = [
            {name: seconds(c) * 60_000 / images for name, c in contestants.items()} for _ in range(repeats)
        ]
        for name in contestants:
            median = statistics.median(times[name] for times in rounds)
            ratio = statistics.median(times[name] / times["pyrovae"] for times in rounds)
            click.echo(f"{batch_size:>5}  {name:<10}{median:>8.2f}  {ratio:>16.2f}")
        results[batch_size] = rounds
    if json_file:
        with open(json_file, "w") as file:
            json.dump({"versions": versions, "seconds": results}, file, indent=1)


if __name__ == "__main__":
    main()

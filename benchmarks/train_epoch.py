"""Seconds per MNIST epoch of a 784-400-20 VAE: pyrovae beside Pyro's way and a bare PyTorch loop.

    python benchmarks/train_epoch.py [--data-dir DIR] [--repeats N] [--json FILE]

Every contestant trains the same network (soft-label Bernoulli, softplus, Adam 1e-3) for a while on the
60,000 training images, interleaved in one process with one thread. `pyro` follows Pyro's VAE example:
torchvision's dataset in a DataLoader, `SVI.step`, `pyro.optim.Adam`. `svi` is that with the images in
memory. `bare` is a hand-written loop over a tensor in memory with fused Adam and the KL in closed form.
`pyrovae` is `pyrovae.fit` as `train` calls it. Times are medians; ratios are medians over repeats of the
ratio within a repeat.
"""

import itertools
import json
import platform
import statistics
import time

import click
import pyro
import torch
import torchvision
from pyro.infer import SVI, Trace_ELBO
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader

from pyrovae import VAE, Config, Elbo, Images, fit
from pyrovae.data import default_data_dir

CONFIG = Config(binarize="soft", hidden=(400,), activation="softplus", latent_dim=20, scale_head="exp")


def make_vae() -> VAE:
    return CONFIG.make_vae((1, 28, 28), 256)


class PyroWay:
    """Pyro's example: a dataset and a DataLoader, or images in memory, and one SVI step per batch."""

    def __init__(self, data, batch_size: int):
        self.loader = DataLoader(data, batch_size, shuffle=True) if not torch.is_tensor(data) else None
        self.data, self.batch_size = data, batch_size
        vae = make_vae()
        self.svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())

    def batches(self):
        if self.loader is not None:
            return (images for images, _ in self.loader)
        return shuffled(self.data, self.batch_size)

    def run(self, steps: int) -> None:
        with pyro.get_param_store().scope():
            for images in itertools.islice(self.batches(), steps):
                self.svi.step(images.reshape(-1, 784))


class Bare:
    """A hand-written loop: no Pyro, data in memory, fused Adam."""

    def __init__(self, data: torch.Tensor, batch_size: int):
        self.data, self.batch_size = data, batch_size
        self.encoder = nn.Sequential(nn.Linear(784, 400), nn.Softplus(), nn.Linear(400, 40))
        self.decoder = nn.Sequential(nn.Linear(20, 400), nn.Softplus(), nn.Linear(400, 784))
        parameters = [*self.encoder.parameters(), *self.decoder.parameters()]
        self.optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True)

    def run(self, steps: int) -> None:
        for x in itertools.islice(shuffled(self.data, self.batch_size), steps):
            self.optimizer.zero_grad(set_to_none=True)
            loc, logvar = self.encoder(x).chunk(2, dim=-1)
            scale = (0.5 * logvar).exp()
            logits = self.decoder(loc + scale * torch.randn_like(scale))
            rec = binary_cross_entropy_with_logits(logits, x, reduction="none").sum(-1)
            kl = 0.5 * (loc**2 + scale**2 - 1 - logvar).sum(-1)
            (rec + kl).mean().backward()
            self.optimizer.step()


class Pyrovae:
    """`pyrovae.fit` with its metrics and one validation image, without a run directory."""

    def __init__(self, data: torch.Tensor, batch_size: int):
        self.images = data.reshape(-1, 1, 28, 28)
        self.batch_size = batch_size
        self.vae = make_vae()

    def run(self, steps: int) -> None:
        train = Images(self.images[: steps * self.batch_size])
        fit(
            self.vae,
            train,
            Images(self.images[:1]),
            estimator=Elbo(),
            epochs=1,
            batch_size=self.batch_size,
            quiet=True,
        )


def shuffled(data: torch.Tensor, batch_size: int):
    for index in torch.randperm(len(data)).split(batch_size):
        yield data[index]


def seconds_per_epoch(contestant, steps: int, steps_per_epoch: int) -> float:
    started = time.perf_counter()
    contestant.run(steps)
    return (time.perf_counter() - started) * steps_per_epoch / steps


@click.command()
@click.option("--data-dir", default=None, help="Where MNIST lies.  [default: as pyrovae]")
@click.option("--repeats", default=9, show_default=True, help="Interleaved rounds.")
@click.option("--images", default=12_000, show_default=True, help="Images per contestant and round, at most.")
@click.option("--json", "json_file", default=None, help="Write all times to this file.")
def main(data_dir: str | None, repeats: int, images: int, json_file: str | None) -> None:
    """Time one MNIST epoch of each contestant, interleaved."""
    torch.set_num_threads(1)
    to_tensor = torchvision.transforms.ToTensor()
    mnist = torchvision.datasets.MNIST(data_dir or str(default_data_dir()), transform=to_tensor, download=True)
    memory = (mnist.data / 255).reshape(-1, 784)
    times: dict[int, dict[str, list[float]]] = {}
    click.echo(
        f"torch {torch.__version__}, pyro {pyro.__version__}, {platform.processor() or 'CPU'}, one thread"
    )
    click.echo(f"{'batch':>5}  {'contestant':<10}{'s/epoch':>8}  {'ratio to pyrovae':>16}")
    for batch_size in (256, 128, 32):
        contestants = {
            "pyro": PyroWay(mnist, batch_size),
            "svi": PyroWay(memory, batch_size),
            "bare": Bare(memory, batch_size),
            "pyrovae": Pyrovae(memory, batch_size),
        }
        steps = images // batch_size
        seconds = {name: [] for name in contestants}
        for contestant in contestants.values():
            contestant.run(20)
        for _ in range(repeats):
            for name, contestant in contestants.items():
                seconds[name].append(seconds_per_epoch(contestant, steps, -(-len(memory) // batch_size)))
        for name, values in seconds.items():
            ratio = statistics.median(a / b for a, b in zip(values, seconds["pyrovae"], strict=True))
            click.echo(f"{batch_size:>5}  {name:<10}{statistics.median(values):>8.2f}  {ratio:>16.2f}")
        times[batch_size] = seconds
    if json_file:
        with open(json_file, "w") as file:
            json.dump({"torch": torch.__version__, "pyro": pyro.__version__, "seconds": times}, file, indent=1)


if __name__ == "__main__":
    main()

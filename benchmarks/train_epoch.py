"""Seconds per MNIST epoch of a 784-400-20 VAE: pyrovae beside Pyro's way, a bare PyTorch loop, and NumPyro.

    python benchmarks/train_epoch.py [--data-dir DIR] [--repeats N] [--batches 256,128,32] [--device cuda]

Every contestant trains the same network (soft-label Bernoulli, softplus, Adam 1e-3) for one pass over the
same training images, interleaved in one process, on one core. Times are medians; ratios are medians over
repeats of the ratio within a repeat. A pass before the first round compiles, and is not counted. All flush
denormal numbers, as XLA and `pyrovae.fit` do by themselves: Adam's moments become such after some epochs.

example   Pyro's VAE example: torchvision's dataset in a DataLoader, `SVI.step`, Pyro's validation on
svi       that with the images in memory, or on the device
bare      a hand-written loop over images in memory, fused Adam, the KL in closed form
graphed   that loop as a CUDA graph, on a GPU
numpyro   NumPyro's SVI, a jitted epoch, as in its VAE example; where NumPyro is installed
eager     `pyrovae.fit` as `train --compile off` calls it, with the sampled KL
compiled  the same with `--compile on`
bf16      the same with `--bf16` as well

`--tiny` times steps of a model of one latent number and a batch of ten instead, where nearly all is Python.
"""

import json
import os
import platform
import statistics
import time
from functools import partial

import click

if hasattr(os, "sched_setaffinity"):  # before JAX counts the cores
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import pyro
import pyro.distributions as dist
import torch
import torchvision
from pyro.infer import SVI, Trace_ELBO
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader, Subset

from pyrovae import VAE, Config, Elbo, Images, capture
from pyrovae.data import default_data_dir
from pyrovae.training import Settings, Trainer

CONFIG = Config(binarize="soft", hidden=(400,), activation="softplus", latent_dim=20, scale_head="exp")


def make_vae() -> VAE:
    return CONFIG.make_vae((1, 28, 28), 256)


class PyroWay:
    """SVI steps over a DataLoader, as in Pyro's example, or over images in memory."""

    def __init__(self, batches, device: str):
        self.batches, self.device = batches, device
        vae = make_vae().to(device)
        self.svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())

    def run(self) -> None:
        with pyro.get_param_store().scope():
            for images in self.batches():
                self.svi.step(images.to(self.device).reshape(-1, 784))


class Bare:
    """A hand-written loop: no Pyro, data in memory, fused Adam."""

    def __init__(self, batches, device: str):
        self.batches = batches
        self.encoder = nn.Sequential(nn.Linear(784, 400), nn.Softplus(), nn.Linear(400, 40)).to(device)
        self.decoder = nn.Sequential(nn.Linear(20, 400), nn.Softplus(), nn.Linear(400, 784)).to(device)
        parameters = [*self.encoder.parameters(), *self.decoder.parameters()]
        self.optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True, capturable=device == "cuda")

    def run(self) -> None:
        for x in self.batches():
            self.step(x)

    def step(self, x: torch.Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loc, logvar = self.encoder(x).chunk(2, dim=-1)
        scale = (0.5 * logvar).exp()
        logits = self.decoder(loc + scale * torch.randn_like(scale))
        reconstruction = binary_cross_entropy_with_logits(logits, x, reduction="none").sum(-1)
        kl = 0.5 * (loc**2 + scale**2 - 1 - logvar).sum(-1)
        (reconstruction + kl).mean().backward()
        self.optimizer.step()


class Graphed(Bare):
    """The same step recorded once for full batches, and replayed."""

    graph: torch.cuda.CUDAGraph | None = None

    def run(self) -> None:
        for x in self.batches():
            if self.graph is None:
                self._record(x)
            if len(x) == len(self.x):
                self.x.copy_(x)
                self.graph.replay()
            else:
                self.step(x)

    def _record(self, x: torch.Tensor) -> None:
        self.x = x.clone()
        aside = torch.cuda.Stream()
        with torch.cuda.stream(aside):
            for _ in range(3):
                self.step(self.x)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.step(self.x)


class Pyrovae:
    """Epochs of `pyrovae.fit` with its metrics and one validation image, without a run directory."""

    def __init__(self, data: torch.Tensor, batch_size: int, **modes: bool):
        images = Images(data.reshape(-1, 1, 28, 28))
        settings = Settings(epochs=10**6, batch_size=batch_size, **modes)
        self.trainer = Trainer(make_vae().to(data.device), images, images[:1], Elbo(), settings)

    def run(self) -> None:
        self.trainer.run_epoch()


class NumPyro:
    """A jitted epoch over images in memory, as in NumPyro's VAE example."""

    def __init__(self, data, batch_size: int):
        import jax
        import jax.numpy as jnp
        import numpyro
        from jax import lax, random
        from jax.example_libraries import stax
        from numpyro import distributions
        from numpyro.infer import SVI, Trace_ELBO

        self.jax, self.key = jax, random.PRNGKey(0)
        self.data = jnp.asarray(data.cpu().numpy())
        encoder = stax.serial(
            stax.Dense(400),
            stax.Softplus,
            stax.FanOut(2),
            stax.parallel(
                stax.Dense(20), stax.serial(stax.Dense(20), stax.elementwise(lambda h: jnp.exp(0.5 * h)))
            ),
        )
        decoder = stax.serial(stax.Dense(400), stax.Softplus, stax.Dense(784))

        def model(x):
            decode = numpyro.module("decoder", decoder, (len(x), 20))
            with numpyro.plate("data", len(x)):
                z = numpyro.sample("z", distributions.Normal(0, 1).expand([20]).to_event(1))
                # Soft labels: the cross-entropy, which NumPyro's Bernoulli refuses to call a density.
                logits = decode(z)
                numpyro.factor("x", (x * logits - jax.nn.softplus(logits)).sum(-1))

        def guide(x):
            encode = numpyro.module("encoder", encoder, (len(x), 784))
            loc, scale = encode(x)
            with numpyro.plate("data", len(x)):
                numpyro.sample("z", distributions.Normal(loc, scale).to_event(1))

        svi = SVI(model, guide, numpyro.optim.Adam(1e-3), Trace_ELBO())
        self.state = svi.init(self.key, self.data[:batch_size])
        full = len(data) // batch_size

        def epoch(state, key, data):
            order = random.permutation(key, len(data))

            def step(i, carry):
                total, state = carry
                chosen = lax.dynamic_slice_in_dim(order, i * batch_size, batch_size)
                state, loss = svi.update(state, data[chosen])
                return total + loss, state

            total, state = lax.fori_loop(0, full, step, (0.0, state))
            if len(data) % batch_size:
                state, loss = svi.update(state, data[order[full * batch_size :]])
                total += loss
            return total, state

        self.epoch = jax.jit(epoch)

    def run(self) -> None:
        self.key, key = self.jax.random.split(self.key)
        total, self.state = self.epoch(self.state, key, self.data)
        total.block_until_ready()


def tiny_model(x):
    w = pyro.param("w", torch.tensor(0.5))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(w * z, 1.0), obs=x)


def tiny_guide(x):
    a, b = pyro.param("a", torch.tensor(0.1)), pyro.param("b", torch.tensor(-1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(a * x, b.exp()))


class TinySteps:
    """A thousand steps on ten numbers, by Pyro's SVI or by a captured step and fused Adam."""

    def __init__(self, captured: bool, device: str):
        self.x = torch.linspace(-1, 1, 10, device=device)
        if captured:
            self.step = capture(tiny_model, tiny_guide, Elbo(), self.x)
            self.optimizer = torch.optim.Adam(self.step.parameters, lr=1e-3, fused=True)
            return
        svi = SVI(tiny_model, tiny_guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
        self.step, self.optimizer = svi.step, None

    def run(self) -> None:
        for _ in range(1000):
            self.step(self.x)
            if self.optimizer is not None:
                self.optimizer.step()


def shuffled(data: torch.Tensor, batch_size: int):
    for index in torch.randperm(len(data), device=data.device).split(batch_size):
        yield data.index_select(0, index)


def seconds(contestant) -> float:
    started = time.perf_counter()
    contestant.run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def has_numpyro() -> bool:
    try:
        import numpyro  # noqa: F401 - only whether it is there
    except ImportError:
        return False
    return True


@click.command()
@click.option("--data-dir", default=None, help="Where MNIST lies.  [default: as pyrovae]")
@click.option("--repeats", default=5, show_default=True, help="Interleaved rounds.")
@click.option("--images", default=60_000, show_default=True, help="Training images; times scale to 60,000.")
@click.option("--batches", default="256,128,32", show_default=True, help="Batch sizes.")
@click.option("--only", default="", help="These contestants alone, with commas between.")
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.option("--tiny", is_flag=True, help="Time 1,000 steps of a tiny model instead.")
@click.option("--json", "json_file", default=None, help="Write all times to this file.")
def main(data_dir, repeats, images, batches, only, device, tiny, json_file) -> None:
    """Time one MNIST epoch of each contestant, interleaved."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    versions = {"torch": torch.__version__, "pyro": pyro.__version__, "python": platform.python_version()}
    where = torch.cuda.get_device_name() if device == "cuda" else "one core"
    click.echo(f"{versions}, {where}")
    results = {}
    if tiny:
        contestants = {"svi": partial(TinySteps, False, device), "compiled": partial(TinySteps, True, device)}
        results["tiny"] = compete("tiny", contestants, repeats, 1.0)
        batches = ""
    else:
        to_tensor = torchvision.transforms.ToTensor()
        mnist = torchvision.datasets.MNIST(
            data_dir or str(default_data_dir()), transform=to_tensor, download=True
        )
        memory = (mnist.data[:images] / 255).reshape(-1, 784).to(device)
    for batch_size in map(int, filter(None, batches.split(","))):
        loader = DataLoader(Subset(mnist, range(images)), batch_size, shuffle=True)
        in_memory = partial(shuffled, memory, batch_size)
        contestants = {
            "example": partial(PyroWay, lambda loader=loader: (images for images, _ in loader), device),
            "svi": partial(PyroWay, in_memory, device),
            "bare": partial(Bare, in_memory, device),
            **({"graphed": partial(Graphed, in_memory, device)} if device == "cuda" else {}),
            **({"numpyro": partial(NumPyro, memory, batch_size)} if has_numpyro() else {}),
            "eager": partial(Pyrovae, memory, batch_size),
            "compiled": partial(Pyrovae, memory, batch_size, compile=True),
            "bf16": partial(Pyrovae, memory, batch_size, compile=True, bf16=True),
        }
        chosen = {name: make for name, make in contestants.items() if not only or name in only.split(",")}
        results[batch_size] = compete(str(batch_size), chosen, repeats, 60_000 / images)
    if json_file:
        with open(json_file, "w") as file:
            json.dump({"versions": versions, "device": where, "seconds": results}, file, indent=1)


def compete(title: str, makers: dict, repeats: int, scale: float) -> list[dict[str, float]]:
    """Rounds of all contestants; prints medians, and ratios to the compiled one, or the last."""
    contestants = {name: make() for name, make in makers.items()}
    for contestant in contestants.values():
        contestant.run()
    rounds = [{name: seconds(c) * scale for name, c in contestants.items()} for _ in range(repeats)]
    basis = "compiled" if "compiled" in contestants else list(contestants)[-1]
    click.echo(f"{'batch':>5}  {'contestant':<10}{'seconds':>8}  {f'ratio to {basis}':>17}")
    for name in contestants:
        median = statistics.median(times[name] for times in rounds)
        ratio = statistics.median(times[name] / times[basis] for times in rounds)
        click.echo(f"{title:>5}  {name:<10}{median:>8.3f}  {ratio:>17.2f}")
    return rounds


if __name__ == "__main__":
    main()

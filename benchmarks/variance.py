"""Milliseconds per draw to measure a gradient's variance: pyrovae beside the plain loop over Pyro.

    python benchmarks/variance.py [--draws N] [--repeats N] [--cuda] [--json FILE]

The subject is the ELBO of a 784-400-20 Bernoulli VAE at initialisation on one batch of 64 random images, and
tr Cov of its gradient, all parameters together. `loop` is what one writes without a library: `Trace_ELBO`
without validation, a backward pass for each draw, and sums of the gradient and of its square. `pyrovae` is
`gradient_moments`, for the trace alone and with every entry's variance (`elementwise`, beside a loop that keeps
them too). Contestants are interleaved in one process; times are medians, ratios medians over rounds of their
ratio within a round. Draw by draw the noise is the same, so the estimates must agree, and are compared.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable

import click
import numpy as np
import pyro
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

from pyrovae import VAE, Config, Elbo, gradient_moments


class Loop:
    """tr Cov by one backward pass for each draw, in double precision."""

    def __init__(self, vae: VAE, x: Tensor, elementwise: bool):
        self.vae, self.x, self.elementwise = vae, x, elementwise
        self.parameters = list(vae.parameters())

    def __call__(self, draws: int) -> float:
        elbo = Trace_ELBO()
        sums = [torch.zeros_like(p, dtype=torch.float64) for p in self.parameters]
        squares = [torch.zeros_like(s) for s in sums] if self.elementwise else [0.0] * len(sums)
        for draw in range(draws):
            torch.manual_seed(int(np.random.SeedSequence((0, draw)).generate_state(1)[0]))
            loss = elbo.differentiable_loss(*self.vae.pair, self.x) / len(self.x)
            for i, gradient in enumerate(torch.autograd.grad(loss, self.parameters)):
                sums[i] += gradient
                squares[i] += gradient.double().square() if self.elementwise else gradient.square().sum()
        spread = [
            square.sum() - s.square().sum() / draws if self.elementwise else square - s.square().sum() / draws
            for square, s in zip(squares, sums, strict=True)
        ]
        return float(sum(spread)) / (draws - 1)


class Pyrovae:
    """The same by `gradient_moments`."""

    def __init__(self, vae: VAE, x: Tensor, elementwise: bool):
        self.vae, self.x, self.elementwise = vae, x, elementwise

    def __call__(self, draws: int) -> float:
        stats = gradient_moments(
            *self.vae.pair, Elbo(), self.x, draws=draws, parts=self.vae.parts(), elementwise=self.elementwise
        )
        assert not stats.looped, stats.looped
        return stats.tr_cov()


def timed(contestant: Callable[[int], float], draws: int, device: str) -> tuple[float, float]:
    """Milliseconds per draw, and the estimate."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = contestant(draws)
    return 1e3 * (time.perf_counter() - started) / draws, result


@click.command()
@click.option("--draws", default=256, show_default=True)
@click.option("--repeats", default=7, show_default=True, help="Interleaved rounds.")
@click.option("--cuda", is_flag=True, help="On the GPU.")
@click.option("--json", "json_file", default=None, help="Write all times to this file.")
def main(draws: int, repeats: int, cuda: bool, json_file: str | None) -> None:
    """Time tr Cov of a gradient by each contestant, interleaved."""
    torch.set_num_threads(1)
    device = "cuda" if cuda else "cpu"
    vae = Config(hidden=(400,), latent_dim=20).make_vae((1, 28, 28), 256).to(device)
    generator = torch.Generator().manual_seed(0)
    x = torch.bernoulli(0.3 * torch.rand(64, 784, generator=generator), generator=generator).to(device)
    contestants = {
        "loop": Loop(vae, x, elementwise=False),
        "pyrovae": Pyrovae(vae, x, elementwise=False),
        "loop, elementwise": Loop(vae, x, elementwise=True),
        "pyrovae, elementwise": Pyrovae(vae, x, elementwise=True),
    }
    for contestant in contestants.values():
        contestant(16)  # imports and allocations, once
    with pyro.validation_enabled(False):
        rounds = [{name: timed(c, draws, device) for name, c in contestants.items()} for _ in range(repeats)]
    where = torch.cuda.get_device_name() if cuda else "one thread"
    click.echo(
        f"torch {torch.__version__}, pyro {pyro.__version__}, python {platform.python_version()}, {where}"
    )
    click.echo(f"{'contestant':<22}{'ms/draw':>8}  {'loop / it':>9}  {'tr Cov':>9}")
    for name in contestants:
        loop = "loop, elementwise" if "elementwise" in name else "loop"
        median = statistics.median(times[name][0] for times in rounds)
        ratio = statistics.median(times[loop][0] / times[name][0] for times in rounds)
        click.echo(f"{name:<22}{median:>8.2f}  {ratio:>9.2f}  {rounds[0][name][1]:>9.3f}")
    found = [result for _, result in rounds[0].values()]
    assert max(found) - min(found) < 1e-3 * min(found), f"the estimates differ: {found}"
    if json_file:
        with open(json_file, "w") as file:
            json.dump({"draws": draws, "device": where, "rounds": rounds}, file, indent=1)


if __name__ == "__main__":
    main()

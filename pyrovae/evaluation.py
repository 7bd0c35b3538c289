"""How good a VAE is on given images, in nats per image. Evaluation never changes the model."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import pyro
import torch

from pyrovae.data import Images
from pyrovae.estimators import Elbo, Estimator
from pyrovae.likelihoods import Likelihood
from pyrovae.vae import VAE


@dataclass(frozen=True)
class Evaluation:
    """Averages over images, in nats per image.

    Attributes:
        bound: What the estimator bounds log p(x) with: the ELBO, or a tighter one of importance weights.
        reconstruction: E_q[log p(x|z)].
        kl: KL(q(z|x) || p(z)), without beta.
        num_pixels: D, the observed numbers per image.
    """

    bound: float
    reconstruction: float
    kl: float
    num_pixels: int


def evaluate(
    vae: VAE, images: Images, *, estimator: Estimator | None = None, batch_size: int = 1000, seed: int = 0
) -> Evaluation:
    """The bound, reconstruction and KL of a VAE, averaged over images on the VAE's device.

    Random states are left as they were, and the same seed gives the same numbers.

    Args:
        estimator: Whose bound; `Elbo()` if None.
        batch_size: Images at a time; affects memory, and which noise an image gets, only.
    """
    estimator = estimator or Elbo()
    sums = torch.zeros(3, dtype=torch.float64, device=images.pixels.device)
    with vae.evaluating(), seeded(seed, images.pixels.device), pyro.validation_enabled(False):
        for pixels in images.pixels.flatten(1).split(batch_size):
            draws = estimator.draws(*vae.pair, vae.likelihood.observe(pixels))
            terms = estimator.bound(draws), estimator.reconstruction(draws), estimator.kl(draws)
            sums += torch.stack([term.sum(dtype=torch.float64) for term in terms])
    bound, reconstruction, kl = (sums / len(images)).tolist()
    return Evaluation(bound, reconstruction, kl, math.prod(images.shape))


def bits_per_dim(likelihood: Likelihood, bound: float, num_pixels: int) -> float | None:
    """A bound on -log p(x) in bits per pixel; None where pixels are not discrete (it means nothing)."""
    return -bound / (num_pixels * math.log(2)) if likelihood.discrete else None


def without_constant(likelihood: Likelihood, bound: float, num_pixels: int) -> float | None:
    """Minus the bound without log p(x|z)'s constant: SSE/(2c) + KL for a Gaussian of fixed c, in nats.

    None where c is learned, since the constant then is none.
    """
    constant = likelihood.log_constant(num_pixels)
    return None if constant is None else constant - bound


@contextlib.contextmanager
def seeded(seed: int, device: torch.device | str) -> Iterator[None]:
    """torch's default generators seeded, and on leaving set back to where they were."""
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield

"""Estimates of log p(x), the evidence of a VAE, by importance sampling and by prior samples.

They take observations as `VAE.observe` gives them, so that all are of the same x. Each estimates p(x)
without bias, so that its logarithm is too small on average.

None of them changes anything. Networks run in evaluation mode, whatever mode they are in. The noise is a
function of the seed. The VAE and the random states of torch, numpy and Python are left as they were.
"""

import math

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from pyrovae.evaluation.chunks import Progress, check, chunk_size, evaluating, report
from pyrovae.evaluation.weights import Evidence, Tally
from pyrovae.vae import VAE


def importance_weighted(
    vae: VAE,
    x: Shaped[Tensor, "N E"],
    *,
    particles: int = 1000,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Evidence:
    """log of the mean of p(x, z_k) / q(z_k|x), z_k ~ q(z|x).

    An image's noise depends on the seed and its place only: not on the other images, nor on the
    batch size, which changes nothing but rounding.

    Args:
        particles: K.
        batch_size: Particles decoded at a time; what keeps memory small if None.

    Source: Importance Weighted Autoencoders, Burda, Grosse & Salakhutdinov, 2016,
    https://arxiv.org/abs/1509.00519, eq. 8.
    """
    if not vae.posterior.density:
        raise ValueError("expected a guide with a density, got an autoencoder's point mass: see naive")
    check(vae, x, particles=particles, batch_size=batch_size)
    chunk, tally = chunk_size(vae, batch_size), Tally(x, particles)
    with evaluating(vae, seed):
        prior = vae.posterior.prior(vae.zeros)
        for i in range(len(x)):
            q = vae.posterior_of(x[i : i + 1])
            for z in q.sample((particles,)).split(chunk):
                log_lik = vae.log_lik(z, x[i])
                tally.add(slice(i, i + 1), log_lik + prior.log_prob(z) - q.log_prob(z), log_lik)
            report(progress, i + 1, len(x), "importance sampling")
    return tally.result()


def naive(
    vae: VAE,
    x: Shaped[Tensor, "N E"],
    *,
    particles: int = 1000,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Evidence:
    """log of the mean of p(x|z_k), z_k ~ p(z), the same K prior samples for all images.

    Few of them explain a given image, so that it falls short by far in more than a few dimensions.
    Sharing the samples makes the errors of different images dependent.

    Args:
        particles: K.
        batch_size: Pairs of a particle and an image at a time; what keeps memory small if None.
    """
    check(vae, x, particles=particles, batch_size=batch_size)
    chunk, tally = chunk_size(vae, batch_size), Tally(x, particles)
    images = min(len(x), math.isqrt(chunk))
    with evaluating(vae, seed):
        samples = vae.posterior.prior(vae.zeros).sample((particles,))
        done = 0
        for z in samples.split(chunk // images):
            for of_class in _by_class(vae, x):
                observed, y = vae.split(x[of_class])
                p = vae.likelihood_of(z.unsqueeze(1), None if y is None else y[0])
                for part, rows in zip(observed.split(images), of_class.split(images), strict=True):
                    log_lik = p.log_prob(part)
                    tally.add(rows, log_lik, log_lik)
            done += len(z)
            report(progress, done, particles, "prior samples")
    return tally.result()


def _by_class(vae: VAE, x: Shaped[Tensor, "N E"]) -> tuple[Int[Tensor, " rows"], ...]:
    """The rows of each class, which share p(x|z, y); all rows where there are none."""
    y = vae.split(x)[1]
    rows = torch.arange(len(x), device=x.device)
    return (rows,) if y is None else tuple(rows[y[:, c] > 0] for c in y.any(0).nonzero()[:, 0])

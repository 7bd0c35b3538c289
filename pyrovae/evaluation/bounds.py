"""How good a VAE is on given images, in nats per image. Evaluation never changes the model."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyro
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.distributions import Distribution, Independent, kl_divergence

from pyrovae.data import Images
from pyrovae.estimators import Elbo, Estimator
from pyrovae.likelihoods import Likelihood
from pyrovae.runtime.random_states import seeded
from pyrovae.vae import VAE

ACTIVE = 0.01  # the variance of its mean over images above which a latent dimension is in use
KL_SAMPLES = 1000
PCA_BATCH, PCA_BYTES = 10_000, 2**28  # images at a time; of float64 pixels, out of a file
NEIGHBOURS = 5


@dataclass(frozen=True)
class Evaluation:
    """Averages over images, in nats per image.

    Attributes:
        bound: What the estimator bounds log p(x) with: the ELBO, or a tighter one of importance weights.
        reconstruction: E_q[log p(x|z)].
        kl: KL(q(z|x) || p(z)), without beta; None where q(z|x) has no density.
        num_pixels: D, the observed numbers per image.
    """

    bound: float
    reconstruction: float
    kl: float | None
    num_pixels: int

    @property
    def elbo(self) -> float | None:
        """None where there is no KL."""
        return None if self.kl is None else self.reconstruction - self.kl


def evaluate(
    vae: VAE, images: Images, *, estimator: Estimator | None = None, batch_size: int = 1000, seed: int = 0
) -> Evaluation:
    """The bound, reconstruction and KL of a VAE, averaged over images on the VAE's device.

    The VAE, whatever mode it is in, and the random states of torch, numpy and Python are left as they were. The
    same seed gives the same numbers.

    Args:
        estimator: Whose bound; `Elbo()` if None.
        batch_size: Images at a time; affects memory, and which noise an image gets, only.

    Raises:
        ValueError: The images are none that the VAE takes (see `VAE.check`).
    """
    vae.check(images)
    estimator = estimator or Elbo()
    sums = torch.zeros(3, dtype=torch.float64, device=images.pixels.device)
    with vae.evaluating(), seeded(seed, images.pixels.device), pyro.validation_enabled(False):
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            draws = estimator.draws(*vae.pair, vae.observe(batch.pixels.flatten(1), batch.labels, check=False))
            terms = estimator.bound(draws), estimator.reconstruction(draws), estimator.kl(draws)
            sums += torch.stack([term.sum(dtype=torch.float64) for term in terms])
    bound, reconstruction, kl = (sums / len(images)).tolist()
    return Evaluation(bound, reconstruction, kl if vae.posterior.density else None, math.prod(images.shape))


def bits_per_dim(likelihood: Likelihood, bound: float, num_pixels: int) -> float | None:
    """A bound on -log p(x) in bits per pixel; None where pixels are not discrete (it means nothing)."""
    return -bound / (num_pixels * math.log(2)) if likelihood.discrete else None


def without_constant(likelihood: Likelihood, bound: float, num_pixels: int) -> float | None:
    """Minus the bound without log p(x|z)'s constant: SSE/(2c) + KL for a Gaussian of fixed c, in nats.

    None where c is learned, since the constant then is none.
    """
    constant = likelihood.log_constant(num_pixels)
    return None if constant is None else constant - bound


def kl_per_image(
    vae: VAE, x: Shaped[Tensor, "N E"], *, batch_size: int = 1000, seed: int = 0
) -> Float[Tensor, "N L"] | None:
    """KL(q(z_l|x) || p(z_l)) of each image and latent dimension, in nats, on the CPU; rows sum to the KL.

    In closed form where there is one, else by Monte Carlo with KL_SAMPLES samples. None if the
    dimensions of q(z|x) or p(z) depend on each other, so that the KL is no such sum.
    """

    def terms(q: Distribution) -> Tensor | None:
        both = q, vae.posterior.prior(vae.zeros)
        if not all(isinstance(d, Independent) and not d.base_dist.event_shape for d in both):
            return None
        q, p = (d.base_dist for d in both)
        p = p.expand(q.batch_shape)
        try:
            return kl_divergence(q, p)
        except NotImplementedError:
            z = q.sample((KL_SAMPLES,))
            return (q.log_prob(z) - p.log_prob(z)).mean(0)

    parts = _of_posterior(vae, x, terms, batch_size, seed)
    return None if any(part is None for part in parts) else torch.cat(parts).double().cpu()


def latent_means(vae: VAE, x: Shaped[Tensor, "N E"], *, batch_size: int = 1000) -> Float[Tensor, "N L"]:
    """E_q[z] of each image, on the CPU."""
    return torch.cat(_of_posterior(vae, x, lambda q: q.mean, batch_size)).double().cpu()


def _of_posterior(
    vae: VAE,
    x: Shaped[Tensor, "N E"],
    term: Callable[[Distribution], Tensor | None],
    batch_size: int,
    seed: int = 0,
) -> list[Tensor | None]:
    """A term of q(z|x), for `batch_size` images at a time."""
    vae.check_observed(x, grey=True)
    with vae.evaluating(), seeded(seed, x.device), pyro.validation_enabled(False):
        terms = [term(vae.posterior_of(batch)) for batch in x.split(batch_size)]
    return [part if part is None else part.detach() for part in terms]  # it may be a parameter itself


def squared_error(vae: VAE, images: Images, *, batch_size: int = 1000) -> float:
    """||x - x'||^2, summed over pixels in [0, 1] and averaged over images; x' is decoded at q's mean."""
    total = 0.0
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size].to(vae.zeros.device)
        again = vae.reconstruct(batch.pixels, batch.labels)
        total += (batch.pixels - again).double().square().sum().item()
    return total / len(images)


def pca_squared_error(train: Images, images: Images, components: int) -> float:
    """The same by principal components fitted to training images: the best that linear maps do there.

    Of training images that stay in their file a part is fitted, PCA_BYTES of them.
    """
    from sklearn.decomposition import PCA

    def numbers(part: Images) -> np.ndarray:
        return part.pixels.flatten(1).double().detach().cpu().numpy()

    # Training images are in random order: of those in a file the first, as many as may be in memory.
    fitted = numbers(train[: max(1, PCA_BYTES // (8 * math.prod(train.shape)))] if train.on_disk else train)
    pca = PCA(min(components, *fitted.shape), random_state=0).fit(fitted)
    total = 0.0
    for start in range(0, len(images), PCA_BATCH):
        x = numbers(images[start : start + PCA_BATCH])
        total += float(((x - pca.inverse_transform(pca.transform(x))) ** 2).sum())
    return total / len(images)


def variance_of_means(means: Float[Tensor, "N L"]) -> Float[Tensor, " L"] | None:
    """Var_x(E_q[z]) per latent dimension, unbiased; None for a single image.

    A dimension is active where it is more than ACTIVE, as in Importance Weighted Autoencoders, Burda,
    Grosse & Salakhutdinov, 2016, https://arxiv.org/abs/1509.00519, section 5.2.
    """
    return means.var(0) if len(means) > 1 else None


@dataclass(frozen=True)
class Probes:
    """How well classes can be told from latents: fractions of test images classified correctly.

    Attributes:
        linear: By logistic regression on standardised latents.
        neighbours: By the majority of the NEIGHBOURS nearest training latents.
        train, test: So many latents were fitted and tested.
    """

    linear: float
    neighbours: float
    train: int
    test: int


def probe(
    train: Float[Tensor, "N L"],
    train_labels: Int[Tensor, " N"] | None,
    test: Float[Tensor, "M L"],
    test_labels: Int[Tensor, " M"] | None,
) -> Probes | str:
    """Classifiers fitted on training latents and judged on test latents, or why there are none."""
    if train_labels is None or test_labels is None:
        return "no labels"
    if len(train_labels.unique()) < 2:
        return "one class only"
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    neighbours = KNeighborsClassifier(min(NEIGHBOURS, len(train)))
    both = (train, train_labels), (test, test_labels)
    fitted, judged = ((z.detach().cpu().numpy(), y.cpu().numpy()) for z, y in both)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # an almost best line is a probe as well
        accuracies = [float(judge.fit(*fitted).score(*judged)) for judge in (linear, neighbours)]
    return Probes(*accuracies, train=len(train), test=len(test))

"""The VAE: a likelihood, a decoder and a guide meet in one Pyro model/guide pair."""

import contextlib
from collections.abc import Callable, Iterator

import pyro
import pyro.poutine as poutine
import torch
from jaxtyping import Float, Shaped
from pyro.nn import PyroModule, pyro_method
from torch import Tensor, nn
from torch.distributions import Distribution

from pyrovae.guides import Guide
from pyrovae.likelihoods import Likelihood
from pyrovae.networks import Decoder


class VAE(PyroModule):
    """p(z) p(x|z) and q(z|x), with sites "z" and "x" in the plate "data".

    Args:
        likelihood: The decoder's numbers to p(x|z).
        decoder: Latents (..., L) to (..., D, likelihood.outputs).
        guide: Pixels (..., D) to q(z|x); becomes the attribute `posterior`. It brings p(z) as well,
            N(0, I) but for a discrete one.
        latent_dim: L.
        beta: The weight of the KL, > 0. At 1 the objective is the ELBO (beta-VAE, Higgins et al.,
            2017, https://openreview.net/forum?id=Sy2fzU9gl, eq. 4).

    Raises:
        ValueError: latent_dim < 1, or beta is not positive; the plain autoencoder's beta = 0 is not
            a probability model.

    Example:
        >>> from pyrovae.networks import MLP
        >>> from pyrovae.guides import MeanField
        >>> from pyrovae.likelihoods import Bernoulli
        >>> shape, family = (1, 8, 8), MLP(hidden=(32,))
        >>> vae = VAE(
        ...     likelihood=Bernoulli(),
        ...     decoder=family.decoder(2, shape, 1),
        ...     guide=MeanField(family.encoder(shape), 2),
        ...     latent_dim=2,
        ... )
        >>> vae.sample(5).shape
        torch.Size([5, 1, 8, 8])
    """

    def __init__(
        self, *, likelihood: Likelihood, decoder: Decoder, guide: Guide, latent_dim: int, beta: float = 1.0
    ):
        super().__init__()
        if latent_dim < 1:
            raise ValueError(f"expected latent_dim >= 1, got {latent_dim}")
        if not beta > 0:
            raise ValueError(f"expected beta > 0, got {beta}")
        self.likelihood = likelihood
        self.decoder = decoder
        self.posterior = guide
        self.latent_dim = latent_dim
        self.beta = beta
        # Not PyroParams: Pyro reads those from its global store, where the value of an earlier VAE
        # may stand under the same name.
        self.learned = nn.ParameterDict(
            {name: torch.tensor(value) for name, value in likelihood.learned.items()}
        )
        self.register_buffer("zeros", torch.zeros(latent_dim), persistent=False)

    @pyro_method
    def model(self, x: Shaped[Tensor, "B D"]) -> None:
        """p(z)^beta p(x|z) for observations x (B, D), as `likelihood.observe` gives them."""
        self._model(x)

    @pyro_method
    def guide(self, x: Shaped[Tensor, "B D"]) -> None:
        """q(z|x)^beta for observations x (B, D)."""
        self._guide(x)

    @property
    def pair(self) -> tuple[Callable[[Tensor], None], Callable[[Tensor], None]]:
        """(model, guide) without Pyro's parameter store, for an optimizer over `parameters()`.

        The same programs as `model` and `guide`, which also register every parameter in Pyro's
        global store at each call, as `pyro.infer.SVI` and its optimizers need.
        """
        return self._model, self._guide

    def _model(self, x: Shaped[Tensor, "B D"]) -> None:
        with pyro.plate("data", len(x), dim=-1):
            with self._scaled():
                z = pyro.sample("z", self.posterior.prior(self.zeros))
            pyro.sample("x", self.likelihood(self.decoder(z), **self.learned), obs=x)

    def _guide(self, x: Shaped[Tensor, "B D"]) -> None:
        with pyro.plate("data", len(x), dim=-1), self._scaled():
            pyro.sample("z", self.posterior(self.likelihood.to_pixels(x).to(self.zeros.dtype)))

    def _scaled(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.beta == 1 else poutine.scale(scale=self.beta)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """No gradients, evaluation mode and beta = 1; on leaving, all is as it was."""
        modes, beta = {module: module.training for module in self.modules()}, self.beta
        self.eval()
        self.beta = 1.0
        try:
            with torch.no_grad():
                yield
        finally:
            for module, training in modes.items():
                module.training = training
            self.beta = beta

    def approximate_posterior(self, images: Float[Tensor, "N ..."]) -> Distribution:
        """q(z|x) of images with pixels in [0, 1], (N, C, H, W) or (N, D): batch (N,), event (L,)."""
        pixels = images.reshape(len(images), -1).to(self.zeros)
        with self.evaluating():
            return self.posterior(pixels)

    def encode(self, images: Float[Tensor, "N ..."]) -> Float[Tensor, "N L"]:
        """The mean of q(z|x) for images with pixels in [0, 1], (N, C, H, W) or (N, D)."""
        return self.approximate_posterior(images).mean

    def decode(self, z: Float[Tensor, "*batch L"]) -> Float[Tensor, "*batch C H W"]:
        """The expected images E[x|z], pixels in [0, 1]."""
        with self.evaluating():
            pixels = self.likelihood.mean(self.decoder(z.to(self.zeros)))
        return pixels.reshape(*z.shape[:-1], *self.decoder.shape)

    def reconstruct(self, images: Float[Tensor, "N ..."]) -> Float[Tensor, "N C H W"]:
        """The expected images at q(z|x)'s mean, or at its most probable code, for (N, C, H, W) or (N, D)."""
        return self.decode(self.posterior.point(self.approximate_posterior(images)))

    def sample(self, n: int, *, seed: int | None = None) -> Float[Tensor, "n C H W"]:
        """The expected images of n draws from the prior; with a seed, the same ones each time."""
        return self.decode(self.draw(n, seed=seed))

    def draw(self, n: int, *, seed: int | None = None) -> Float[Tensor, "n L"]:
        """n draws of z from the prior, on the CPU; with a seed, the same ones each time."""
        with contextlib.nullcontext() if seed is None else torch.random.fork_rng(devices=[]):
            if seed is not None:
                torch.default_generator.manual_seed(seed)
            return self.posterior.prior(torch.zeros(self.latent_dim)).sample((n,))

    def parts(self) -> dict[str, dict[str, slice]]:
        """Its parameters in named groups, the guide's and the decoder: of each parameter, these rows."""
        of_guide = {
            group: {f"posterior.{name}": rows for name, rows in members.items()}
            for group, members in self.posterior.parts().items()
        }
        names = [name for name, _ in self.named_parameters() if not name.startswith("posterior.")]
        return of_guide | {"decoder": dict.fromkeys(names, slice(None))}


def prior_grid(side: int) -> tuple[Float[Tensor, "side side 2"], Float[Tensor, " side"]]:
    """A grid of 2-d latent points at evenly spaced quantiles of the prior, and those quantiles.

    Point [i, j] has the j-th quantile as z1 and the i-th as z2.
    """
    quantiles = (torch.arange(side) + 0.5) / side
    z = torch.special.ndtri(quantiles)
    return torch.stack(torch.meshgrid(z, z, indexing="xy"), dim=-1), quantiles

"""The VAE: a likelihood, a decoder and a guide meet in one Pyro model/guide pair."""

import contextlib
import math
from collections.abc import Callable, Iterator

import pyro
import pyro.poutine as poutine
import torch
from jaxtyping import Float, Shaped
from pyro.nn import PyroModule, pyro_method
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.functional import one_hot
from torch.nn.modules.module import register_module_forward_pre_hook

from pyrovae.data import Images
from pyrovae.guides import Guide
from pyrovae.likelihoods import Likelihood
from pyrovae.networks import Decoder
from pyrovae.runtime.errors import FieldError
from pyrovae.runtime.inputs import (
    check_above,
    check_codes,
    check_flat,
    check_labels,
    check_layout,
    check_pixels,
)


class VAE(PyroModule):
    """p(z) p(x|z) and q(z|x), with sites "z" and "x" in the plate "data".

    With C classes it is conditional, p(z) p(x|z, y) and q(z|x, y) (Learning Structured Output
    Representation using Deep Conditional Generative Models, Sohn, Yan & Lee, 2015,
    https://papers.nips.cc/paper/5775, with a prior that does not see y): the class y, one-hot, stands
    behind the pixels in every observation, (B, D + C), behind the pixels that the guide gets, and
    behind the latents that the decoder gets. Every p(x) is then p(x|y).

    Args:
        likelihood: The decoder's numbers to p(x|z).
        decoder: Latents (..., L + C) to (..., D, likelihood.outputs).
        guide: Pixels (..., D + C) to q(z|x); becomes the attribute `posterior`. It brings p(z) as well,
            N(0, I) but for a discrete one.
        latent_dim: L.
        classes: C; 0 for a VAE that sees no labels.
        beta: The weight of the KL, > 0. At 1 the objective is the ELBO (beta-VAE, Higgins et al.,
            2017, https://openreview.net/forum?id=Sy2fzU9gl, eq. 4).

    Attributes:
        beta: A number, or a tensor where a captured step is to see it change.

    Raises:
        ValueError: latent_dim < 1, classes < 0, or beta is not positive; the plain autoencoder's
            beta = 0 is not a probability model.

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
        self,
        *,
        likelihood: Likelihood,
        decoder: Decoder,
        guide: Guide,
        latent_dim: int,
        classes: int = 0,
        beta: float = 1.0,
    ):
        super().__init__()
        if classes < 0:
            raise ValueError(f"expected classes >= 0, got {classes}")
        if latent_dim < 1:
            raise FieldError(f"expected latent_dim >= 1, got {latent_dim}", field="latent_dim")
        check_above("beta", beta)
        self.likelihood = likelihood
        self.decoder = decoder
        self.posterior = guide
        guide.attach(self._log_weight)
        self.latent_dim = latent_dim
        self.classes = classes
        self.beta: float | Tensor = beta
        self.trained_beta: float | None = None  # while evaluating: what q(z|x) was made for
        # Not PyroParams: Pyro reads those from its global store, where the value of an earlier VAE
        # may stand under the same name.
        self.learned = nn.ParameterDict(
            {name: torch.tensor(value) for name, value in likelihood.learned.items()}
        )
        self.register_buffer("zeros", torch.zeros(latent_dim), persistent=False)

    @pyro_method
    def model(self, x: Shaped[Tensor, "B E"]) -> None:
        """p(z)^beta p(x|z) for observations as `observe` gives them, (B, D) or (B, D + C)."""
        self._model(x)

    @pyro_method
    def guide(self, x: Shaped[Tensor, "B E"]) -> None:
        """q(z|x)^beta for observations as `observe` gives them, (B, D) or (B, D + C)."""
        self._guide(x)

    @property
    def pair(self) -> tuple[Callable[[Tensor], None], Callable[[Tensor], None]]:
        """(model, guide) without Pyro's parameter store, for an optimizer over `parameters()`.

        The same programs as `model` and `guide`, which also register every parameter in Pyro's
        global store at each call, as `pyro.infer.SVI` and its optimizers need.
        """
        return self._model, self._guide

    def _model(self, x: Shaped[Tensor, "B E"]) -> None:
        observed, y = self.split(x)
        with pyro.plate("data", len(x), dim=-1):
            with self._scaled():
                z = pyro.sample("z", self.posterior.prior(self.zeros))
            pyro.sample("x", self.likelihood_of(z, y), obs=observed)

    def _guide(self, x: Shaped[Tensor, "B E"]) -> None:
        with pyro.plate("data", len(x), dim=-1), self._scaled():
            pyro.sample("z", self.posterior_of(x))

    def check(self, images: Images, name: str = "images") -> None:
        """Checks that these are images that this VAE can take, with the labels that it needs.

        The pixels of images that stay in their file were checked when the file was opened.

        Args:
            name: What to call the images in an error.

        Raises:
            ValueError: There are none, their shape is another, a pixel is not in [0, 1], or a conditional VAE
                has no labels or ones that are none of its classes.
        """
        if not len(images):
            raise ValueError(f"expected at least one image in {name}, got none")
        if images.on_disk and images.shape != self.decoder.shape:
            raise ValueError(f"expected {name} of shape {self.decoder.shape}, got {images.shape}")
        if not images.on_disk:
            check_layout(images.pixels, self.decoder.shape, name, flat=False)
            check_pixels(images.pixels, name)
        if self.classes:
            check_labels(images.labels, self.classes, (len(images),))

    def observe(
        self,
        pixels: Float[Tensor, "B D"],
        labels: Shaped[Tensor, "B ..."] | None = None,
        *,
        check: bool = True,
    ) -> Shaped[Tensor, "B E"]:
        """Images as the likelihood observes them, (B, D), and their classes one-hot if it is conditional.

        Args:
            pixels: In [0, 1].
            labels: From 0 to C - 1; not looked at where the VAE is not conditional.
            check: Whether to look at the values, which waits for the device. A loop over images that were
                checked before, by `check` for example, does without.

        Raises:
            ValueError: A pixel is not in [0, 1], or it is conditional and there are no labels, wrong ones, or
                weights of classes.
        """
        if check:
            check_flat(pixels, self.decoder.shape)
            check_pixels(pixels)
        if check and self.classes:
            check_labels(labels, self.classes, pixels.shape[:-1])
        observed = self.likelihood.observe(pixels)
        if not self.classes:
            return observed
        return torch.cat([observed, one_hot(labels.long(), self.classes).to(observed)], -1)

    def check_observed(self, x: Shaped[Tensor, "N E"], *, grey: bool = False) -> None:
        """Checks that x is what `observe` gives for this VAE, (N, D) or (N, D + C); waits for the device.

        Args:
            grey: Whether pixels in [0, 1] may stand for what is drawn from them, as they do for a guide.

        Raises:
            ValueError: Its shape is another, or it has values that the likelihood cannot observe.
        """
        numbers = math.prod(self.decoder.shape) + self.classes
        if x.dim() != 2 or x.shape[1] != numbers:
            raise ValueError(
                f"expected observations of shape (N, {numbers}), got {tuple(x.shape)}: take vae.observe(...)"
            )
        observed, y = self.split(x)
        possible = self.likelihood.can_observe(observed, **self.learned)
        if grey:
            pixels = self.likelihood.to_pixels(observed)
            possible |= ((pixels >= 0) & (pixels <= 1)).all(-1)
        possible = possible.all()
        if y is not None:
            possible &= ((y == 0) | (y == 1)).all() & (y.sum(-1) == 1).all()
        if not possible:
            raise ValueError(
                f"expected observations of {self.likelihood}, got values that it cannot observe: "
                "take vae.observe(...)"
            )

    def split(self, x: Shaped[Tensor, "*batch E"]) -> tuple[Shaped[Tensor, "*batch D"], Tensor | None]:
        """Observations apart: what the likelihood sees, and the one-hot class, None if there is none."""
        return (x[..., : -self.classes], x[..., -self.classes :]) if self.classes else (x, None)

    def posterior_of(self, x: Shaped[Tensor, "*batch E"]) -> Distribution:
        """q(z|x) of observations: batch shape that of x, event shape (L,)."""
        observed, y = self.split(x)
        pixels = self.likelihood.to_pixels(observed).to(self.zeros.dtype)
        return self.posterior(pixels if y is None else torch.cat([pixels, y.to(pixels)], -1))

    def likelihood_of(
        self, z: Float[Tensor, "*batch L"], y: Shaped[Tensor, "..."] | None = None
    ) -> Distribution:
        """p(x|z) or p(x|z, y), event shape (D,), for one-hot classes y (C,) or (..., C)."""
        if y is not None:
            z = torch.cat([z, y.to(z).expand(*z.shape[:-1], -1)], -1)
        return self.likelihood(self.decoder(z), **self.learned)

    def log_lik(self, z: Float[Tensor, "*batch L"], x: Shaped[Tensor, "..."]) -> Float[Tensor, "..."]:
        """log p(x|z) in nats, for observations x (..., D) or (..., D + C) that broadcast against z."""
        observed, y = self.split(x)
        return self.likelihood_of(z, y).log_prob(observed)

    def _condition(self, labels: Tensor | None, batch: torch.Size) -> Tensor | None:
        """Checks labels given by a user, and gives them as weights of classes; None if the VAE sees none."""
        if not self.classes:
            return None
        check_labels(labels, self.classes, batch, weights=True)
        weights = labels if labels.is_floating_point() else one_hot(labels.long(), self.classes)
        return weights.to(self.zeros)

    def _log_weight(
        self, pixels: Float[Tensor, "*batch D"], q: Distribution, z: Float[Tensor, "M *batch L"]
    ) -> Float[Tensor, "M *batch"]:
        """log p(x|z) / beta + log p(z) - log q(z|x) for what the guide is given, in nats.

        Grey pixels of a Bernoulli count as the mean over what may be drawn from them.
        """
        with pyro.validation_enabled(False):
            pixels, y = self.split(pixels)
            log_lik = self.likelihood_of(z, y).log_prob(self.likelihood.from_pixels(pixels))
            log_ratio = self.posterior.prior(self.zeros).log_prob(z) - q.log_prob(z)
        return log_lik / (self.trained_beta or self.beta) + log_ratio

    def _scaled(self) -> contextlib.AbstractContextManager:
        plain = not isinstance(self.beta, Tensor) and self.beta == 1
        return contextlib.nullcontext() if plain else poutine.scale(scale=self.beta)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """No gradients, evaluation mode and beta = 1; on leaving, all is as it was.

        Networks in a list or a closure, where PyTorch does not look for them, are put into evaluation mode as
        well when they are called.
        """
        modes, beta = {module: module.training for module in self.modules()}, self.beta
        trained = self.trained_beta

        def evaluate(module: nn.Module, args: tuple) -> None:
            if module not in modes:
                modes[module], module.training = module.training, False

        hook = register_module_forward_pre_hook(evaluate)
        self.eval()
        self.trained_beta = beta if trained is None else trained
        self.beta = 1.0
        try:
            with torch.no_grad():
                yield
        finally:
            hook.remove()
            for module, training in modes.items():
                module.training = training
            self.beta, self.trained_beta = beta, trained

    def approximate_posterior(
        self, images: Float[Tensor, "N ..."], labels: Tensor | None = None
    ) -> Distribution:
        """q(z|x) of images with pixels in [0, 1], (N, C, H, W) or (N, D): batch (N,), event (L,).

        Images of one channel may also be (N, H, W), here and in the methods below.

        Args:
            labels: Classes (N,) or weights of classes (N, C), which a conditional VAE needs and others ignore;
                here and in the methods below.

        Raises:
            ValueError: The images are of another shape or type, or have pixels outside [0, 1]; or a conditional
                VAE has no labels, or ones that are none of its classes.
        """
        check_layout(images, self.decoder.shape)
        check_pixels(images)
        y, pixels = self._condition(labels, images.shape[:1]), images.flatten(1).to(self.zeros)
        # Cut or rounded as in training; where training draws pixels, the guide gets their mean.
        pixels = self.likelihood.to_pixels(self.likelihood.from_pixels(pixels)).to(self.zeros)
        with self.evaluating():
            return self.posterior(pixels if y is None else torch.cat([pixels, y], -1))

    def encode(self, images: Float[Tensor, "N ..."], labels: Tensor | None = None) -> Float[Tensor, "N L"]:
        """The mean of q(z|x) for images with pixels in [0, 1], (N, C, H, W) or (N, D)."""
        return self.approximate_posterior(images, labels).mean.detach()  # it may be a parameter itself

    def decode(
        self, z: Float[Tensor, "*batch L"], labels: Tensor | None = None
    ) -> Float[Tensor, "*batch channels H W"]:
        """The expected images E[x|z], pixels in [0, 1]; labels (*batch) or (*batch, C).

        Raises:
            ValueError: z is of another shape or not finite, or the labels are not those of a conditional VAE.
        """
        check_codes(z, self.latent_dim)
        return self._decode(z, labels)

    def _decode(self, z: Float[Tensor, "*batch L"], labels: Tensor | None) -> Float[Tensor, "*batch C H W"]:
        given, y = z.to(self.zeros), self._condition(labels, z.shape[:-1])
        with self.evaluating():
            pixels = self.likelihood.mean(self.decoder(given if y is None else torch.cat([given, y], -1)))
        return pixels.reshape(*z.shape[:-1], *self.decoder.shape)

    def reconstruct(
        self, images: Float[Tensor, "N ..."], labels: Tensor | None = None
    ) -> Float[Tensor, "N channels H W"]:
        """The expected images at q(z|x)'s mean, or at its most probable code, for (N, C, H, W) or (N, D)."""
        return self._decode(self.posterior.point(self.approximate_posterior(images, labels)), labels)

    def sample(
        self, n: int, labels: Tensor | None = None, *, seed: int | None = None
    ) -> Float[Tensor, "n channels H W"]:
        """The expected images of n draws from the prior; with a seed, the same ones each time."""
        return self.decode(self.draw(n, seed=seed), labels)

    def draw(self, n: int, *, seed: int | None = None) -> Float[Tensor, "n L"]:
        """n draws of z from the prior, on the CPU; with a seed, the same ones each time.

        Raises:
            ValueError: n < 1.
        """
        if n < 1:
            raise ValueError(f"expected n >= 1, got {n}")
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

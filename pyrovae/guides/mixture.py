"""A guide with several modes."""

from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution

from pyrovae.guides.base import Headed, check_positive
from pyrovae.guides.distributions import GaussianMixture
from pyrovae.networks import Encoder


class Mixture(Headed):
    """A mixture of Gaussians with diagonal covariances, sum_c w_c(x) N(loc_c(x), diag(scale_c(x)^2)).

    Its samples carry pathwise gradients by implicit reparameterization (see GaussianMixture), so that
    it takes every estimator but those of a closed-form KL or of opposite noise. Such gradients tell the
    weights of components that lie far apart next to nothing: there, train with `rloo`.

    Args:
        encoder: Pixels (..., D) to features (..., encoder.out_features).
        latent_dim: L.
        components: C.
        scale_head: A name in SCALE_HEADS.

    Raises:
        ValueError: components < 1.

    Source: Automatic Differentiation Variational Inference with Mixtures, Morningstar et al., 2021,
    https://arxiv.org/abs/2003.01687, there with stratified samples.
    """

    def __init__(self, encoder: Encoder, latent_dim: int, *, components: int = 5, scale_head: str = "exp"):
        check_positive(components=components)
        heads = {"loc": components * latent_dim, "scale": components * latent_dim, "weights": components}
        super().__init__(encoder, heads, scale_head)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Distribution:
        loc, scale, logits = self.outputs(self.encoder(x))
        shape = logits.shape[-1], -1
        return GaussianMixture(logits, loc.unflatten(-1, shape), scale.unflatten(-1, shape))

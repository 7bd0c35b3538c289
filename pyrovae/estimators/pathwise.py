"""The evidence lower bound (ELBO): its pathwise gradients, and what needs no baseline."""

import math
import warnings
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Normal

from pyrovae.estimators import twins
from pyrovae.estimators.antithetic import innermost
from pyrovae.estimators.base import Estimator
from pyrovae.estimators.draws import Draws
from pyrovae.estimators.references import Named, of_elbo, plain
from pyrovae.estimators.twins import Twin
from pyrovae.runtime.buffers import kept_buffers


class Elbo(Estimator):
    """The ELBO by Monte Carlo: the mean of log p(x, z) - log q(z|x).

    With `use_rep`, the total derivative through z (Auto-Encoding Variational Bayes, Kingma & Welling,
    2014, https://arxiv.org/abs/1312.6114, eq. 6). Without, the score-function gradient
    E[grad log p(x, z) + f grad log q(z|x)] with no baseline (Black Box Variational Inference,
    Ranganath et al., 2014, https://arxiv.org/abs/1401.0118, eq. 3).

    Example:
        >>> Elbo(num_particles=5, use_rep=False).num_particles
        5
    """

    twin: ClassVar = Twin(twins.elbo)

    def bound(self, draws: Draws) -> Float[Tensor, " B"]:
        return draws.log_weight.mean(0)

    def surrogate(self, draws: Draws) -> Float[Tensor, " B"]:
        if self.use_rep:
            return draws.log_weight.mean(0)
        return (draws.log_joint + draws.scored(draws.log_weight)).mean(0)

    def plain(self, use_rep: bool) -> Named | None:
        return plain("elbo", self.num_particles, use_rep)

    def references(self, use_rep: bool) -> tuple[Named, ...]:
        return of_elbo(use_rep)


class AnalyticKL(Estimator):
    """The ELBO with its KL in closed form: the mean of log p(x|z), less KL(q(z|x) || p(z)).

    Auto-Encoding Variational Bayes, Kingma & Welling, 2014, https://arxiv.org/abs/1312.6114, eq. 7
    (eq. 10 for the Gaussian case). Of several latent sites, each adds the KL of its distributions given the
    particle's other samples. A site without a closed form that is right there, as where the model samples
    earlier what the guide samples later, or where the two scale or mask it differently, adds
    log q(z|x) - log p(z) of its sample instead, as in `Elbo`, with a warning.

    Without `use_rep`, each site's score is multiplied by what the site influences: log p(x|z), and the KL of
    the sites that the guide samples later.

    Raises:
        ValueError: On use, where no site has such a closed form.

    Warns:
        UserWarning: On use, where a site has none.

    Example:
        >>> AnalyticKL().use_rep
        True
    """

    twin: ClassVar = Twin(twins.analytic_kl)
    plain = Elbo.plain
    references = Elbo.references

    def draws(self, model, guide, *args, **kwargs) -> Draws:
        draws = super().draws(model, guide, *args, **kwargs)
        reasons = {name: form.reason for name, form in draws.closed_forms.items() if form.reason}
        if reasons and all(form.where is False for form in draws.closed_forms.values()):
            site, reason = next(iter(reasons.items()))
            raise ValueError(
                f"expected a closed-form KL(q || p) at site {site!r}, got none that is right, since {reason}: "
                "use the estimator 'elbo'"
            )
        for site, reason in reasons.items():
            warnings.warn(f"the KL at site {site!r} is taken from samples, since {reason}", stacklevel=2)
        return draws

    def bound(self, draws: Draws) -> Float[Tensor, " B"]:
        return draws.log_lik.mean(0) - self.kl(draws)

    def surrogate(self, draws: Draws) -> Float[Tensor, " B"]:
        if self.use_rep:
            return self.bound(draws)
        signal, explicit, outside = draws.log_lik, draws.log_lik, draws.log_lik_outside
        for name, kl in draws.kls.items():
            signal = signal + (kl.log_prior - kl.log_guide)
            explicit = explicit + (kl.log_prior - kl.closed)
            if not draws.layout.is_inside(draws.guide_sites[name]):
                outside = outside + (kl.log_prior - kl.log_guide)
        later, so_far = {}, torch.zeros_like(signal)
        closed = {draws.sources.get(name, name): kl.closed for name, kl in draws.kls.items()}
        for name in reversed(draws.guide_sites):
            later[name] = so_far
            so_far = so_far - closed.get(name, 0.0)
        return (explicit + draws.scored(signal, later=later, outside=outside)).mean(0)

    def kl(self, draws: Draws) -> Float[Tensor, " B"]:
        return draws.kl.mean(0)


class StickingTheLanding(Elbo):
    """The ELBO without the score term of its total derivative: log q(z|x) at fixed parameters.

    Its variance vanishes where q is the exact posterior (Sticking the Landing, Roeder et al., 2017,
    https://arxiv.org/abs/1703.09194, eq. 8).

    Example:
        >>> StickingTheLanding(num_particles=4).use_rep
        True
    """

    gradients: ClassVar = (True,)
    twin: ClassVar = Twin(twins.path)

    def surrogate(self, draws: Draws) -> Float[Tensor, " B"]:
        return (draws.log_joint - draws.log_guide_fixed).mean(0)


class Antithetic(Elbo):
    """The ELBO on pairs of samples with opposite noise, eps and -eps.

    On a quadratic log-density the gradient in a Gaussian's mean then has no variance (e.g.
    Differentiable Antithetic Sampling for Variance Reduction, Wu et al., 2019,
    https://arxiv.org/abs/1810.02555). Others that average over particles take `antithetic=True` too.

    Example:
        >>> Antithetic().num_particles
        2
    """

    gradients: ClassVar = (True,)
    particles: ClassVar = (2, None)
    twin: ClassVar = Twin(twins.total)

    def __init__(self, *, antithetic: bool = True, **settings):
        super().__init__(antithetic=antithetic, **settings)


class Reconstruction(Estimator):
    """The mean of log p(x|z) alone: the autoencoder's objective, which bounds nothing.

    Under a Gaussian likelihood it is the squared error, times -1/(2c) and up to a constant. For a guide
    with a density it is the ELBO's limit at beta = 0.

    Example:
        >>> Reconstruction().needs_density
        False
    """

    gradients: ClassVar = (True,)
    needs_density: ClassVar = False
    twin: ClassVar = Twin(twins.reconstruction)
    plain = Elbo.plain
    references = Elbo.references

    def draws(self, model, guide, *args, **kwargs) -> Draws:
        draws = super().draws(model, guide, *args, **kwargs)
        if not draws.observed_sites:
            raise ValueError("expected a model that observes data, got none: pass obs= to a pyro.sample")
        return draws

    def bound(self, draws: Draws) -> Float[Tensor, " B"]:
        return draws.log_lik.mean(0)

    def surrogate(self, draws: Draws) -> Float[Tensor, " B"]:
        return draws.log_lik.mean(0)


class MeasureValued(Elbo):
    """The ELBO by measure-valued derivatives of a Gaussian q, with coupled samples.

    Each latent dimension's mean and scale costs two further evaluations of the model: with W from a
    Rayleigh, M from a double-sided Maxwell and N = M U from a Gaussian, d/dmu E[f] =
    E[f(mu + sW) - f(mu - sW)] / (s sqrt(2 pi)) and d/ds E[f] = E[f(mu + sM) - f(mu + sN)] / s
    (Monte Carlo Gradient Estimation in Machine Learning, Mohamed et al., 2020,
    https://arxiv.org/abs/1906.10652, section 6). Needs no gradient of log p(x, z) in z.

    The model is run twice: at the sample, with its gradient, and at all 4 L further points. Of the second
    run, running statistics count nothing. Batch norm in training mode normalises it by the statistics of
    those points, and dropout in the model is drawn anew for each of them: that leaves the gradient unbiased,
    with more variance.

    Raises:
        ValueError: On use, where the guide is not a Gaussian with diagonal covariance at one site, in one plate
            over the data.

    Example:
        >>> MeasureValued(num_particles=2)
        Traceback (most recent call last):
        pyrovae.runtime.errors.FieldError: expected num_particles <= 1 for MeasureValued, got 2
    """

    gradients: ClassVar = (False,)
    particles: ClassVar = (1, 1)
    twin: ClassVar = Twin(variance=twins.measure_valued_variance)

    def surrogate(self, draws: Draws) -> Float[Tensor, " B"]:
        draws.check_separate("MeasureValued")
        (site,) = draws.guide_sites.values() if len(draws.guide_sites) == 1 else [None]
        q = site and innermost(site["fn"])
        if not isinstance(q, Normal):
            raise ValueError(
                "expected a Gaussian guide with diagonal covariance at one site for MeasureValued, got "
                f"{ {name: site['fn'] for name, site in draws.guide_sites.items()} }"
            )
        z = site["value"]
        loc, scale = (t.expand(z.shape).reshape(draws.batch_size, -1) for t in (q.loc, q.scale))
        with torch.no_grad(), kept_buffers():
            f = draws.at(self._perturbed(z, loc, scale)).log_weight
        up, down, maxwell, gaussian = f.reshape(4, -1, draws.batch_size).transpose(1, 2)
        in_loc = (up - down) / (scale.detach() * math.sqrt(2 * math.pi))
        in_scale = (maxwell - gaussian) / scale.detach()
        return draws.log_joint.mean(0) + (in_loc * loc + in_scale * scale).sum(-1)

    @staticmethod
    def _perturbed(z: Tensor, loc: Float[Tensor, "B L"], scale: Float[Tensor, "B L"]) -> Tensor:
        """(4 L, *z.shape): z with one coordinate replaced, for each coordinate, in four ways."""
        rayleigh = torch.randn(2, *loc.shape, dtype=loc.dtype, device=loc.device).norm(dim=0)
        maxwell = torch.randn(3, *loc.shape, dtype=loc.dtype, device=loc.device).norm(dim=0)
        sign = torch.rand_like(loc).sub(0.5).sign()
        maxwell = sign * maxwell
        noise = torch.stack([rayleigh, -rayleigh, maxwell, maxwell * torch.rand_like(loc)])
        replaced = torch.eye(loc.shape[-1], dtype=torch.bool, device=loc.device)[:, None, :]
        values = torch.where(replaced, (loc + scale * noise)[:, None], z.reshape(loc.shape))
        return values.reshape(-1, *z.shape)

"""Where the KL from guide to prior has a closed form that may stand for what the samples give."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from pyro.distributions import Delta, MaskedDistribution
from torch import Tensor
from torch.distributions import Distribution, Independent, kl_divergence

from pyrovae.estimators.antithetic import innermost
from pyrovae.estimators.layout import Site, plates_of
from pyrovae.estimators.traces import is_auxiliary, known, masked_outside


@dataclass(frozen=True)
class ClosedForm:
    """The KL from a latent site's distribution in the guide to the one in the model.

    Attributes:
        kl: In nats, for each cell of the site's plates, without scale and mask; None if there is none.
        where: The cells where it may stand for log q - log p of the sample: a mask, or True for all.
        reason: Why it may not stand for all of them, or "".
    """

    kl: Tensor | None
    where: Tensor | bool
    reason: str = ""


@dataclass(frozen=True)
class SiteKL:
    """What a latent site adds to KL(q(z|x) || p(z)), scaled and masked, in nats; 0.0 for what it does without.

    Attributes:
        closed: The closed form, where it may be used.
        log_guide: log q(z|x) of the sample elsewhere.
        log_prior: log p(z) of the sample elsewhere.
    """

    closed: Float[Tensor, "K B"] | float
    log_guide: Float[Tensor, "K B"] | float
    log_prior: Float[Tensor, "K B"] | float

    @property
    def value(self) -> Float[Tensor, "K B"]:
        """The site's KL given the particle's other samples, or an estimate of it."""
        return self.closed + self.log_guide - self.log_prior


def closed_forms(model_sites: dict[str, Site], guide_sites: dict[str, Site]) -> dict[str, ClosedForm]:
    """For each latent site, its KL in closed form and where it may be used.

    The closed form is a mean over the site's own sample with all else held fixed. It is right in the mean
    over all samples if neither distribution depends on what the guide samples later, as the sample of the
    site itself may have a part in that. The guide's never does. For the model's it suffices that the guide
    samples earlier all that the model samples earlier. This is sufficient, not necessary: a site of the
    model may have no use for what is sampled before it.

    Args:
        model_sites: The latent sites in the model's order.
        guide_sites: The same sites, and auxiliary ones, in the guide's order.

    Source: Pyro's `TraceMeanField_ELBO`, which uses the closed forms in any order and warns.
    """
    return {name: _closed_form(name, model_sites, guide_sites) for name in guide_sites if name in model_sites}


def sources(guide_sites: dict[str, Site]) -> dict[str, str]:
    """For each point that is the very sample of an auxiliary site, which site that is.

    Pyro's AutoNormal has such points for real numbers. The KL of other points has no closed form.
    """
    points = {name: fn for name, site in guide_sites.items() if isinstance(fn := innermost(site["fn"]), Delta)}
    auxiliary = {n: site for n, site in guide_sites.items() if is_auxiliary(site) and n not in points}
    return {
        name: source
        for name, point in points.items()
        for source, site in auxiliary.items()
        if not point.log_density.requires_grad and _is_same(point.v, site["value"])
    }


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same numbers in memory."""
    layouts = [(t.shape, t.stride(), t.storage_offset()) for t in (a, b)]
    return layouts[0] == layouts[1] and torch._C._is_alias_of(a, b)


def _closed_form(name: str, model_sites: dict[str, Site], guide_sites: dict[str, Site]) -> ClosedForm:
    p_site, q_site = masked_outside(model_sites[name]), masked_outside(guide_sites[name])
    p, q = p_site["fn"], q_site["fn"]
    earlier_in_guide = _before(name, guide_sites)
    late = [other for other in _before(name, model_sites) if other not in earlier_in_guide]
    if late:
        return ClosedForm(None, False, f"the model samples {late[0]!r} before it and the guide after it")
    if {plate.name for plate in plates_of(p_site)} != {plate.name for plate in plates_of(q_site)}:
        return ClosedForm(None, False, "model and guide sample it in different plates")
    if isinstance(innermost(q), Delta):  # Pyro's would leave out its log_density
        return ClosedForm(None, False, f"there is none for {q} and {p}")
    where = same(p_site["scale"], q_site["scale"]) & same(p_site["mask"], q_site["mask"])
    everywhere = known(where)
    different = "model and guide scale or mask it in different ways"
    if where is False or [*map(id, _masks(p))] != [*map(id, _masks(q))]:
        return ClosedForm(None, False, different)
    try:
        kl = kl_divergence(q, p)
    except NotImplementedError:
        return ClosedForm(None, False, f"there is none for {q} and {p}")
    return ClosedForm(kl, everywhere or where, different if everywhere is False else "")


def _masks(fn: Distribution) -> list[Tensor | bool]:
    """The masks inside a distribution."""
    masks = []
    while isinstance(fn, Independent | MaskedDistribution):
        masks += [fn._mask] if isinstance(fn, MaskedDistribution) else []
        fn = fn.base_dist
    return masks


def _before(name: str, sites: dict[str, Site]) -> list[str]:
    names = list(sites)
    return names[: names.index(name)]


def same(a: Tensor | float | bool | None, b: Tensor | float | bool | None) -> Tensor | bool:
    """Where two scales or two masks are equal; None is a mask that leaves out nothing."""
    return True if a is b else (True if a is None else a) == (True if b is None else b)

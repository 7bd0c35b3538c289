"""Traces of a model and a guide: how the programs are run, each once, and what their sites are."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.distributions import Delta, MaskedDistribution
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution, Independent

from pyrovae.estimators.antithetic import innermost
from pyrovae.estimators.layout import PARTICLES, Site

Program = Callable[[], Any]  # a model or a guide with its arguments


def traced(
    program: Program, num_particles: int, dim: int = -2, *, at: poutine.Trace | None = None
) -> poutine.Trace:
    """A trace of a program on so many particles, with the values of another trace where one is given.

    Args:
        dim: The dimension of the plate over particles, where there are several.
    """

    def on_particles() -> None:
        with pyro.plate(PARTICLES, num_particles, dim=dim) if num_particles > 1 else contextlib.nullcontext():
            program()

    return poutine.trace(on_particles if at is None else poutine.replay(on_particles, trace=at)).get_trace()


class Enumerated(Exception):
    """A site that the program asks to be enumerated."""


def check_sampled(site: Site) -> None:
    """Checks that a site of a running program is to be sampled.

    Raises:
        Enumerated: It is to be enumerated. Pyro would append the trace's shapes to a ValueError.
    """
    if how := site["infer"].get("enumerate"):
        raise Enumerated(
            f"expected no enumerated site, got infer={{'enumerate': {how!r}}} at site {site['name']!r}: use "
            "Pyro's TraceEnum_ELBO, or the estimator 'enumerate'"
        )


class _Sampled(Messenger):
    """Refuses sites that a program asks to be enumerated."""

    def _pyro_sample(self, msg: Site) -> None:
        check_sampled(msg)


def replayed(model: Program, guide_trace: poutine.Trace, num_particles: int, dim: int = -2) -> poutine.Trace:
    """A trace of the model at the guide's samples.

    The model sees views of them, so that `weigh_samples` finds the gradients that come from the model.
    """
    views = {name: site["value"].view_as(site["value"]) for name, site in sample_sites(guide_trace).items()}
    with _Sampled():
        return traced(model, num_particles, dim, at=replaced(guide_trace, views))


def replaced(trace: poutine.Trace, values: dict[str, Tensor]) -> poutine.Trace:
    """The trace with these values in place of its own."""
    trace = trace.copy()
    for name, value in values.items():
        trace.nodes[name] = trace.nodes[name] | {"value": value}
    return trace


class Gates(Messenger):
    """Gates between a guide's sites, through which later sites see the samples of earlier ones.

    While they are closed, no gradient passes from a later site to what an earlier sample is made of, and
    the gradients in `samples` are partial derivatives. It must be the innermost handler around a guide, so
    that a trace has the samples themselves.

    Attributes:
        samples: For each site whose sample carries a gradient, the sample as later sites see it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.samples: dict[str, Tensor] = {}
        self._are_closed = [False]  # a list, so that the hooks hold nothing of what is computed

    def _pyro_post_sample(self, msg: Site) -> None:
        if is_drawn(msg) and msg["value"].requires_grad:
            gate, are_closed = msg["value"].view_as(msg["value"]), self._are_closed
            gate.register_hook(lambda gradient: torch.zeros_like(gradient) if are_closed[0] else gradient)
            msg["value"] = self.samples[msg["name"]] = gate.view_as(gate)

    @contextlib.contextmanager
    def closed(self) -> Iterator[None]:
        """While entered, the gates are closed."""
        self._are_closed[0] = True
        try:
            yield
        finally:
            self._are_closed[0] = False


def is_drawn(site: Site) -> bool:
    """Whether a site of a trace is a latent variable: not data, a plate's indices or a deterministic value."""
    return (
        site["type"] == "sample"
        and not site["is_observed"]
        and not site_is_subsample(site)
        and not site["infer"].get("_deterministic")
    )


def sample_sites(trace: poutine.Trace) -> dict[str, Site]:
    """The latent and the observed sites of a trace, by name, in the order in which they were sampled."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and (site["is_observed"] or is_drawn(site))
    }


def is_auxiliary(site: Site) -> bool:
    """Whether a site of a guide is one that the model lacks, by its `infer={"is_auxiliary": True}`."""
    return bool(site["infer"].get("is_auxiliary"))


def point_masses(guide_trace: poutine.Trace, gates: Gates) -> list[str]:
    """The guide's sites that put all their mass on a point, and bring no density of their own.

    A point that is made of a sample of an auxiliary site, as in Pyro's autoguides, has that site's density.
    Without gradients it cannot be told what a point is made of: beside such a site it then counts as none.
    """
    sites = sample_sites(guide_trace)
    points = {name: q for name, site in sites.items() if isinstance(q := innermost(site["fn"]), Delta)}
    sources = [name for name, site in sites.items() if is_auxiliary(site) and name not in points]
    nodes = {gates.samples[name].grad_fn for name in sources if name in gates.samples}

    def has_source(point: Tensor) -> bool:
        return bool(sources) and (not point.requires_grad or _is_made_of(point, nodes))

    return [n for n, q in points.items() if not q.log_density.requires_grad and not has_source(q.v)]


def _is_made_of(tensor: Tensor, nodes: set) -> bool:
    """Whether a tensor's graph has one of these nodes."""
    ahead, seen = [tensor.grad_fn], set()
    while ahead:
        node = ahead.pop()
        if node in nodes:
            return True
        if node is not None and node not in seen:
            seen.add(node)
            ahead += [parent for parent, _ in node.next_functions]
    return False


def masked_outside(site: Site, mask: Tensor | bool | None = None) -> Site:
    """The site with its distribution's own mask, and a further one, as part of the mask around the site."""
    fn, masks = site["fn"], [site["mask"], mask]
    if isinstance(fn, MaskedDistribution):
        fn, masks = fn.base_dist, [*masks, fn._mask]
    masks = [mask for mask in masks if mask is not None and mask is not True]
    together = None
    for mask in masks:
        together = mask if together is None else together & mask
    return site | {"fn": fn, "mask": together}


def unmasked(fn: Distribution) -> Distribution:
    """The distribution that all values are drawn from, also those that a mask leaves out of the density."""
    if isinstance(fn, MaskedDistribution):
        return unmasked(fn.base_dist)
    if isinstance(fn, Independent) and (base := unmasked(fn.base_dist)) is not fn.base_dist:
        return base.to_event(fn.reinterpreted_batch_ndims)
    return fn


def known(condition: Tensor | bool) -> bool | None:
    """Whether a condition holds everywhere; None while a graph is traced, where tensors have no values."""
    if isinstance(condition, bool):
        return condition
    everywhere = condition.all()
    return bool(everywhere) if type(everywhere) is Tensor else None

"""How estimators sample a guide, and how they explain what a program cannot do."""

import contextlib
import re
from collections.abc import Iterator

import pyro.poutine as poutine
from pyro.distributions.distribution import Distribution
from pyro.poutine.messenger import Messenger

from pyrovae.estimators.antithetic import NoMirrorImage, antithetic_pairs, innermost
from pyrovae.estimators.layout import PARTICLES, Site, too_deep
from pyrovae.estimators.traces import Enumerated, check_sampled, is_drawn, sample_sites

_COLLISION = re.compile(f'plates "(.+)" and "{PARTICLES}", collide at dim=(-[0-9]+)')


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Raises errors of running a program in the words of these estimators."""
    try:
        yield
    except (Enumerated, NoMirrorImage) as error:  # a ValueError there would have Pyro append the trace's shapes
        raise ValueError(str(error)) from None
    except ValueError as error:
        if collision := _COLLISION.search(str(error)):
            raise ValueError(too_deep(collision[1], int(collision[2]), -int(collision[2]))) from None
        raise


class Sampling(Messenger):
    """How a guide's latent sites are drawn: in antithetic pairs, cut from the graph, or as ever."""

    def __init__(self, antithetic: bool, detach: bool):
        super().__init__()
        self.antithetic, self.detach = antithetic, detach

    def _pyro_sample(self, msg: Site) -> None:
        check_sampled(msg)
        if self.antithetic and is_drawn(msg):
            msg["value"] = antithetic_pairs(msg["fn"])

    def _pyro_post_sample(self, msg: Site) -> None:
        if self.detach and is_drawn(msg):
            msg["value"] = msg["value"].detach()


def check_reparameterized(guide_trace: poutine.Trace) -> None:
    """Checks that gradients can go through the samples at all sites of a guide.

    Raises:
        ValueError: A site has no reparameterized sampler, or one for a part of its gradient only.
    """
    for name, site in sample_sites(guide_trace).items():
        lack = "has no rsample" if not site["fn"].has_rsample else ""
        if type(innermost(site["fn"])).score_parts is not Distribution.score_parts:  # a rejection sampler
            lack = "has one for a part of its gradient only"
        if lack:
            raise ValueError(
                f"expected a reparameterized sampler at guide site {name!r}, got {site['fn']}, which {lack}: "
                "use the score function (use_rep=False)"
            )

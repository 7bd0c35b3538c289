"""The guides by name, and how a name becomes a guide."""

from typing import Any

from pyrovae.guides.base import Guide
from pyrovae.guides.codes import BernoulliCode
from pyrovae.guides.flows import Coupling, InverseAutoregressive
from pyrovae.guides.gaussians import FullCovariance, LowRank, MeanField
from pyrovae.guides.mixture import Mixture
from pyrovae.guides.points import PointMass
from pyrovae.guides.refined import Refined
from pyrovae.guides.student_t import StudentT
from pyrovae.networks import Encoder
from pyrovae.runtime import parts
from pyrovae.runtime.errors import FieldError

GUIDES: dict[str, type[Guide]] = {
    "mean-field": MeanField,
    "full-covariance": FullCovariance,
    "low-rank": LowRank,
    "student-t": StudentT,
    "mixture": Mixture,
    "iaf": InverseAutoregressive,
    "coupling": Coupling,
    "refined": Refined,
    "bernoulli-code": BernoulliCode,
    "point": PointMass,
}


def guide_class(name: str, *, trust: bool = False) -> type[Guide]:
    """A family by its name in GUIDES, or one of your own by `package.module:Class`.

    The module is one that is installed, or lies in the current directory. See `parts` for when it is imported.

    Args:
        trust: Whether a module may be imported that only a file names.

    Raises:
        TrustError: A file names the module, and nobody has consented to import it.
        ValueError: There is no such family, module or class, or the class is no guide.

    Example:
        >>> guide_class("pyrovae.guides:MeanField") is guide_class("mean-field")
        True
    """
    if name in GUIDES:
        return GUIDES[name]
    if ":" not in name:
        raise FieldError(
            f"expected guide in {', '.join(GUIDES)}, or package.module:Class of your own, got {name!r}",
            field="guide",
        )
    return parts.find("guide", name, Guide, trust=trust)


def make_guide(name: str, encoder: Encoder, latent_dim: int, **settings: Any) -> Guide:
    """The guide that `guide_class` names, made as `Class(encoder, latent_dim, **settings)`.

    Raises:
        ValueError: It refuses its settings, or cannot be made in this way.
    """
    family = guide_class(name)
    if name in GUIDES:
        return family(encoder, latent_dim, **settings)
    try:
        return family(encoder, latent_dim, **settings)
    except Exception as error:  # whatever a foreign class raises
        made = ", ".join(["encoder", "latent_dim", *settings])
        raise FieldError(
            f"expected guide {name!r} to be made as {family.__name__}({made}), got {parts.in_a_line(error)}",
            field="guide",
        ) from error

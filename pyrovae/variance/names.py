"""The names by which estimators are compared: `iwae`, `iwae:score`, `stl:antithetic`."""

from pyrovae.estimators import ESTIMATORS, Estimator
from pyrovae.runtime.errors import FieldError


def parse(text: str) -> tuple[type[Estimator], dict[str, bool]]:
    """An estimator's name with what differs from its defaults: `iwae`, `iwae:score`, `stl:antithetic`.

    Raises:
        ValueError: There is no such estimator or difference.
    """
    name, *changes = text.split(":")
    if name not in ESTIMATORS:
        raise FieldError(f"expected estimators in {', '.join(ESTIMATORS)}, got {name!r}", field="estimators")
    meanings = {"score": {"use_rep": False}, "pathwise": {"use_rep": True}, "antithetic": {"antithetic": True}}
    settings: dict[str, bool] = {}
    for change in changes:
        if change not in meanings:
            raise ValueError(f"expected {name} with {', '.join(meanings)} after a colon, got {change!r}")
        settings |= meanings[change]
    return ESTIMATORS[name], settings


USUAL = (
    "elbo",
    "elbo:score",
    "analytic-kl",
    "stl",
    "antithetic",
    "running-mean",
    "rloo",
    "disarm",
    "iwae",
    "vimco",
    "dreg",
    "stl-iwae",
)  # what is compared unless others are named


def every_estimator() -> list[str]:
    """The names of all estimators of a bound, with both gradients where there are two."""
    labels = []
    for name, family in ESTIMATORS.items():
        if not family.needs_density:
            continue
        labels.append(name)
        labels += [f"{name}:{'pathwise' if use_rep else 'score'}" for use_rep in family.gradients[1:]]
    return labels

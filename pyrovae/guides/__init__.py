"""q(z|x): guides, and a check of your own."""

from pyrovae.guides.checks import check_guide
from pyrovae.guides.guides import (
    GUIDES,
    SCALE_HEADS,
    BernoulliCode,
    Coupling,
    FullCovariance,
    Guide,
    Headed,
    InverseAutoregressive,
    LowRank,
    MeanField,
    Mixture,
    NormalizingFlow,
    PointMass,
    Refined,
    StudentT,
    guide_class,
    make_guide,
)

__all__ = [
    "GUIDES",
    "SCALE_HEADS",
    "BernoulliCode",
    "Coupling",
    "FullCovariance",
    "Guide",
    "Headed",
    "InverseAutoregressive",
    "LowRank",
    "MeanField",
    "Mixture",
    "NormalizingFlow",
    "PointMass",
    "Refined",
    "StudentT",
    "check_guide",
    "guide_class",
    "make_guide",
]

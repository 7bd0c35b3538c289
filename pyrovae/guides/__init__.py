"""Guides q(z|x): the extension point, its families, and a check of guides that users write."""

from pyrovae.guides.base import SCALE_HEADS, Guide, Headed
from pyrovae.guides.checks import check_guide
from pyrovae.guides.codes import BernoulliCode
from pyrovae.guides.flows import Coupling, InverseAutoregressive, NormalizingFlow
from pyrovae.guides.gaussians import FullCovariance, LowRank, MeanField
from pyrovae.guides.mixture import Mixture
from pyrovae.guides.points import PointMass
from pyrovae.guides.refined import Refined
from pyrovae.guides.registry import GUIDES, guide_class, make_guide
from pyrovae.guides.student_t import StudentT

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

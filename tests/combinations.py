"""Which estimators go with which gradient and guide, and what the others are refused with."""

from itertools import product

from pyrovae.estimators import ESTIMATORS, Draws, Estimator
from pyrovae.guides import GUIDES

OF_CODES = "disarm", "enumerate"  # tuples: xdist needs one order of tests
OF_GAUSSIANS = ("measure-valued",)
WITHOUT_KL = "mixture", "iaf", "coupling"  # in closed form
WITHOUT_MIRROR = ("mixture",)
DIAGONAL = "mean-field", "refined"
# The kinds of guide; the others are kinds of continuous density, which a few estimators tell apart.
KINDS = "mean-field", "bernoulli-code", "point"
_FLOW = {"flow_depth": 2, "flow_width": 8}
SMALL = {"iaf": _FLOW, "coupling": _FLOW, "refined": {"refine_steps": 2}}  # settings of quick guides
EVERY = list(product(ESTIMATORS, (True, False), GUIDES))


def refusal(estimator: str, use_rep: bool, guide: str) -> str | None:
    """How the error of this combination begins, as a pattern; None where the combination exists."""
    family, discrete = ESTIMATORS[estimator], GUIDES[guide].discrete
    if use_rep not in family.gradients:
        return f"expected use_rep {not use_rep} for {family.__name__}, .*got {use_rep}"
    if use_rep and discrete:
        return "expected a reparameterized sampler at guide site 'z'.*use_rep=False"
    if family.needs_density and not GUIDES[guide].density:
        return f"expected a guide with a density for {family.__name__}, got a point mass at site 'z'"
    if guide in WITHOUT_MIRROR and family().antithetic:
        return "expected a guide whose noise can be mirrored for antithetic pairs, got "
    if guide in WITHOUT_KL and estimator == "analytic-kl":
        return "expected a closed-form KL.*use the estimator 'elbo'"
    if estimator in OF_CODES and not discrete:
        return f"expected a Bernoulli guide at one site for {family.__name__}, got .*"
    if estimator in OF_GAUSSIANS and guide not in DIAGONAL:
        return "expected a Gaussian guide with diagonal covariance at one site.*got .*"
    return None


EXISTING = [combination for combination in EVERY if refusal(*combination) is None]
FEW = [way for way in EXISTING if way[2] in KINDS or way[:2] in (("elbo", True), ("rloo", False))]


def several(estimator: str, particles: int = 4) -> int:
    """So many particles, or as many as the estimator takes."""
    return min(particles, ESTIMATORS[estimator].particles[1] or particles)


def adapt(estimator: Estimator, draws: Draws) -> None:
    """Has an estimator learn from draws, as training does."""
    estimator.adapt(draws.log_weight.detach(), draws.observations)


def takes(estimator: str, particles: int, antithetic: bool = False) -> bool:
    """Whether there is the estimator for so many particles, in antithetic pairs or not."""
    family = ESTIMATORS[estimator]
    least, largest = family.particles
    pairs = antithetic or family().antithetic
    if pairs and (family.independent or particles % 2):
        return False
    return least <= particles <= (largest or particles)

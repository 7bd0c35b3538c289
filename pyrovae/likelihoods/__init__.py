"""Likelihoods p(x|z), each of which turns a decoder's numbers into a distribution over an image of D pixels."""

from pyrovae.likelihoods.base import Likelihood
from pyrovae.likelihoods.bernoulli import BINARIZATIONS, Bernoulli, SoftBernoulli
from pyrovae.likelihoods.categorical import Categorical
from pyrovae.likelihoods.continuous_bernoulli import ContinuousBernoulli, ContinuousBernoulliDistribution
from pyrovae.likelihoods.gaussian import Gaussian

LIKELIHOODS: dict[str, type[Likelihood]] = {
    "bernoulli": Bernoulli,
    "continuous-bernoulli": ContinuousBernoulli,
    "gaussian": Gaussian,
    "categorical": Categorical,
}

__all__ = [
    "BINARIZATIONS",
    "LIKELIHOODS",
    "Bernoulli",
    "Categorical",
    "ContinuousBernoulli",
    "ContinuousBernoulliDistribution",
    "Gaussian",
    "Likelihood",
    "SoftBernoulli",
]

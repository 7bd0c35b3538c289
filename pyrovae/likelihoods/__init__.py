"""p(x|z): a likelihood makes a distribution of pixels from what a decoder puts out."""

from pyrovae.likelihoods.likelihoods import (
    BINARIZATIONS,
    LIKELIHOODS,
    Bernoulli,
    Categorical,
    ContinuousBernoulli,
    ContinuousBernoulliDistribution,
    Gaussian,
    Likelihood,
    SoftBernoulli,
)

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

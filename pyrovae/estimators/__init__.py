"""Gradient estimators as Pyro ELBOs: usable with any Pyro model and guide over one data plate."""

from pyrovae.estimators.base import Draws, Estimator
from pyrovae.estimators.elbo import AnalyticKL, Elbo

ESTIMATORS: dict[str, type[Estimator]] = {
    "elbo": Elbo,
    "analytic-kl": AnalyticKL,
}

__all__ = ["ESTIMATORS", "AnalyticKL", "Draws", "Elbo", "Estimator"]

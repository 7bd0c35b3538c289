"""Gradient estimators as Pyro ELBOs, usable with any Pyro model and guide."""

from pyrovae.estimators.base import Estimator
from pyrovae.estimators.baselines import LearnedBaseline, Rloo, RunningMean
from pyrovae.estimators.codes import DisArm, Enumerate
from pyrovae.estimators.draws import Draws
from pyrovae.estimators.importance_weighted import Dreg, Iwae, Renyi, Rws, StlIwae, Vimco
from pyrovae.estimators.pathwise import (
    AnalyticKL,
    Antithetic,
    Elbo,
    MeasureValued,
    Reconstruction,
    StickingTheLanding,
)

ESTIMATORS: dict[str, type[Estimator]] = {
    "elbo": Elbo,
    "analytic-kl": AnalyticKL,
    "stl": StickingTheLanding,
    "antithetic": Antithetic,
    "measure-valued": MeasureValued,
    "running-mean": RunningMean,
    "learned-baseline": LearnedBaseline,
    "rloo": Rloo,
    "disarm": DisArm,
    "enumerate": Enumerate,
    "iwae": Iwae,
    "renyi": Renyi,
    "vimco": Vimco,
    "dreg": Dreg,
    "stl-iwae": StlIwae,
    "rws": Rws,
    "reconstruction": Reconstruction,
}

__all__ = [
    "ESTIMATORS",
    "AnalyticKL",
    "Antithetic",
    "DisArm",
    "Draws",
    "Dreg",
    "Elbo",
    "Enumerate",
    "Estimator",
    "Iwae",
    "LearnedBaseline",
    "MeasureValued",
    "Reconstruction",
    "Renyi",
    "Rloo",
    "RunningMean",
    "Rws",
    "StickingTheLanding",
    "StlIwae",
    "Vimco",
]

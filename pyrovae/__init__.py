"""A laboratory for variational autoencoders on Pyro.

The public names, in reading order. Each is imported when it is first used, so that `import pyrovae`
and `pyrovae --help` are instant.
"""

from importlib import import_module
from importlib.util import find_spec

__version__ = "0.1.0"

_NAMES_OF = {
    "runs": ["train", "resume", "load"],
    "config": ["Config"],
    "vae": ["VAE"],
    "likelihoods": [
        "LIKELIHOODS",
        "Likelihood",
        "Bernoulli",
        "ContinuousBernoulli",
        "Gaussian",
        "Categorical",
    ],
    "networks": ["NETWORKS", "Network", "MLP", "CNN", "Encoder", "Decoder"],
    "guides": [
        "GUIDES",
        "Guide",
        "MeanField",
        "FullCovariance",
        "LowRank",
        "StudentT",
        "Mixture",
        "InverseAutoregressive",
        "Coupling",
        "Refined",
        "BernoulliCode",
        "PointMass",
    ],
    "checks": ["check_guide"],
    "estimators": [
        "ESTIMATORS",
        "Estimator",
        "Draws",
        "Elbo",
        "AnalyticKL",
        "StickingTheLanding",
        "Reconstruction",
        "Antithetic",
        "MeasureValued",
        "RunningMean",
        "LearnedBaseline",
        "Rloo",
        "DisArm",
        "Enumerate",
        "Iwae",
        "Renyi",
        "Vimco",
        "Dreg",
        "StlIwae",
        "Rws",
    ],
    "data": ["DATASETS", "Dataset", "Images", "load_dataset"],
    "folders": ["DataWarning"],
    "graphs": ["capture", "Step", "Capture", "CaptureWarning"],
    "training": ["fit", "Fit"],
    "evidence": ["importance_weighted", "naive", "annealed", "bidirectional", "Bidirectional"],
    "weights": ["Evidence"],
    "evaluation": ["evaluate", "Evaluation"],
    "assessment": ["Examination", "Assessment"],
    "variance": ["gradient_moments", "GradientStats"],
    "bias": ["check_bias", "BiasTest"],
    "comparison": ["compare", "Comparison", "Row"],
    "laboratory": ["Measurement"],
    "testbed": ["LinearGaussian"],
}
_MODULE_OF = {name: module for module, names in _NAMES_OF.items() for name in names}
__all__ = list(_MODULE_OF)


def __getattr__(name: str):
    if name in _MODULE_OF:
        return getattr(import_module(f"pyrovae.{_MODULE_OF[name]}"), name)
    if not name.startswith("_") and find_spec(f"pyrovae.{name}"):
        return import_module(f"pyrovae.{name}")
    raise AttributeError(f"module 'pyrovae' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""A laboratory for variational autoencoders on Pyro.

The public names, in reading order. Each is imported when it is first used, so that `import pyrovae`
and `pyrovae --help` are instant.
"""

from importlib import import_module

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
    "guides": ["GUIDES", "Guide", "MeanField"],
    "estimators": ["ESTIMATORS", "Estimator", "Draws", "Elbo", "AnalyticKL"],
    "data": ["DATASETS", "Dataset", "Images", "load_dataset"],
    "training": ["fit", "Fit"],
    "evaluation": ["evaluate", "Evaluation"],
}
_MODULE_OF = {name: module for module, names in _NAMES_OF.items() for name in names}
__all__ = list(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'pyrovae' has no attribute {name!r}")
    return getattr(import_module(f"pyrovae.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

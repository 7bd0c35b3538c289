"""A laboratory for variational autoencoders on Pyro.

The public names, in reading order. Each is imported when it is first used, so that `import pyrovae`
and `pyrovae --help` are instant.
"""

from pyrovae.runtime.lazily import lazily
from pyrovae.runtime.moved import install

__version__ = "0.1.0"

_NAMES_OF = {
    "runs": ["train", "resume", "load", "Config"],
    "vae": ["VAE"],
    "likelihoods": ["LIKELIHOODS", "Likelihood", "Bernoulli", "ContinuousBernoulli", "Gaussian", "Categorical"],
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
        "check_guide",
    ],
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
    "data": ["DATASETS", "Dataset", "Images", "load_dataset", "DataWarning"],
    "programs.graphs": ["capture", "Step", "Capture", "CaptureWarning"],
    "training": ["fit", "Fit"],
    "evaluation": [
        "importance_weighted",
        "naive",
        "annealed",
        "bidirectional",
        "Bidirectional",
        "Evidence",
        "evaluate",
        "Evaluation",
    ],
    "runs.assessment": ["Examination", "Assessment"],
    "variance": [
        "gradient_moments",
        "GradientStats",
        "check_bias",
        "BiasTest",
        "compare",
        "Comparison",
        "Row",
        "LinearGaussian",
    ],
    "runs.laboratory": ["Measurement"],
}

install()
__getattr__, __dir__, __all__ = lazily(__name__, _NAMES_OF)

"""How noisy gradient estimators are, and whether they are biased. Knows no VAE."""

from pyrovae.runtime.lazily import lazily

_NAMES_OF = {
    "moments": ["gradient_moments", "LARGEST_ERROR"],
    "stats": ["GradientStats", "Parts", "BLOCKS"],
    "bias": ["check_bias", "BiasTest"],
    "comparison": ["compare"],
    "names": ["USUAL", "every_estimator", "parse"],
    "results": ["Comparison", "Row"],
    "testbed": ["LinearGaussian"],
}
__getattr__, __dir__, __all__ = lazily(__name__, _NAMES_OF)

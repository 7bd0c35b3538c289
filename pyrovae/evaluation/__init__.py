"""How good a trained model is: its bound over images, log p(x), and what its latents hold."""

from pyrovae.runtime.lazily import lazily

_NAMES_OF = {
    "bounds": [
        "Evaluation",
        "evaluate",
        "bits_per_dim",
        "without_constant",
        "kl_per_image",
        "latent_means",
        "squared_error",
        "pca_squared_error",
        "variance_of_means",
        "Probes",
        "probe",
        "ACTIVE",
        "KL_SAMPLES",
        "NEIGHBOURS",
        "PCA_BATCH",
        "PCA_BYTES",
    ],
    "importance": ["importance_weighted", "naive"],
    "chains": ["annealed", "bidirectional", "Bidirectional"],
    "weights": ["Evidence"],
}
__getattr__, __dir__, __all__ = lazily(__name__, _NAMES_OF)

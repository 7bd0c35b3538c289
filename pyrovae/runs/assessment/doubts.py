"""The warnings that belong to an evaluation's numbers."""

from pyrovae.evaluation.pareto import FEWEST_WEIGHTS, threshold
from pyrovae.runs.assessment.results import Assessment, Weighing
from pyrovae.vae import VAE

FEW = 0.5  # a smaller fraction of active units is called a partial collapse


def warnings_of(vae: VAE, found: Assessment) -> list[str]:
    """Warns of all that makes these numbers less than they seem, a line each."""
    notes, active, settings = [], found.latents.active, found.settings
    if vae.classes:
        notes.append("a conditional VAE: each log p(x) is log p(x|y), given the image's class")
    if not vae.likelihood.normalised:
        notes.append("a pseudo-likelihood, which is not normalised: no number here is one of log p(x)")
    if active == 0:
        notes.append("posterior collapse: no latent dimension is active, so that z says nothing of x")
    elif active is not None and active < FEW * vae.latent_dim:
        notes.append(f"posterior collapse in part: {vae.latent_dim - active} latent dimensions are not active")
    particles, chains = settings["particles"], settings["ais_chains"]
    if 1 < particles < FEWEST_WEIGHTS:
        notes.append(
            f"too few particles to judge importance weights by Pareto k-hat: {particles}, where it takes "
            f"{FEWEST_WEIGHTS}; log p(x) by importance sampling is likely too low"
        )
    notes += _doubts(found.importance_weighted, f"{settings['images']:,} images", particles, "particle")
    if found.annealing:
        notes += _doubts(found.annealing.annealed, f"{settings['ais']:,} annealed images", chains, "chain")
    if found.bounds:
        made = f"{settings['bidirectional']:,} images from the model"
        notes += _doubts(found.bounds.lower, made, chains, "chain")
    return notes


def _doubts(weighing: Weighing, images: str, number: int, what: str) -> list[str]:
    """A line on the images whose estimate is not to be trusted, if there are any."""
    if number == 1:
        return [f"the log p(x) of {images} has no standard error, which a single {what} does not give"]
    if not weighing.unreliable:
        return []
    signs = [f"as few as {weighing.least_effective_sample_size:.1f} effective {what}s of {number:,}"]
    if weighing.pareto_k is not None and weighing.pareto_k > threshold(number):
        signs.append(f"Pareto k-hat up to {weighing.pareto_k:.2f}, where {threshold(number):.2f} is the limit")
    return [
        f"uneven weights: the log p(x) of {weighing.unreliable:,} of {images} is likely too low, and its error "
        f"too small ({'; '.join(signs)}); the others may have missed what these found"
    ]

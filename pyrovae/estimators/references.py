"""The estimators to which others are compared, by their names in ESTIMATORS and their numbers of particles."""

Named = tuple[str, int]  # an estimator's name, perhaps with `:score` or `:pathwise` behind it, and K

REFERENCE_PARTICLES = 16  # of the long run that an estimator of the ELBO is compared with


def plain(name: str, num_particles: int, use_rep: bool) -> Named:
    """An estimator whose default is the pathwise gradient, with that gradient or with the score function's."""
    return (name if use_rep else f"{name}:score"), num_particles


def of_elbo(use_rep: bool) -> tuple[Named, ...]:
    """Estimators of the ELBO's gradient that have no bias and little noise, the best first.

    Args:
        use_rep: Whether the guide has a reparameterized sampler.
    """
    if use_rep:
        return (("elbo", REFERENCE_PARTICLES),)
    return ("enumerate", 1), ("rloo", REFERENCE_PARTICLES)

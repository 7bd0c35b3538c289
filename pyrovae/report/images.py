"""The sections of images: reconstructions, samples, and the latent space."""

from pyrovae.report.elements import Picture, Section
from pyrovae.report.subjects import Subject
from pyrovae.runs import pictures


def reconstructions(s: Subject) -> Section | None:
    """Validation images above their reconstructions; None without a VAE."""
    if s.vae is None:
        return None
    point = "at the most probable code" if s.vae.posterior.discrete else "at the mean of q(z|x)"
    return Section(
        name="reconstructions",
        title="Reconstructions",
        pictures=[
            Picture.of(
                pictures.reconstruct(s.run, data_dir=s.data_dir, device=s.device),
                f"Validation images, and below each its reconstruction: E[x|z] {point}.",
                "Pairs of rows of small images, each image above its reconstruction.",
            )
        ],
    )


def samples(s: Subject) -> Section | None:
    """Decoded draws of the prior; None without a VAE."""
    if s.vae is None:
        return None
    return Section(
        name="samples",
        title="Samples",
        pictures=[
            Picture.of(
                pictures.sample(s.run, device=s.device),
                "The expected images E[x|z] of draws of z from the prior.",
                "A grid of small images that the decoder made, of a conditional VAE a row for each class.",
            )
        ],
    )


def latent(s: Subject) -> Section | None:
    """The codes of validation images, and decoded points of the latent space; None without a VAE."""
    if s.vae is None:
        return None
    where = {"data_dir": s.data_dir, "device": s.device}
    section = {"name": "latent", "title": "Latent space"}
    codes = Picture.of(
        pictures.latent(s.run, **where),
        "Where q(z|x) has its mean for each validation image, in its class's colour if it has one.",
        f"{'A histogram' if s.vae.latent_dim == 1 else 'A cloud of points'}: the images' latent codes.",
    )
    if s.vae.posterior.discrete:
        return Section(
            **section, text="The codes are bits, with nothing between them to decode.", pictures=[codes]
        )
    decoded = Picture.of(
        pictures.manifold(s.run, **where),
        "Decoded points of the plane, evenly spaced in the prior's quantiles."
        if s.vae.latent_dim == 2
        else "In each row one latent dimension moves along the prior's quantiles, the others stay at zero; "
        "the dimensions that vary most with the image come first.",
        "A grid of decoded images that change along the latent dimensions.",
    )
    return Section(**section, pictures=[codes, decoded])

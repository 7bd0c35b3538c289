"""The results of an evaluation, as plain types that a JSON file can hold."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from pyrovae.evaluation import Bidirectional
from pyrovae.evaluation.bounds import Probes
from pyrovae.evaluation.weights import Evidence
from pyrovae.runtime.schemas import Examined, OfRun, check, converted


@dataclass(frozen=True)
class Average:
    """A mean over images, and its standard error over the choice of images: None for a single one."""

    mean: float
    standard_error: float | None

    @classmethod
    def of(cls, values: Float[Tensor, " N"]) -> "Average":
        """Averages one value per image."""
        error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else None
        return cls(values.mean().item(), error)


@dataclass(frozen=True)
class Weighing:
    """An estimate of log p(x), in nats per image; see `Evidence` for what its parts mean.

    Attributes:
        error: The standard error that one image's estimate has from its particles, averaged; None for one
            particle.
        below, above: How far 95 % intervals of one image's log p(x) reach to both sides of the estimate,
            averaged; None where there is no limit.
        effective_sample_size: The effective number of particles or chains, averaged.
        least_effective_sample_size: The effective number for the worst image.
        pareto_k: Pareto k-hat of the worst image; None with fewer than 100 particles, and where it is infinite.
        unreliable: The number of images whose estimate is not to be trusted.
    """

    log_evidence: Average
    error: float | None
    below: float | None
    above: float | None
    effective_sample_size: float
    least_effective_sample_size: float
    pareto_k: float | None
    unreliable: int

    @classmethod
    def of(cls, evidence: Evidence) -> "Weighing":
        """The averages of an estimate."""
        effective, (lower, upper) = evidence.effective_sample_size, evidence.interval
        return cls(
            Average.of(evidence.log_evidence),
            error=_finite(evidence.error.mean()),
            below=_finite((evidence.log_evidence - lower).mean()),
            above=_finite((upper - evidence.log_evidence).mean()),
            effective_sample_size=effective.mean().item(),
            least_effective_sample_size=effective.min().item(),
            pareto_k=_finite(evidence.pareto_k.max()),
            unreliable=int((~evidence.reliable).sum()),
        )


def _finite(value: Float[Tensor, ""]) -> float | None:
    return value.item() if value.isfinite() else None


@dataclass(frozen=True)
class Annealing:
    """Annealed importance sampling of the first images, and the other estimates of the same images."""

    annealed: Weighing
    importance_weighted: Average
    naive: Average
    elbo: Average

    @classmethod
    def of(
        cls, tight: Evidence, weighted: Evidence, unguided: Evidence, elbo: Float[Tensor, " N"]
    ) -> "Annealing":
        """Averages over the images of `tight`, which are the first of the other estimates."""
        others = weighted.log_evidence, unguided.log_evidence, elbo
        return cls(Weighing.of(tight), *(Average.of(each[: len(tight.log_evidence)]) for each in others))


@dataclass(frozen=True)
class Bounds:
    """Bounds of log p(x) from both sides for images that the model made, in nats per image.

    Attributes:
        lower: By annealed importance sampling.
        upper: By chains in reverse, from the z that made the image.
        gap: upper less lower.
    """

    lower: Weighing
    upper: Average
    gap: Average

    @classmethod
    def of(cls, found: Bidirectional) -> "Bounds":
        """The averages over the images."""
        return cls(Weighing.of(found.lower), Average.of(found.upper), Average.of(found.gap))


@dataclass(frozen=True)
class Latents:
    """The use that the VAE makes of its latent dimensions.

    Attributes:
        active: The number of dimensions with a variance above ACTIVE; None for a single image.
        variance_of_means: Var_x(E_q[z]) per dimension.
        kl: The KL per dimension, nats per image; None if it is no sum over dimensions.
        probes: Accuracies of classifiers, or why there are none.
    """

    active: int | None
    variance_of_means: list[float] | None
    kl: list[float] | None
    probes: Probes | str


@dataclass(frozen=True)
class Assessment:
    """All results of an `Examination`; nats are per image.

    Attributes:
        kl: The KL, in closed form if there is one.
        bits_per_dim: An upper bound, from log p(x) by importance sampling; None if pixels are not discrete.
        without_constant: SSE/(2c) + KL for a Gaussian of fixed c, otherwise None.
        annealing: The estimate for the first `ais` images only; None if it was not asked for.
        bounds: The bounds for `bidirectional` images from the model; None if they were not asked for.
        notes: Warnings for the reader.
    """

    settings: dict[str, Any]
    versions: dict[str, str]
    elbo: Average
    reconstruction: Average
    kl: Average
    without_constant: float | None
    importance_weighted: Weighing
    naive: Weighing
    annealing: Annealing | None
    bounds: Bounds | None
    bits_per_dim: float | None
    latents: Latents
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """Plain types, for `from_json`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, contents: dict[str, Any]) -> "Assessment":
        """The inverse of `to_json`.

        Raises:
            ValueError: It is not what `to_json` gives.
        """
        found = converted(contents, cls)
        check(found.settings, Examined)
        if "run" in found.settings:
            check(found.settings, OfRun)
        return found

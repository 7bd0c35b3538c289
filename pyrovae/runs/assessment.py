"""The verdict on a trained run: its test images' evidence, what its latents hold, as JSON and as a table."""

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from pyrovae.data import Dataset, Images
from pyrovae.evaluation.bounds import (
    ACTIVE,
    NEIGHBOURS,
    Probes,
    bits_per_dim,
    kl_per_image,
    latent_means,
    probe,
    variance_of_means,
    without_constant,
)
from pyrovae.evaluation.evidence import (
    Bidirectional,
    Progress,
    annealed,
    bidirectional,
    importance_weighted,
    naive,
)
from pyrovae.evaluation.pareto import FEWEST_WEIGHTS, threshold
from pyrovae.evaluation.weights import Evidence
from pyrovae.runs.directories import VERSIONS, RunError, read_config, same_data
from pyrovae.runs.training import load
from pyrovae.runtime.inputs import check_count
from pyrovae.runtime.random_states import seeded
from pyrovae.runtime.schemas import Best, Examined, OfRun, State, check, converted, refused
from pyrovae.runtime.versions import recorded
from pyrovae.runtime.whole_files import write_atomically
from pyrovae.training.checkpoints import load_checkpoint
from pyrovae.vae import VAE

MADE_WITH = (*VERSIONS, "scikit-learn")
PROBED = 10_000  # training latents that the probes are fitted on, at most
ENCODED = 1000  # images at a time
FEW = 0.5  # a smaller fraction of active units is called a partial collapse


@dataclass(frozen=True)
class Average:
    """A mean over images, and its standard error over the choice of images: None for a single one."""

    mean: float
    standard_error: float | None

    @classmethod
    def of(cls, values: Float[Tensor, " N"]) -> "Average":
        """Of one value per image."""
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
        effective_sample_size: Of the particles or chains, averaged.
        least_effective_sample_size: That of the worst image.
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
        """Of the images that `tight` is of, which are the first of the others."""
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
    """How the latent dimensions are used.

    Attributes:
        active: How many have a variance above ACTIVE; None for a single image.
        variance_of_means: Var_x(E_q[z]) per dimension.
        kl: Per dimension, nats per image; None where it is no sum over dimensions.
        probes: Accuracies of classifiers, or why there are none.
    """

    active: int | None
    variance_of_means: list[float] | None
    kl: list[float] | None
    probes: Probes | str


@dataclass(frozen=True)
class Assessment:
    """All that `Examination` finds; nats are per image.

    Attributes:
        kl: In closed form where there is one.
        bits_per_dim: At most so many, from log p(x) by importance sampling; None where pixels are
            not discrete.
        without_constant: SSE/(2c) + KL for a Gaussian of fixed c, else None.
        annealing: Of the first `ais` images only; None if it was not asked for.
        bounds: Of as many images from the model as `bidirectional` says; None if they were not asked for.
        notes: What the reader is to be warned of.
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


@dataclass(frozen=True, kw_only=True)
class Examination:
    """What to find out about a VAE on its test images, and how well.

    Attributes:
        particles: K, of importance sampling and of the prior estimate.
        ais: So many images get annealed importance sampling as well, with ais_steps and ais_chains.
        bidirectional: So many images are drawn from the model, and their log p(x) is bounded from both sides,
            with ais_steps and ais_chains.
        limit: The first so many test images only.
        batch_size: Decoded images at a time; what keeps memory small if None.
        seed: Of stochastic binarization and all noise.
        quiet: No progress bar.

    Raises:
        ValueError: A number is out of range.

    Example:
        >>> from pyrovae import Config, train
        >>> run, _ = train(Config(epochs=1, limit=(64, 32)), out="runs/examined")
        >>> found = Examination(particles=10, limit=20).of_run(run)
        >>> found.elbo.mean < found.importance_weighted.log_evidence.mean < 0
        True
    """

    particles: int = 1000
    ais: int = 0
    ais_steps: int = 1000
    ais_chains: int = 16
    bidirectional: int = 0
    limit: int | None = None
    batch_size: int | None = None
    seed: int = 0
    quiet: bool = True

    def __post_init__(self):
        for name in ("particles", "ais_steps", "ais_chains", "limit", "batch_size"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        for name in ("ais", "bidirectional"):
            check_count(name, getattr(self, name), least=0)
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"expected seed from 0 to 2**32 - 1, got {self.seed}")

    def of_run(
        self,
        run: str | Path,
        *,
        which: str = "best",
        device: torch.device | str = "cpu",
        data_dir: str | None = None,
        trust: bool = False,
    ) -> Assessment:
        """Of a run's best parameters or its last, on the test set of its data.

        Args:
            data_dir: Where its data now lie; as the run has it if None.
            trust: Whether to import foreign code that the run names.

        Raises:
            RunError: The directory is no run, its data have changed, or it names foreign code and `trust` is
                False.
            CheckpointError: The checkpoint is missing, damaged or of another run.
        """
        config, described = read_config(Path(run))
        vae = load(run, which=which, device=device, trust=trust)
        if data_dir is not None:
            config = dataclasses.replace(config, data_dir=data_dir)
        dataset = config.make_dataset()
        if not same_data(described, dataset, config):
            raise RunError(f"expected the data that {run} was trained on, got others from {config.dataset}")
        names = ("dataset", "likelihood", "network", "guide", "latent_dim", "beta")
        of_config = {name: getattr(config, name) for name in names} | {"model_seed": config.seed}
        of_run = {"run": str(run), "which": which, "epoch": _epoch(Path(run), which)}
        return self.of_vae(vae, dataset, of_run | of_config)

    def of_vae(self, vae: VAE, dataset: Dataset, settings: dict[str, Any] | None = None) -> Assessment:
        """Of this VAE on the dataset's test images; settings go into the record. The VAE stays as it is.

        Raises:
            ValueError: q(z|x) has no density, so that there is no ELBO; or the VAE does not take the images.
        """
        if not vae.posterior.density:
            raise ValueError(
                "expected a VAE to evaluate, got an autoencoder, which gives x no probability: "
                "side-by-side compares its reconstructions with a VAE's"
            )
        images = dataset.test[: self.limit]
        vae.check(images, "test")
        x, pixels = self._observe(vae, images), math.prod(images.shape)
        weighted, unguided, tight, bounds = self._weigh(vae, x)
        kl_per_dim = kl_per_image(vae, x, batch_size=ENCODED, seed=self.seed)
        kl = weighted.log_lik - weighted.bound if kl_per_dim is None else kl_per_dim.sum(-1)
        elbo = weighted.log_lik - kl
        found = Assessment(
            settings=(settings or {}) | self._settings(vae, len(images)),
            versions=recorded(MADE_WITH),
            elbo=Average.of(elbo),
            reconstruction=Average.of(weighted.log_lik),
            kl=Average.of(kl),
            without_constant=_without_constant(vae, elbo.mean().item(), pixels),
            importance_weighted=Weighing.of(weighted),
            naive=Weighing.of(unguided),
            annealing=tight and Annealing.of(tight, weighted, unguided, elbo),
            bounds=bounds and Bounds.of(bounds),
            bits_per_dim=bits_per_dim(vae.likelihood, weighted.log_evidence.mean().item(), pixels),
            latents=self._latents(vae, x, kl_per_dim, images, dataset.train),
            notes=[],
        )
        return dataclasses.replace(found, notes=_warnings(vae, found))

    def _weigh(self, vae: VAE, x: Tensor) -> tuple[Evidence, Evidence, Evidence | None, Bidirectional | None]:
        with self._progress() as progress:
            noise = {"seed": self.seed, "batch_size": self.batch_size, "progress": progress}
            chains = {"steps": self.ais_steps, "chains": self.ais_chains}
            # First, for these alone may be refused.
            tight = annealed(vae, x[: self.ais], **chains, **noise) if self.ais else None
            made = self.bidirectional
            bounds = bidirectional(vae, images=made, **chains, **noise) if made else None
            weighted, unguided = (
                estimate(vae, x, particles=self.particles, **noise) for estimate in (importance_weighted, naive)
            )
        return weighted, unguided, tight, bounds

    @contextlib.contextmanager
    def _progress(self) -> Iterator[Progress]:
        interval = 0.2 if os.isatty(2) else 10
        with tqdm(disable=self.quiet, dynamic_ncols=True, mininterval=interval, delay=0.5) as bar:

            def progress(done: int, total: int, what: str) -> None:
                bar.total = total
                bar.set_description(what, refresh=False)
                bar.update(done - bar.n)

            yield progress

    def _settings(self, vae: VAE, images: int) -> dict[str, Any]:
        own = {name: value for name, value in dataclasses.asdict(self).items() if name != "quiet"}
        device, dtype = str(vae.zeros.device), str(vae.zeros.dtype).removeprefix("torch.")
        return own | {"images": images, "ais": min(self.ais, images), "device": device, "dtype": dtype}

    def _observe(self, vae: VAE, images: Images) -> Tensor:
        with seeded(self.seed, vae.zeros.device):
            labels = None if images.labels is None else images.labels.to(vae.zeros.device)
            return vae.observe(images.pixels.flatten(1).to(vae.zeros), labels)

    def _latents(
        self,
        vae: VAE,
        x: Tensor,
        kl_per_dim: Float[Tensor, "N L"] | None,
        images: Images,
        train: Images,
    ) -> Latents:
        means = latent_means(vae, x, batch_size=ENCODED)
        variances = variance_of_means(means)
        return Latents(
            active=None if variances is None else int((variances > ACTIVE).sum()),
            variance_of_means=None if variances is None else variances.tolist(),
            kl=None if kl_per_dim is None else kl_per_dim.mean(0).tolist(),
            probes=self._probe(vae, train, means, images.labels),
        )

    def _probe(
        self, vae: VAE, train: Images, means: Float[Tensor, "N L"], labels: Int[Tensor, " N"] | None
    ) -> Probes | str:
        if train.labels is None:
            return "no labels"  # and no image need be read
        generator = torch.Generator().manual_seed(self.seed)
        train = train[torch.randperm(len(train), generator=generator)[:PROBED]]
        fitted = latent_means(vae, self._observe(vae, train), batch_size=ENCODED)
        return probe(fitted, train.labels, means, labels)


def _without_constant(vae: VAE, elbo: float, pixels: int) -> float | None:
    """None also where the likelihood has no such constant."""
    return without_constant(vae.likelihood, elbo, pixels) if vae.likelihood.log_constant(pixels) else None


def _epoch(run: Path, which: str) -> int:
    if which == "best":
        return load_checkpoint(run / "best.pt", "cpu", holds=Best)["epoch"]
    return load_checkpoint(run / "checkpoint.pt", "cpu", holds=State)["progress"]["epoch"]


def _warnings(vae: VAE, found: Assessment) -> list[str]:
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


def write(run: Path, found: Assessment) -> Path:
    """`evaluation.json` in the run; gives its path."""
    path = run / "evaluation.json"
    write_atomically(path, json.dumps(found.to_json(), indent=2) + "\n")
    return path


def read(run: Path) -> Assessment | None:
    """The run's `evaluation.json`; None if it has none.

    Raises:
        RunError: It is damaged, or of another version.
    """
    path = run / "evaluation.json"
    if not path.exists():
        return None
    with refused(RunError, f"what evaluate writes in {path}", "; evaluate again"):
        return Assessment.from_json(json.loads(path.read_bytes()))


def table(found: Assessment) -> str:
    """The assessment as text."""
    cells = rows(found)
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = [title(found)]
    for name, *numbers in cells:
        padded = [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *padded]).rstrip())
    return "\n".join([*lines, *remarks(found), *(f"warning: {note}" for note in found.notes)])


def title(found: Assessment) -> str:
    """Which images were judged, by which parameters, and how."""
    s, model = found.settings, ""
    if "run" in s:
        model = (
            f" of {s['dataset']}, {s['likelihood']}, {s['guide']}, {s['latent_dim']} latent dimensions, "
            f"{s['which']} parameters (epoch {s['epoch']})"
        )
    images = _count(s["images"], "test image")
    return f"{images}{model}; K {s['particles']:,}, seed {s['seed']}, {s['device']}, {s['dtype']}"


def rows(found: Assessment) -> list[list[str]]:
    """The table's cells, a head first: name, mean, standard error, effective sample size, its least, k-hat."""

    def row(name: str, average: Average, weighing: Weighing | None = None) -> list[str]:
        error = "" if average.standard_error is None else f"{average.standard_error:.2f}"
        sizes, k = ["", ""], ""
        if weighing is not None:
            numbers = weighing.effective_sample_size, weighing.least_effective_sample_size
            sizes = [f"{number:,.1f}" for number in numbers]
            k = "" if weighing.pareto_k is None else f"{weighing.pareto_k:.2f}"
        return [name, f"{average.mean:.2f}", error, *sizes, k]

    weighted, unguided, tight, bounds = found.importance_weighted, found.naive, found.annealing, found.bounds
    cells = [
        ["nats per image", "mean", "std. error", "ESS", "least", "worst k-hat"],
        row("reconstruction, E_q[log p(x|z)]", found.reconstruction),
        row("KL(q(z|x) || p(z))", found.kl),
        row("ELBO", found.elbo),
        row("log p(x), importance sampling", weighted.log_evidence, weighted),
        row("log p(x), prior samples", unguided.log_evidence, unguided),
    ]
    if tight:
        cells += [
            [f"the first {found.settings['ais']} images:", *[""] * 5],
            row("  ELBO", tight.elbo),
            row("  log p(x), importance sampling", tight.importance_weighted),
            row("  log p(x), prior samples", tight.naive),
            row("  log p(x), annealed", tight.annealed.log_evidence, tight.annealed),
        ]
    if bounds:
        cells += [
            [f"{_count(found.settings['bidirectional'], 'image')} from the model:", *[""] * 5],
            row("  log p(x), annealed", bounds.lower.log_evidence, bounds.lower),
            row("  log p(x), annealed in reverse", bounds.upper),
            row("  gap between the two", bounds.gap),
        ]
    return cells


def remarks(found: Assessment) -> list[str]:
    """What else was found, a line each."""
    latents, s, lines = found.latents, found.settings, []
    if found.without_constant is not None:
        lines.append(f"SSE/(2c) + KL: {found.without_constant:.2f} nats per image")
    if found.bits_per_dim is not None:
        lines.append(f"bits per dimension: at most {found.bits_per_dim:.4f}")
    if latents.active is not None:
        total = len(latents.variance_of_means)
        lines.append(f"active units: {latents.active} of {total}, where Var_x(E_q[z]) > {ACTIVE}")
    if latents.kl is not None:
        lines.append(f"KL per latent dimension, nats: {' '.join(f'{kl:.2f}' for kl in latents.kl)}")
    if isinstance(latents.probes, Probes):
        lines.append(
            f"classes from latents: linear probe {latents.probes.linear:.1%}, {NEIGHBOURS} nearest neighbours "
            f"{latents.probes.neighbours:.1%} (fitted on {latents.probes.train:,} training images)"
        )
    else:
        lines.append(f"classes from latents: not measured, {latents.probes}")
    particles = _count(s["particles"], "particle")
    lines.append(f"importance sampling: {particles}; {_reach(found.importance_weighted)}")
    if found.annealing:
        chains = f"{_count(s['ais_chains'], 'chain')} of {_count(s['ais_steps'], 'step')}"
        lines.append(f"annealed: {chains}; {_reach(found.annealing.annealed)}")
    return lines


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' if number > 1 else ''}"


def _reach(weighing: Weighing) -> str:
    """How exactly an image's log p(x) is known."""
    below, above = (
        "without limit" if reach is None else f"{reach:.2f} nats" for reach in (weighing.below, weighing.above)
    )
    return f"a 95 % interval of one image's log p(x) reaches {below} down and {above} up"

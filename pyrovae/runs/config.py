"""One frozen dataclass that names a run, and the objects it stands for.

Each field is also an option of `pyrovae train`, and a key of a run's `config.json`.
"""

import contextlib
import dataclasses
import functools
import inspect
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch

from pyrovae.data import DATASETS, Dataset, load_dataset
from pyrovae.estimators import ESTIMATORS, Estimator
from pyrovae.guides import GUIDES, SCALE_HEADS, guide_class, make_guide
from pyrovae.likelihoods import BINARIZATIONS, LIKELIHOODS, Likelihood
from pyrovae.networks import ACTIVATIONS, NETWORKS, Network
from pyrovae.runtime.inputs import check_above, check_count
from pyrovae.runtime.parts import Received, TrustError
from pyrovae.runtime.schemas import check, reason
from pyrovae.vae import VAE


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",")) if text else ()


def _directory(text: str) -> str:
    return str(Path(text).expanduser().resolve())


def _limit(text: str) -> tuple[int, int | None]:
    train, _, validation = text.partition("/")
    return int(train), int(validation) if validation else None


def _variance(text: str) -> float | Literal["learned"]:
    return "learned" if text == "learned" else float(text)


def option(
    default: Any,
    help: str,
    *,
    short: str = "",
    choices: Mapping | None = None,
    parse: Callable | None = None,
    **shown: str,
):
    """A field of Config with what the command line needs: its help, short flag, choices, and parser.

    Further keywords, for the help only: `metavar`, and `shown` for a default that depends on others.
    """
    metadata = {"help": help, "short": short, "choices": choices, "parse": parse or type(default), **shown}
    return dataclasses.field(default=default, metadata=metadata)


def flag(name: str) -> str:
    """The option of the command line that sets a field."""
    return "--" + name.replace("_", "-")


def spelled(field: Field, value: Any) -> str:
    """A field's value as it is typed on the command line."""
    if isinstance(value, tuple):
        return ("/" if field.metadata["parse"] is _limit else ",").join(str(n) for n in value if n is not None)
    return str(value)


def _check_type(field: Field, value: Any) -> None:
    try:
        check(value, field.type)
    except ValueError as error:
        said = reason(error)
        if said.startswith("expected "):
            raise ValueError(f"expected {field.name} as {said.removeprefix('expected ')}") from None
        raise ValueError(f"expected another {field.name}, got {reprlib.repr(value)}: {said}") from None


LONG = 10_000  # steps of training that repay the compilation of one
COMPILE = dict.fromkeys(("auto", "on", "off"))

GUIDE_SETTINGS = (
    "scale_head",
    "rank",
    "df",
    "components",
    "flow_depth",
    "flow_width",
    "refine_steps",
    "refine_lr",
    "refine_through",
)


PARTS = ("guide",)  # fields that may name a class of one's own


@functools.cache  # a signature takes long to read, and each Config asks for all of them
def _settings(part: type) -> frozenset[str]:
    """The fields of Config that are settings of this part alone, or of parts like it."""
    if dataclasses.is_dataclass(part):
        return frozenset(field.name for field in fields(part))
    known = {"alpha"} if issubclass(part, Estimator) else set(GUIDE_SETTINGS)
    return frozenset(known & inspect.signature(part).parameters.keys())


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that a training run is made from. None means the default of the part concerned.

    Raises:
        ValueError: A setting is out of range, unknown, or does not belong to the chosen parts.

    Example:
        >>> Config(likelihood="gaussian", c=0.1, latent_dim=5).make_likelihood(levels=17)
        Gaussian(c=0.1)
    """

    dataset: str = option(
        "digits",
        f"Images: {', '.join(DATASETS)}, or a path to an .npz, a .npy or a folder of image files.",
        short="d",
    )
    data_dir: str | None = option(
        None,
        "Where downloaded datasets lie or go.",
        parse=_directory,
        metavar="DIR",
        shown="$PYROVAE_DATA or ~/.cache/pyrovae",
    )
    held_out: int | None = option(
        None,
        "Validation images, taken from the source's training images.",
        parse=int,
        metavar="N",
        shown="a tenth, at most 5,000",
    )
    limit: tuple[int, int | None] | None = option(
        None,
        "Use at most this many training (and validation) images, drawn with the seed.",
        parse=_limit,
        metavar="N[/M]",
        shown="all",
    )
    image_size: int | None = option(
        None,
        "Resize and crop a folder's images to this side.",
        parse=int,
        metavar="PIXELS",
        shown="as they are",
    )
    likelihood: str = option("bernoulli", "p(x|z).", short="l", choices=LIKELIHOODS)
    binarize: str | None = option(
        None,
        "How a Bernoulli observes grey pixels; soft is a pseudo-likelihood.",
        choices=BINARIZATIONS,
        shown="stochastic",
    )
    c: float | Literal["learned"] | None = option(
        None, "A Gaussian pixel's variance, or 'learned'.", parse=_variance, metavar="VARIANCE", shown="0.05"
    )
    levels: int | None = option(
        None,
        "A categorical pixel's grey levels, 2 to 256.",
        parse=int,
        metavar="N",
        shown="17 for digits, 256 elsewhere",
    )
    latent_dim: int = option(2, "Dimensions of z.", short="z")
    network: str = option("mlp", "Encoder and decoder.", choices=NETWORKS)
    hidden: tuple[int, ...] | None = option(
        None,
        "The MLP encoder's hidden widths; the decoder mirrors them.",
        parse=_integers,
        metavar="N,N,...",
        shown="300,100,10",
    )
    channels: tuple[int, ...] | None = option(
        None,
        "The CNN encoder's channels; the decoder mirrors them.",
        parse=_integers,
        metavar="N,N,...",
        shown="32,64,32",
    )
    activation: str | None = option(None, "Of the hidden layers.", choices=ACTIVATIONS, shown="elu")
    conditional: bool = option(False, "Give the class to the encoder and the decoder: p(x|z, y), q(z|x, y).")
    guide: str = option(
        "mean-field", f"q(z|x): {', '.join(GUIDES)}, or package.module:Class of your own.", metavar="GUIDE"
    )
    scale_head: str | None = option(
        None, "How a network output becomes the guide's variance.", choices=SCALE_HEADS, shown="exp"
    )
    rank: int | None = option(
        None, "Columns of the factor of a low-rank guide.", parse=int, metavar="R", shown="2"
    )
    df: float | None = option(
        None, "Degrees of freedom of a student-t guide, above 2.", parse=float, metavar="DF", shown="5.0"
    )
    components: int | None = option(None, "Gaussians in a mixture.", parse=int, metavar="N", shown="5")
    flow_depth: int | None = option(None, "Steps of iaf and coupling.", parse=int, metavar="N", shown="4")
    flow_width: int | None = option(
        None, "Hidden units of the network of each of these steps.", parse=int, metavar="N", shown="64"
    )
    refine_steps: int | None = option(
        None, "Gradient steps of a refined guide, per image.", parse=int, metavar="N", shown="5"
    )
    refine_lr: float | None = option(
        None, "Their size, of natural gradients.", parse=float, metavar="LR", shown="0.5"
    )
    refine_through: bool | None = option(
        None, "Gradients through these steps, or only to where they start.", parse=bool, shown="True"
    )
    estimator: str = option("elbo", "The bound and its gradient.", choices=ESTIMATORS)
    use_rep: bool | None = option(
        None,
        "Pathwise gradients (the reparameterization trick), or the score function.",
        parse=bool,
        shown="as the estimator does",
    )
    particles: int | None = option(
        None,
        "Monte Carlo samples per image, K.",
        short="K",
        parse=int,
        metavar="K",
        shown="the least that the estimator takes",
    )
    antithetic: bool = option(False, "Draw particles in pairs with opposite noise.")
    alpha: float | None = option(
        None, "The order of the renyi bound, 0 to below 1.", parse=float, metavar="ALPHA", shown="0.5"
    )
    beta: float = option(1.0, "Weight of the KL; at 1 the objective is the ELBO.")
    kl_warmup: int = option(0, "Epochs over which that weight rises linearly.", metavar="EPOCHS")
    epochs: int = option(100, "Passes over the training images.", short="e")
    batch_size: int = option(128, "Images per step.", short="b")
    lr: float = option(1e-3, "Adam's learning rate.")
    patience: int | None = option(
        None,
        "Stop after this many epochs without a better validation objective.",
        parse=int,
        metavar="EPOCHS",
        shown="never",
    )
    seed: int = option(0, "Of weights, noise, data order and subsets.", short="s")
    cuda: bool = option(False, "Run on the GPU.")
    compile: str = option(
        "auto",
        f"Compile the training step; auto does from {LONG:,} steps on, which repay it.",
        choices=COMPILE,
    )
    bf16: bool = option(False, "Products of layers in bfloat16.")
    figure_epochs: tuple[int, ...] = option(
        (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000),
        "Epochs, besides the last, whose reconstructions are pictured.",
        parse=_integers,
        metavar="N,N,...",
        shown="1,2,5,10,20,50,100,...",
    )

    def __post_init__(self):
        counts = "latent_dim", "particles", "epochs", "batch_size", "patience", "held_out", "image_size"
        of_guides = "rank", "components", "flow_depth", "flow_width", "refine_steps"
        for name in counts + of_guides:
            value = getattr(self, name)
            if value is not None:
                check_count(name, value)
        if self.limit is not None and min(n for n in self.limit if n is not None) < 1:
            counts = "/".join(str(n) for n in self.limit if n is not None)
            raise ValueError(f"expected limit of at least 1 image, got {counts}")
        for name in ("limit", "hidden", "channels", "figure_epochs"):
            for number in getattr(self, name) or ():
                if number is not None:
                    check_count(name, number)
        check_count("kl_warmup", self.kl_warmup, least=0)
        for name, least in (("beta", 0), ("lr", 0), ("refine_lr", 0), ("df", 2)):
            if getattr(self, name) is not None:
                check_above(name, getattr(self, name), least)
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"expected seed from 0 to 2**32 - 1, got {self.seed}")
        for field in fields(self):
            choices, value = field.metadata["choices"], getattr(self, field.name)
            if choices is not None and value is not None and value not in choices:
                raise ValueError(f"expected {field.name} in {', '.join(choices)}, got {value!r}")
        self._check_belonging("likelihood", LIKELIHOODS)
        self._check_belonging("network", NETWORKS)
        with contextlib.suppress(TrustError):  # what is not to be imported yet, `admit` checks
            self._check_guide()
        self._check_belonging("estimator", ESTIMATORS)
        self.make_likelihood(levels=256)
        self.make_network()
        estimator = self.make_estimator()
        if estimator.importance_weighted or not estimator.needs_density:
            why = "whose weights a scaled KL spoils" if estimator.importance_weighted else "which has no KL"
            for name, plain in (("beta", 1), ("kl_warmup", 0)):
                if getattr(self, name) != plain:
                    raise ValueError(
                        f"expected {name} {plain} with estimator {self.estimator!r}, {why}, "
                        f"got {getattr(self, name)}"
                    )

    def admit(self, *, trust: bool = False) -> None:
        """Imports what it names of one's own, so that a VAE can be made; see `parts`.

        Only settings that were read from a file need this.

        Args:
            trust: Whether to import a module that pyrovae does not have and nobody has imported: its code runs.

        Raises:
            TrustError: There is such a module, and `trust` is False.
            ValueError: It cannot be imported, or the settings do not belong to what it has.
        """
        guide_class(self.guide, trust=trust)
        self._check_guide()

    def make_dataset(self) -> Dataset:
        """The images, on the CPU: in memory, but for those of a large .npy, which stay in the file."""
        return load_dataset(
            self.dataset,
            data_dir=Path(self.data_dir) if self.data_dir else None,
            held_out=self.held_out,
            limit=self.limit,
            image_size=self.image_size,
            seed=self.seed,
        )

    def make_likelihood(self, levels: int) -> Likelihood:
        """p(x|z), for images of this many grey levels."""
        family = LIKELIHOODS[self.likelihood]
        from_data = {"levels": levels} if "levels" in {f.name for f in fields(family)} else {}
        return family(**from_data | self._settings_of(family))

    def make_network(self) -> Network:
        """The family of encoder and decoder."""
        family = NETWORKS[self.network]
        return family(**self._settings_of(family))

    def make_vae(self, shape: tuple[int, int, int], levels: int, classes: int = 0) -> VAE:
        """A VAE for images of this shape (C, H, W), with weights that the seed determines.

        Args:
            levels: Grey levels of the images.
            classes: How many there are, 0 without labels; for a conditional VAE only.

        Raises:
            ValueError: It is to be conditional and there are no classes.
            TrustError: A file names foreign code, and `admit` has not been told to trust it.
        """
        if self.conditional and not classes:
            raise ValueError(
                "expected conditional with labels of 0 and up for every image, got images without such"
            )
        classes = classes if self.conditional else 0
        likelihood, network = self.make_likelihood(levels), self.make_network()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            return VAE(
                likelihood=likelihood,
                decoder=network.decoder(self.latent_dim + classes, shape, likelihood.outputs),
                guide=make_guide(
                    self.guide, network.encoder(shape, classes), self.latent_dim, **self._guide_settings()
                ),
                latent_dim=self.latent_dim,
                classes=classes,
                beta=self.beta,
            )

    def decoder_weights(self, shape: tuple[int, int, int], levels: int, classes: int = 0) -> int:
        """How many numbers the decoder of `make_vae` learns, found without making them.

        Raises:
            ValueError: More than can be counted.
        """
        latent = self.latent_dim + (classes if self.conditional else 0)
        try:
            with torch.device("meta"):  # where tensors have shapes only
                decoder = self.make_network().decoder(latent, shape, self.make_likelihood(levels).outputs)
        except RuntimeError as error:
            raise ValueError(f"expected a model that can be made, got: {error}") from None
        return sum(parameter.numel() for parameter in decoder.parameters())

    def make_vae_for(self, dataset: Dataset) -> VAE:
        """A new VAE for these images, as `make_vae` gives it.

        Raises:
            ValueError: It is to be conditional, and the labels do not number the classes from 0 on.
        """
        if self.conditional:
            dataset.check_classes()
        return self.make_vae(dataset.shape, dataset.levels, dataset.classes)

    def make_estimator(self) -> Estimator:
        """The bound and its gradient."""
        # Only what was given: an estimator has defaults of its own.
        given = {
            "num_particles": self.particles,
            "use_rep": self.use_rep,
            "antithetic": self.antithetic or None,
        }
        settings = {name: value for name, value in given.items() if value is not None}
        try:
            return ESTIMATORS[self.estimator](**settings, **self._settings_of(ESTIMATORS[self.estimator]))
        except ValueError as error:
            raise ValueError(str(error).replace("expected num_particles", "expected particles", 1)) from None

    def device(self) -> torch.device:
        """Where the run happens.

        Raises:
            ValueError: It asks for CUDA and there is none.
        """
        if self.cuda and not torch.cuda.is_available():
            raise ValueError(
                "expected a CUDA device for cuda, got none from PyTorch here: use --no-cuda to run on the CPU"
            )
        return torch.device("cuda" if self.cuda else "cpu")

    def resolved(self, levels: int) -> "Config":
        """Every default of the chosen parts written out, and paths absolute: the same run anywhere, later."""
        parts = self.make_likelihood(levels), self.make_network()
        settings = {f.name: getattr(part, f.name) for part in parts for f in fields(part)}
        estimator = self.make_estimator()
        settings |= {name: getattr(estimator, name) for name in _settings(type(estimator))}
        settings |= {
            "particles": estimator.num_particles,
            "use_rep": estimator.use_rep,
            "antithetic": estimator.antithetic,
        }
        path = Path(self.dataset).expanduser()
        if self.dataset not in DATASETS and path.exists():
            settings["dataset"] = str(path.resolve())
        with contextlib.suppress(TrustError):  # then it was read from a run, where all is written out
            settings |= self._guide_settings()
        return dataclasses.replace(self, **settings)

    def arguments(self, levels: int) -> list[str]:
        """What to type after `train` for this run: the options without which it would be another.

        Args:
            levels: Grey levels of the images, on which a default depends.

        Example:
            >>> Config(likelihood="gaussian", c=0.05, hidden=(300, 20)).arguments(levels=17)
            ['--likelihood', 'gaussian', '--hidden', '300,20']
        """
        run = self.resolved(levels)
        values = {field: getattr(run, field.name) for field in fields(run)}
        given = {field.name: value for field, value in values.items() if value != field.default}
        for name in list(given):
            fewer = {other: value for other, value in given.items() if other != name}
            with contextlib.suppress(ValueError):  # another setting needs this one
                if Config(**fewer).resolved(levels) == run:
                    given = fewer
        words = []
        for field in fields(self):
            value = given.get(field.name)
            if isinstance(value, bool):
                words.append(flag(field.name if value else f"no_{field.name}"))
            elif value is not None:
                words += [flag(field.name), spelled(field, value)]
        return words

    def to_json(self) -> dict[str, Any]:
        """Plain types, for `from_json`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Config":
        """The inverse of `to_json`. What they name of one's own is not imported: see `admit`.

        Raises:
            ValueError: A key or value that Config does not have.
        """
        known = {field.name: field for field in fields(cls)}
        for name, value in values.items():
            if name not in known:
                raise ValueError(f"expected settings of a run, got {name!r}")
            _check_type(known[name], value)
        received = {name: Received(values[name]) for name in PARTS if name in values}
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()} | received)

    def _check_guide(self) -> None:
        self._check_belonging("guide", GUIDES | {self.guide: guide_class(self.guide)})

    def _guide_settings(self) -> dict[str, Any]:
        """The keyword arguments of the guide: this run's, else the family's defaults."""
        family = guide_class(self.guide)
        defaults = {name: inspect.signature(family).parameters[name].default for name in _settings(family)}
        settings = {k: v if getattr(self, k) is None else getattr(self, k) for k, v in defaults.items()}
        return {k: v for k, v in settings.items() if v is not inspect.Parameter.empty}

    def _settings_of(self, part: type) -> dict[str, Any]:
        """The part's settings that are not left to its defaults."""
        settings = {name: getattr(self, name) for name in _settings(part)}
        return {name: value for name, value in settings.items() if value is not None}

    def _check_belonging(self, role: str, registry: Mapping[str, type]) -> None:
        """No setting of a part that was not chosen: it would be ignored without a word."""
        chosen = getattr(self, role)
        for setting in sorted(set().union(*map(_settings, registry.values())) - _settings(registry[chosen])):
            if getattr(self, setting) is not None:
                owners = " or ".join(
                    repr(name) for name, part in registry.items() if setting in _settings(part)
                )
                raise ValueError(f"expected {setting} with {role} {owners} only, got it with {chosen!r}")

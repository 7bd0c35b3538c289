"""One frozen dataclass that names a run, and the objects it stands for.

Each field is also an option of `pyrovae train`, and a key of a run's `config.json`.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch

from pyrovae.data import DATASETS, Dataset, load_dataset
from pyrovae.estimators import ESTIMATORS, Estimator
from pyrovae.guides import GUIDES, SCALE_HEADS
from pyrovae.likelihoods import BINARIZATIONS, LIKELIHOODS, Likelihood
from pyrovae.networks import ACTIVATIONS, NETWORKS, Network
from pyrovae.vae import VAE


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


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


def _settings(part: type) -> set[str]:
    """The fields of Config that are settings of this part alone, or of parts like it."""
    if dataclasses.is_dataclass(part):
        return {field.name for field in fields(part)}
    return {"alpha", "scale_head"} & inspect.signature(part).parameters.keys()


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
    guide: str = option("mean-field", "q(z|x).", choices=GUIDES)
    scale_head: str | None = option(
        None, "How a network output becomes the guide's variance.", choices=SCALE_HEADS, shown="exp"
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
    figure_epochs: tuple[int, ...] = option(
        (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000),
        "Epochs, besides the last, whose reconstructions are pictured.",
        parse=_integers,
        metavar="N,N,...",
        shown="1,2,5,10,20,50,100,...",
    )

    def __post_init__(self):
        for name in ("latent_dim", "particles", "epochs", "batch_size", "patience", "held_out", "image_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"expected {name} >= 1, got {value}")
        if self.limit is not None and min(n for n in self.limit if n is not None) < 1:
            raise ValueError(f"expected limit of at least 1 image, got {self.limit}")
        if self.kl_warmup < 0:
            raise ValueError(f"expected kl_warmup >= 0, got {self.kl_warmup}")
        for name in ("beta", "lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"expected {name} > 0, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"expected seed from 0 to 2**32 - 1, got {self.seed}")
        for field in fields(self):
            choices, value = field.metadata["choices"], getattr(self, field.name)
            if choices is not None and value is not None and value not in choices:
                raise ValueError(f"expected {field.name} in {', '.join(choices)}, got {value!r}")
        self._check_belonging("likelihood", LIKELIHOODS)
        self._check_belonging("network", NETWORKS)
        self._check_belonging("guide", GUIDES)
        self._check_belonging("estimator", ESTIMATORS)
        self.make_likelihood(levels=256)
        self.make_network()
        if self.make_estimator().importance_weighted:
            for name, plain in (("beta", 1), ("kl_warmup", 0)):
                if getattr(self, name) != plain:
                    raise ValueError(
                        f"expected {name} {plain} with estimator {self.estimator!r}, whose weights a scaled KL "
                        f"spoils, got {getattr(self, name)}"
                    )

    def make_dataset(self) -> Dataset:
        """The images, in memory on the CPU."""
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

    def make_vae(self, shape: tuple[int, int, int], levels: int) -> VAE:
        """A VAE for images of this shape (C, H, W), with weights that the seed determines."""
        likelihood, network = self.make_likelihood(levels), self.make_network()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            return VAE(
                likelihood=likelihood,
                decoder=network.decoder(self.latent_dim, shape, likelihood.outputs),
                guide=GUIDES[self.guide](network.encoder(shape), self.latent_dim, **self._guide_settings()),
                latent_dim=self.latent_dim,
                beta=self.beta,
            )

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
        return dataclasses.replace(self, **settings, **self._guide_settings())

    def to_json(self) -> dict[str, Any]:
        """Plain types, for `from_json`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Config":
        """The inverse of `to_json`.

        Raises:
            ValueError: A key or value that Config does not have.
        """
        try:
            return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
        except TypeError as error:
            raise ValueError(f"expected the settings of a run, got: {error}") from None

    def _guide_settings(self) -> dict[str, Any]:
        """The keyword arguments of the guide: this run's, else the family's defaults."""
        parameters = inspect.signature(GUIDES[self.guide]).parameters.values()
        settings = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        return {k: v if getattr(self, k) is None else getattr(self, k) for k, v in settings.items()}

    def _settings_of(self, part: type) -> dict[str, Any]:
        """The part's settings that are not left to its defaults."""
        settings = {name: getattr(self, name) for name in _settings(part)}
        return {name: value for name, value in settings.items() if value is not None}

    def _check_belonging(self, role: str, registry: Mapping[str, type]) -> None:
        """No setting of a part that was not chosen: it would be ignored without a word."""
        own = _settings(registry[getattr(self, role)])
        for name, part in registry.items():
            for setting in _settings(part) - own:
                if getattr(self, setting) is not None:
                    raise ValueError(
                        f"expected {setting} with {role} {name!r} only, got it with {getattr(self, role)!r}"
                    )

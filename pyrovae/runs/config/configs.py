"""The settings of a run together with the objects that they stand for."""

import contextlib
import dataclasses
import inspect
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from pyrovae.data.datasets import Dataset, load_dataset
from pyrovae.data.sources import DATASETS
from pyrovae.estimators import ESTIMATORS, Estimator
from pyrovae.guides.registry import GUIDES, guide_class, make_guide
from pyrovae.likelihoods import LIKELIHOODS
from pyrovae.likelihoods.base import Likelihood
from pyrovae.networks import NETWORKS
from pyrovae.networks.base import Network
from pyrovae.runs.config.checks import (
    check_belonging,
    check_choices,
    check_numbers,
    check_weight_of_kl,
    settings_of,
)
from pyrovae.runs.config.options import check_type, flag, spelled
from pyrovae.runs.config.settings import Settings
from pyrovae.runtime.errors import FieldError
from pyrovae.runtime.parts import Received, TrustError
from pyrovae.vae import VAE

PARTS = ("guide",)  # fields that may name a class of one's own


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """Everything that a training run is made from. None means the default of the part concerned.

    Raises:
        ValueError: A setting is out of range, unknown, or does not belong to the chosen parts.

    Example:
        >>> Config(likelihood="gaussian", c=0.1, latent_dim=5).make_likelihood(levels=17)
        Gaussian(c=0.1)
    """

    def __post_init__(self):
        check_numbers(self)
        check_choices(self)
        check_belonging(self, "likelihood", LIKELIHOODS)
        check_belonging(self, "network", NETWORKS)
        with contextlib.suppress(TrustError):  # what is not to be imported yet, `admit` checks
            self._check_guide()
        check_belonging(self, "estimator", ESTIMATORS)
        self.make_likelihood(levels=256)
        self.make_network()
        check_weight_of_kl(self, self.make_estimator())

    def admit(self, *, trust: bool = False) -> None:
        """Imports a class of one's own that the settings name, so that a VAE can be made; see `parts`.

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
            raise FieldError(
                "expected conditional with labels of 0 and up for every image, got images without such",
                field="conditional",
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
        """Counts the numbers that the decoder of `make_vae` learns, without making them.

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
        except FieldError as error:
            if error.field != "num_particles":
                raise
            raise FieldError(error.about("particles"), field="particles") from None

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
        settings |= {name: getattr(estimator, name) for name in settings_of(type(estimator))}
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
        """The words to type after `train` for this run: the options without which it would be another.

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

    def recorded(self) -> dict[str, Any]:
        """The settings that the results of a run record: its data, its parts, and the seed of its weights."""
        names = ("dataset", "likelihood", "network", "guide", "latent_dim", "beta")
        return {name: getattr(self, name) for name in names} | {"model_seed": self.seed}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Config":
        """The inverse of `to_json`. It does not import a class of one's own: see `admit`.

        Raises:
            ValueError: A key or value that Config does not have.
        """
        known = {field.name: field for field in fields(cls)}
        for name, value in values.items():
            if name not in known:
                raise ValueError(f"expected settings of a run, got {name!r}")
            check_type(known[name], value)
        received = {name: Received(values[name]) for name in PARTS if name in values}
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()} | received)

    def _check_guide(self) -> None:
        check_belonging(self, "guide", GUIDES | {self.guide: guide_class(self.guide)})

    def _guide_settings(self) -> dict[str, Any]:
        """The keyword arguments of the guide: this run's, else the family's defaults."""
        family = guide_class(self.guide)
        defaults = {name: inspect.signature(family).parameters[name].default for name in settings_of(family)}
        settings = {k: v if getattr(self, k) is None else getattr(self, k) for k, v in defaults.items()}
        return {k: v for k, v in settings.items() if v is not inspect.Parameter.empty}

    def _settings_of(self, part: type) -> dict[str, Any]:
        """The part's settings that are not left to its defaults."""
        settings = {name: getattr(self, name) for name in settings_of(part)}
        return {name: value for name, value in settings.items() if value is not None}

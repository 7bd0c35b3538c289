"""A run directory apart from the states of training: its settings, and whether it is new."""

import contextlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

from pyrovae.data import Dataset
from pyrovae.runs.config import Config
from pyrovae.runtime.damage import RAISED_BY_DAMAGE
from pyrovae.runtime.errors import FieldError
from pyrovae.runtime.parts import TrustError
from pyrovae.runtime.schemas import Data, Settings, check, refused
from pyrovae.runtime.versions import recorded
from pyrovae.runtime.whole_files import WriteError, is_new

LEFT = ("config.json", "figures")  # what a run has before its first checkpoint
VERSIONS = ("pyrovae", "torch", "pyro-ppl", "numpy")


class RunError(FieldError):
    """A run directory is not what it should be."""


class UntrustedRunError(RunError, TrustError):
    """A run names foreign code, which nobody has consented to import."""


def read_settings(run: Path) -> Settings:
    """All that a run's config.json says; the keys of `config` are not yet checked.

    Raises:
        RunError: The directory is no run, or its config.json is damaged.
    """
    path = run / "config.json"
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise RunError(f"expected a run directory with config.json at {run}, got none") from None
    except OSError as error:
        raise RunError(f"expected a run directory whose config.json can be read, got: {error}") from None
    with _settings_in(path):
        contents = json.loads(text)
        check(contents, Settings)
        return contents


def read_config(run: Path) -> tuple[Config, Data]:
    """A run's settings, and a description of its data.

    Raises:
        RunError: The directory is no run, or its config.json is damaged.
    """
    contents = read_settings(run)
    with _settings_in(run / "config.json"):
        return Config.from_json(contents["config"]), contents["data"]


def _settings_in(path: Path) -> contextlib.AbstractContextManager[None]:
    return refused(RunError, f"the settings of a run in {path}")


def admit(run: Path, config: Config, *, trust: bool) -> None:
    """Imports what a run's settings name of one's own, as `Config.admit` does.

    Raises:
        UntrustedRunError: They name foreign code that is not trusted.
        RunError: They name foreign code that is not there.
    """
    expected = f"the settings of a run in {run / 'config.json'}"
    try:
        config.admit(trust=trust)
    except TrustError as error:
        raise UntrustedRunError(expected, error.found) from None
    except ValueError as error:
        raise RunError(f"expected {expected}, got: {error}") from None


def record(config: Config, dataset: Dataset) -> str:
    """The text of a run's config.json."""
    contents = {"config": config.to_json(), "data": describe(dataset), "versions": recorded(VERSIONS)}
    return json.dumps(contents, indent=2) + "\n"


def describe(dataset: Dataset) -> Data:
    """The description of its data that a run records, by which they are recognised."""
    return {
        "shape": list(dataset.shape),
        "levels": dataset.levels,
        "classes": dataset.classes,
        "train": len(dataset.train),
        "validation": len(dataset.validation),
        "test": len(dataset.test),
        "checksum": dataset.checksum,
        "labels": dataset.label_checksum,
    }


def same_data(described: Data, dataset: Dataset, config: Config) -> bool:
    """Whether these are the data that a run describes; labels count where the model sees them."""
    now = describe(dataset)
    if not config.conditional:
        now = {name: value for name, value in now.items() if name not in ("classes", "labels")}
    return all(described.get(name) == value for name, value in now.items())


def new_directory(stem: Path, out: str | Path | None, left: Sequence[str] = ()) -> Path:
    """Makes `out`, or else `<stem>-<n>` for the least n that is free.

    Args:
        left: Names of what a process leaves in it that is killed early, which is as good as nothing.

    Raises:
        RunError: `out` has other files, or cannot be made.
        WriteError: The storage is full or fails.
    """
    try:
        if out is not None:
            directory = Path(out)
            directory.mkdir(parents=True, exist_ok=True)
            check_new(directory, left)
            return directory
        for number in itertools.count(1):
            directory = stem.with_name(f"{stem.name}-{number}")
            with contextlib.suppress(FileExistsError):
                directory.mkdir(parents=True)
                return directory
    except OSError as error:
        refused = WriteError.of(error, stem if out is None else Path(out))
        if not refused.of_place:
            raise refused from None
        raise RunError(f"expected out where a run can be written, got: {error}", field="out") from None


def check_new(directory: Path, left: Sequence[str]) -> None:
    """Checks that a directory has nothing but what a process leaves that is killed early.

    Raises:
        RunError: It has other files, or a config.json that is not one of a run.
    """
    if not is_new(directory, left) or not _ours(directory / "config.json"):
        raise RunError(f"expected a new or empty directory for out, got {directory}, which has files")


def _ours(path: Path) -> bool:
    """Whether a config.json is one of a run, or none."""
    try:
        contents = json.loads(path.read_bytes())
        return isinstance(contents, dict) and contents.keys() >= {"config", "data"}
    except FileNotFoundError:
        return True
    except RAISED_BY_DAMAGE:
        return False

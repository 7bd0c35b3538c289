"""What the files that are read back hold, and the one check that each of them passes before it is used.

A file is parsed into plain values and tensors, and these are compared with a type: one of those here, or the
dataclass that the file is of. Whatever is wrong becomes one line, which names the file and the place in it.
"""

import contextlib
import json
import re
from collections.abc import Iterator
from pickle import UnpicklingError
from typing import Annotated, Any, Literal, TypedDict, TypeVar

import msgspec
from msgspec import Meta
from torch import Tensor

from pyrovae.runtime.damage import RAISED_BY_DAMAGE
from pyrovae.runtime.inputs import MOST

Count = Annotated[int, Meta(ge=0, le=MOST)]
Positive = Annotated[int, Meta(ge=1, le=MOST)]
Nats = Annotated[float, Meta(ge=-1e200, le=1e200)]  # finite, and with room for the arithmetic of axes
_Word = Annotated[int, Meta(ge=0, lt=2**32)]
_Place = Annotated[int, Meta(ge=0, le=624)]  # in the numbers of the generator, which numpy does not check
T = TypeVar("T")


class _Data(TypedDict):
    """The images of a run, as its config.json describes them."""

    shape: Annotated[list[Positive], Meta(min_length=3, max_length=3)]
    levels: Positive
    train: Count
    validation: Count
    test: Count
    checksum: int


class Data(_Data, total=False):
    """The same with the number of classes and the checksum of labels, which earlier versions leave out."""

    classes: Count
    labels: int | None


class _Settings(TypedDict):
    config: dict[str, Any]  # which `Config` checks
    data: Data


class Settings(_Settings, total=False):
    """A run's config.json."""

    versions: dict[str, str]


class _Row(TypedDict):
    epoch: Positive
    elbo: Nats | None
    reconstruction: Nats
    kl: Nats | None
    loss_without_constant: Nats | None
    beta: Nats
    validation_elbo: Nats | None
    validation_reconstruction: Nats
    validation_kl: Nats | None
    seconds: float


class Row(_Row, total=False):
    """A line of metrics.jsonl, in nats per image; those of the earliest version lack the bounds."""

    bound: Nats
    validation_bound: Nats


class Recipe(TypedDict, total=False):
    """A recipe; `Config` checks the settings."""

    description: str
    train: dict[str, Any]
    over: dict[str, Annotated[list[Any], Meta(min_length=1)]]
    variants: Annotated[list[dict[str, Any]], Meta(min_length=1)]


class Sweep(TypedDict):
    """A sweep's sweep.json."""

    shared: dict[str, Any]
    cells: list[dict[str, Any]]


class OfModel(TypedDict):
    """What a result says of the model."""

    dataset: str
    likelihood: str
    guide: str
    latent_dim: Positive


class OfRun(OfModel):
    """What a result says of the run."""

    run: str
    which: str
    epoch: Count


class Examined(TypedDict):
    """The settings in an evaluation.json."""

    images: Count
    particles: Positive
    ais: Count
    ais_steps: Positive
    ais_chains: Positive
    bidirectional: Count
    seed: int
    device: str
    dtype: str


class Compared(TypedDict):
    """A variance.json, whose rows lack what is not finite."""

    rows: list[dict[str, Any]]
    between_batches: dict[str, Any]


class BetweenBatches(TypedDict):
    """The variances in a variance.json over several batches."""

    estimator: str
    batches: Positive
    within: float
    between: float


class Measured(TypedDict):
    """The settings in a variance.json."""

    batch_size: Positive
    draws: Positive
    seed: int
    device: str
    dtype: str
    batch_norm: bool


class Saved(TypedDict):
    """Any checkpoint."""

    format: str


class Best(Saved):
    """A run's best.pt."""

    epoch: Positive
    model: dict[str, Any]


class Position(TypedDict):
    """Where training stands; see `training.Progress`."""

    epoch: Count
    batch: Count
    best: float | None
    best_epoch: Count
    stale: Count
    finished: Literal["", "epochs", "patience"]


class _Moments(TypedDict):
    step: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


class Adam(TypedDict):
    """The state of the optimizer, by the number of the parameter."""

    state: dict[int, _Moments]


class _Random(TypedDict):
    torch: Tensor
    python: tuple[int, list[int], float | None]
    numpy: tuple[str, list[_Word], _Place, int, float]


class Random(_Random, total=False):
    """The random states of a process."""

    cuda: Tensor


class Process(TypedDict):
    """What each process of a run has for itself."""

    sums: Tensor
    random: Random


class _State(Process, Saved):
    model: dict[str, Any]
    optimizer: Adam
    progress: Position


class State(_State, total=False):
    """A run's checkpoint.pt, with what earlier versions leave out."""

    estimator: dict[str, Any]  # which the estimator checks
    others: list[Process]


def converted(value: Any, kind: type[T]) -> T:
    """A value of plain types as one of this type, with all that is in it.

    Raises:
        ValueError: It is none, or has keys that the type does not know.
    """
    found = msgspec.convert(value, kind)
    _check_known(value, msgspec.to_builtins(found), "")
    return found


def check(value: Any, kind: Any) -> None:
    """Checks that a value is one of this type; it may have further keys.

    Raises:
        ValueError: It is none.
    """
    msgspec.convert(value, kind)


def _check_known(given: Any, kept: Any, place: str) -> None:
    if isinstance(given, dict):
        for name, value in given.items():
            if name not in kept:
                raise ValueError(f"{name!r}{f' in {place}' if place else ''}, which is not known")
            _check_known(value, kept[name], f"{place}.{name}".removeprefix("."))
    elif isinstance(given, list | tuple):
        for number, (one, other) in enumerate(zip(given, kept, strict=True)):
            _check_known(one, other, f"{place}[{number}]")


@contextlib.contextmanager
def refused(kind: type[ValueError], expected: str, remedy: str = "") -> Iterator[None]:
    """Turns whatever a damaged or foreign file makes its reader raise into one line.

    Args:
        kind: The error to raise in its place.
        expected: What was expected, and in which file.
        remedy: What to do about it.
    """
    try:
        yield
    except RAISED_BY_DAMAGE as error:
        explained = kind is not ValueError and isinstance(error, kind)
        if explained or "out of memory" in str(error):
            raise
        raise kind(f"expected {expected}, got: {reason(error)}{remedy}") from None


def reason(error: Exception) -> str:
    """What an error says, in one line that makes sense by itself.

    Example:
        >>> try:
        ...     check({"shared": {}, "cells": [3]}, Sweep)
        ... except ValueError as error:
        ...     print(reason(error))
        expected object, got int at cells[0]
    """
    if isinstance(error, UnpicklingError):
        return "contents that only an unsafe load would read"
    if isinstance(error, msgspec.ValidationError):
        text = re.sub(r" - at `(key` in `)?\$\.?(.*)`$", r" at \2", str(error)).removesuffix(" at ")
        return text[:1].lower() + text[1:].replace("`", "").replace(" | ", " or ")
    if isinstance(error, json.JSONDecodeError):
        return f"no JSON: {error}"
    lines = [line.strip() for line in str(error).strip().splitlines()] or [""]
    headed = lines[0].endswith(":") and lines[1:]  # as torch's list of wrong weights is
    text = lines[1] if headed else lines[0]
    return (
        text if text and isinstance(error, ValueError | OSError) else f"{type(error).__name__} {text}".strip()
    )

"""Shapes in signatures are checked while the tests run; each test gets its own random and Pyro state."""

import functools
import os
import typing
from pathlib import Path

import hypothesis
import jaxtyping
import pytest

# Fixtures import torch and pyrovae. This file does not: that takes seconds, also in the process that starts the
# others, which has no use for them.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True)
hypothesis.settings.load_profile("tests")
_jaxtyped = jaxtyping.jaxtyped

UNCHECKED = (
    "pyrovae.programs.references"  # where no signature has shapes, and a walk takes twenty thousand calls
)


def _has_shape(annotation) -> bool:
    """Whether a shape is in an annotation, or may be in one that is a text."""
    if isinstance(annotation, str):
        return True
    if isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray):
        return True
    return any(map(_has_shape, typing.get_args(annotation)))


def _jaxtyped_where_needed(*, typechecker):
    """Checks the types of all functions of modules and classes, by jaxtyping only where a shape is among them.

    To remember the shapes of a call, so that they can be compared, takes many times as long as to check types
    alone. A function within a function is made anew at each call, and to decorate it each time took a fifth of
    the time of all tests. None has shapes in its signature, which a test of the architecture checks.
    """

    def decorate(made):
        if "<locals>" in made.__qualname__ or made.__module__.startswith(UNCHECKED):
            return made
        if isinstance(made, type) or any(map(_has_shape, made.__annotations__.values())):
            return _jaxtyped(made, typechecker=typechecker)
        checked = typechecker(made)

        @functools.wraps(made)
        def call(*args, **kwargs):
            return (made if jaxtyping.config.jaxtyping_disable else checked)(*args, **kwargs)

        return call

    return decorate


# Before anything of pyrovae is imported: jaxtyping's annotations are checked by beartype from here on.
jaxtyping.jaxtyped = _jaxtyped_where_needed
jaxtyping.install_import_hook("pyrovae", "beartype.beartype")

# The files whose tests take longest, those that take most first. The processes of `--dist loadfile` begin with
# these, so that none is left with a long file in the end.
LONGEST = [
    "two_processes",
    "graphs",
    "training",
    "per_draw",
    "estimators",
    "docs",
    "cli",
    "notebooks",
    "comparison",
]
LONGEST += ["benchmarks", "pyro_traps", "bias", "evaluation", "pictures", "report", "evidence", "files"]


def pytest_collection_modifyitems(items):
    """Sorts the tests by file, the longest files first."""
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(scope="session", autouse=True)
def _alike():
    """One thread, unless another number is asked for, and no windows."""
    import matplotlib
    import torch

    matplotlib.use("Agg")
    torch.set_num_threads(int(os.environ.get("PYROVAE_THREADS", "1")))


@pytest.fixture(autouse=True)
def _isolated():
    """No test sees another's random state or Pyro parameters."""
    import pyro

    pyro.set_rng_seed(0)
    with pyro.get_param_store().scope():
        yield


@pytest.fixture
def no_figures(monkeypatch):
    """A finished run is not pictured, which takes longer than a short run: the last of its figures is empty."""

    from pyrovae import runs

    def picture(directory: Path, *args) -> None:
        (directory / "figures" / f"{runs.LAST_FIGURE}.png").touch()

    monkeypatch.setattr("pyrovae.runs.training.draw_figures", picture)


@pytest.fixture
def unchecked():
    """Shapes are not checked, which takes a third of the time of long runs; other tests check them."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture
def make_vae():
    """make_vae(shape, levels, classes, **settings of Config) -> VAE."""
    from pyrovae.runs.config import Config

    def make(shape: tuple[int, int, int] = (1, 8, 8), levels: int = 17, classes: int = 0, **settings):
        return Config(**settings).make_vae(shape, levels, classes)

    return make


@pytest.fixture(scope="session")
def mnist_dir() -> Path:
    """Where MNIST lies in torchvision's layout; the test skips where it does not."""
    directory = os.environ.get("PYROVAE_DATA")
    if not directory or not (Path(directory) / "MNIST" / "raw" / "train-images-idx3-ubyte").exists():
        pytest.skip("needs MNIST: set PYROVAE_DATA to a folder that holds it in torchvision's layout")
    return Path(directory)

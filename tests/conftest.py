"""Shapes in signatures are checked while the tests run; each test gets its own random and Pyro state."""

import os
from pathlib import Path

import hypothesis
import jaxtyping
import pytest

# Fixtures import torch and pyrovae. This file does not: that takes seconds, also in the process that starts the
# others, which has no use for them.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True)
hypothesis.settings.load_profile("tests")
_jaxtyped = jaxtyping.jaxtyped


def _jaxtyped_once(*, typechecker):
    """Checks functions of modules and classes only.

    A function within a function is made anew at each call, and to decorate it each time took a fifth of the
    time of all tests. No such function has shapes in its signature, which a test of the architecture checks.
    """

    def decorate(made):
        return made if "<locals>" in made.__qualname__ else _jaxtyped(made, typechecker=typechecker)

    return decorate


# Before anything of pyrovae is imported: jaxtyping's annotations are checked by beartype from here on.
jaxtyping.jaxtyped = _jaxtyped_once
jaxtyping.install_import_hook("pyrovae", "beartype.beartype")

# Fixtures that take seconds, so that only one process should make them for all tests of a file.
SHARED = {"made", "finished", "place", "usual", "discrete", "along", "of_testbed", "repository"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Tests of a file that share what takes long run in one process, by `--dist loadgroup` of pytest-xdist."""
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            if not SHARED.isdisjoint(item.fixturenames):
                item.add_marker(pytest.mark.xdist_group(item.path.stem))


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

    monkeypatch.setattr(runs, "_picture", picture)


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
    from pyrovae.config import Config

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

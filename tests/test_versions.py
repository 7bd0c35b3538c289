"""Versions are recorded with and without installed distributions, and a failed record leaves nothing behind."""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import pyrovae
from pyrovae import runs
from pyrovae.runs import directories as run_directories
from pyrovae.runs.config import Config
from pyrovae.runtime import versions
from pyrovae.runtime.versions import recorded, version_of

CHECKOUT = Path(pyrovae.__file__).parents[1]

WITHOUT_DISTRIBUTIONS = """
import sys
from importlib import metadata
hidden, find = {"pyrovae", "torch", "pyro-ppl", "numpy", "scikit-learn"}, metadata.Distribution.discover
def discover(**about):
    return iter(()) if about.get("name") in hidden else find(**about)
metadata.Distribution.discover = discover
sys.path.insert(0, sys.argv[1])
from pyrovae import runs
from pyrovae.cli.group import main
runs.training.draw_figures = lambda *args: None
tiny = ["--epochs", "1", "--limit", "64/32", "--hidden", "4", "--figure-epochs", "", "--quiet"]
for words in (["--version"], ["train", *tiny], ["evaluate", "runs/digits-bernoulli-1", "-K", "2", "--quiet"]):
    main(words, standalone_mode=False)
"""


@pytest.mark.slow
def test_commands_work_without_an_installed_distribution(tmp_path):
    command = [sys.executable, "-c", WITHOUT_DISTRIBUTIONS, CHECKOUT]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    first, *paths = done.stdout.splitlines()
    assert first.endswith(f"version {pyrovae.__version__}")
    assert paths == ["runs/digits-bernoulli-1", "runs/digits-bernoulli-1/evaluation.json"]
    for name in ("config.json", "evaluation.json"):
        written = json.loads((tmp_path / "runs/digits-bernoulli-1" / name).read_text())["versions"]
        assert written["pyrovae"] == pyrovae.__version__
        assert written["torch"].split("+")[0] == metadata.version("torch").split("+")[0]
        assert written["pyro-ppl"] == metadata.version("pyro-ppl")


def test_the_version_is_that_of_the_code_and_not_of_another_copy(monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: "0.0.7")
    assert version_of("pyrovae") == pyrovae.__version__
    assert recorded(["numpy"])["numpy"] == "0.0.7"


@pytest.mark.parametrize("name", ["torch", "pyro-ppl", "numpy", "scikit-learn"])
def test_a_package_without_metadata_has_its_modules_version(monkeypatch, name):
    installed = metadata.version(name)

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert version_of(name).split("+")[0] == installed.split("+")[0]
    assert version_of("no-such-package") == "unknown"


def test_no_directory_is_made_where_the_record_fails(tmp_path, monkeypatch):
    def fail(names):
        raise RuntimeError("no versions today")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_directories, "recorded", fail)
    with pytest.raises(RuntimeError, match="no versions today"):
        runs.train(Config(epochs=1, limit=(64, 32), hidden=(4,)))
    assert not any(tmp_path.iterdir())
    assert versions.UNKNOWN not in recorded(run_directories.VERSIONS).values()

"""What earlier versions wrote and named goes on working.

`fixtures/earlier-run` was stopped by a signal in its second epoch, before the package was laid out in folders;
`fixtures/earlier-run-whole.jsonl` has the metrics that the same version came to without the signal.
"""

import importlib
import json
import shutil
from pathlib import Path

import pytest

import pyrovae
from pyrovae import evaluate, load, runs
from pyrovae.runtime.moved import MOVED

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture
def run(tmp_path) -> Path:
    return Path(shutil.copytree(FIXTURES / "earlier-run", tmp_path / "run"))


@pytest.mark.usefixtures("no_figures")
def test_a_run_of_an_earlier_version_goes_on_to_the_same_metrics(run):
    """Other machines round differently: by 1e-6 after these twenty steps, as far as it was seen."""
    _, result = runs.resume(run)
    assert result.progress.finished == "epochs"
    expected = [json.loads(line) for line in (FIXTURES / "earlier-run-whole.jsonl").read_text().splitlines()]
    assert len(result.history) == len(expected)
    for ours, theirs in zip(result.history, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"seconds"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name


def test_a_run_of_an_earlier_version_loads_and_is_evaluated_as_before(run):
    vae, dataset = load(run), runs.read_config(run)[0].make_dataset()
    (first,) = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = evaluate(vae, dataset.validation, batch_size=16, seed=0)
    assert found.elbo == pytest.approx(first["validation_elbo"], rel=1e-5)


def test_a_module_of_a_package_is_found_under_its_former_name():
    assert importlib.import_module("pyrovae.graphs.steps").Step is pyrovae.Step


@pytest.mark.parametrize("name", MOVED)
def test_a_module_is_found_under_its_former_name(name):
    former = importlib.import_module(f"pyrovae.{name}")
    parts = [importlib.import_module(f"pyrovae.{present}") for present in MOVED[name].split()]
    if len(parts) == 1:
        assert former is parts[0]
        assert former.__spec__.name == former.__name__ == f"pyrovae.{MOVED[name]}"
    for part in parts:
        for public in (public for public in vars(part) if not public.startswith("_")):
            assert hasattr(former, public)
    if "." not in name:
        assert getattr(pyrovae, name) is former

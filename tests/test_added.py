"""An estimator, a guide, a likelihood and a network of one's own, each from one place: commands know them."""

import os
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner

from pyrovae.cli.group import main
from pyrovae.estimators import ESTIMATORS, Draws, Elbo, Estimator, Iwae
from pyrovae.evaluation import importance_weighted
from pyrovae.guides import check_guide
from pyrovae.runs import Measurement, load, train
from pyrovae.runs.config import Config
from pyrovae.variance import LinearGaussian, bench, bias, compare
from tests.added import ADDED, Halfway

ADDED_CONFIG = {
    "likelihood": "added",
    "network": "added",
    "guide": "added",
    "estimator": "added",
    "limit": (64, 32),
    "epochs": 2,
    "batch_size": 32,
    "figure_epochs": (),
}
CONTRACTS = ("likelihoods", "networks", "guides", "architecture", "testbed", "estimators")


@pytest.fixture(autouse=True)
def _added(monkeypatch):
    for registry, family in ADDED:
        monkeypatch.setitem(registry, "added", family)
    monkeypatch.setattr(bias, "FLIPS", 1000)
    monkeypatch.setattr(bench, "TIMINGS", 1)
    bias._signs.cache_clear()
    yield
    bias._signs.cache_clear()


def compared(*names: str, particles: tuple[int, ...] = (2,)):
    """By name, the rows of a comparison on the test-bed."""
    case = LinearGaussian(x=1.0, w=0.8, b=0.2, t2=0.7, mu=0.3, s=0.9)
    pair, x = case.pair(), torch.ones(1, 1, dtype=torch.float64)
    found = compare(
        pair.model, pair.guide, x, names, particles=particles, draws=256, parts=pair.parts(), exact=case
    )
    return {row.estimator: row for row in found.rows}


def test_added_parts_are_listed_trained_evaluated_and_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("pyrovae.runs.training.draw_figures", lambda *args: None)
    listed = CliRunner().invoke(main, ["list"])
    assert listed.exit_code == 0
    for _, family in ADDED:
        assert family.__doc__.splitlines()[0] in listed.output
    run, result = train(Config(**ADDED_CONFIG), out=tmp_path / "run")
    assert result.history[-1]["elbo"] > result.history[0]["elbo"]
    vae, dataset = load(run), Config(**ADDED_CONFIG).make_dataset()
    x = vae.observe(dataset.test.pixels[:4].flatten(1))
    assert importance_weighted(vae, x, particles=4).log_evidence.isfinite().all()
    assert check_guide(vae.posterior, dataset.test.pixels[:4].flatten(1), draws=2000) == []
    measured = Measurement(estimators=("added", "elbo"), particles=(2,), draws=32, batch_size=4)
    ours, _ = measured.of_run(run).rows
    assert (ours.estimator, ours.reference, ours.verdict) == ("added", "elbo", "unbiased")


def test_the_test_bed_knows_an_added_estimator_by_its_twin():
    row = compared("added")["added"]
    assert (row.reference, row.verdict) == ("elbo", "unbiased")
    assert row.tr_cov == pytest.approx(row.truth["tr_cov"], rel=0.5)


def test_a_subclass_inherits_references_and_no_twin(monkeypatch):
    class Pathwise(Halfway):
        """Half of the gradient, which is wrong."""

        def surrogate(self, draws: Draws):
            return 0.5 * super().surrogate(draws)

    class Weighted(Iwae):
        """The importance-weighted bound as it is."""

    monkeypatch.setitem(ESTIMATORS, "pathwise", Pathwise)
    monkeypatch.setitem(ESTIMATORS, "weighted", Weighted)
    assert Pathwise.twin is None
    assert Weighted.twin is None
    rows = compared("pathwise", "weighted")
    assert (rows["pathwise"].reference, rows["pathwise"].verdict) == ("elbo", "biased")
    assert (rows["weighted"].reference, rows["weighted"].verdict) == ("iwae", "unbiased")
    assert rows["pathwise"].truth == rows["weighted"].truth == {}


def test_an_estimator_that_names_no_reference_is_measured_and_not_tested(monkeypatch):
    class Bare(Estimator):
        """The ELBO, which says nothing of others."""

        bound = Elbo.bound
        surrogate = Elbo.surrogate

    monkeypatch.setitem(ESTIMATORS, "bare", Bare)
    row = compared("bare")["bare"]
    assert (row.verdict, row.bias, row.reference) == ("not tested: it names no reference", None, "")
    assert row.tr_cov > 0


@pytest.mark.slow
@pytest.mark.parametrize("contract", CONTRACTS)
def test_the_contracts_hold_for_added_parts(contract):
    """The very tests of the parts that come with the package, in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.added", "-p", "no:cacheprovider"]
    selection = "(added or every or registries) and not gaussians_alone"  # a constant may be one's own
    command += ["-k", selection, f"tests/test_{contract}.py"]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:]

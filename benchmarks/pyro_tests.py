"""Pyro's own tests with pyrovae's estimators in place of Pyro's.

    git clone https://github.com/pyro-ppl/pyro
    python benchmarks/pyro_tests.py pyro [FILE ...] [-k EXPRESSION]

The ELBOs of `pyro.infer` that have a counterpart here are replaced by stand-ins before the tests are imported.
`Trace_ELBO`, `TraceGraph_ELBO` and `TraceEnum_ELBO` become `Elbo`, `TraceMeanField_ELBO` becomes `AnalyticKL`,
`RenyiELBO` becomes `Renyi` and `ReweightedWakeSleep` becomes `Rws`. A guide without reparameterized samplers
gets the estimator of the score function. Particles that Pyro draws one after the other are drawn so, where the
bound is a mean over them.

The tests come from the checkout, whose version should be near that of the installed Pyro, which is the one that
is tested. A test counts if it calls a stand-in. It has passed, or it was refused: an estimator said in one line
why it does not take the pair. Or it has failed; it is then run again with Pyro's estimators, to find tests that
fail with these too.
"""

import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import click
import pyro
import pyro.infer
import pytest
import torch
from pyro.infer import ELBO
from torch import Tensor

import pyrovae
from pyrovae.estimators import AnalyticKL, Elbo, Estimator, Renyi, Rws

PACKAGE = str(Path(pyrovae.__file__).parent)
FILES = [
    "tests/infer/test_gradient.py",
    "tests/infer/test_inference.py",
    "tests/infer/test_multi_sample_elbos.py",
    "tests/infer/test_conjugate_gradients.py",
    "tests/infer/test_elbo_mapdata.py",
    "tests/infer/test_predictive.py",
    "tests/infer/test_autoguide.py",
    "tests/infer/autoguide/test_inference.py",
    "tests/infer/autoguide/test_gaussian.py",
    "tests/contrib/easyguide/test_easyguide.py",
    "tests/infer/test_valid_models.py",
    "tests/infer/test_enum.py",
]
OTHERS = {  # tests of one of Pyro's estimators rather than of any, and why
    r"test_particle_gradient\[TraceEnum_ELBO-(nonreparam|reparam-False)": "it has its own formula",
    r"test_elbo_plate_i?plate\[.-2(-None)+\]": "it asks for 0.1, about the standard error of the score "
    "function with the signal of all cells (tests/test_plates.py tests that its mean is right)",
    r"PoissonGammaTests.*test_renyi_nonreparam": "its 12,500 steps are too few for the unbiased gradient, "
    "which is noisier than Pyro's self-normalized one",
    r"test_valid_models.*(_warning|model_empty_guide_ok.*TraceEnum)": "it asks for TraceEnum_ELBO's warnings",
    r"test_iplate_in_guide_not_model": "it asks for an error about a plate without sites",
}
OTHER_WORDS = "Regex pattern did not match"  # where a test demands an error, and by which words
SAMPLER = "expected a reparameterized sampler"  # how an estimator refuses a guide for want of one
COUNTED = "passed", "refused", "left out", "failed"


class Calls:
    """What the test that runs has asked of the stand-ins."""

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        self.number, self.refusals = 0, []


CALLS = Calls()


class StandIn(ELBO):
    """Takes the arguments and the calls of one of Pyro's ELBOs, and hands them to an estimator of ours."""

    in_one_pass = False  # whether the bound is no mean over particles
    use_rep: bool | None = None  # once it is known whether the guide takes it

    def estimator(self, **settings) -> Estimator:
        return Elbo(**settings)

    def loss(self, model: Callable, guide: Callable, *args, **kwargs) -> float:
        return self._call("loss", model, guide, args, kwargs)

    def differentiable_loss(self, model: Callable, guide: Callable, *args, **kwargs) -> Tensor:
        return self._call("differentiable_loss", model, guide, args, kwargs)

    def loss_and_grads(self, model: Callable, guide: Callable, *args, **kwargs) -> float:
        loss = self._call("differentiable_loss", model, guide, args, kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return loss.item()

    def _get_trace(self, model, guide, args, kwargs):
        raise NotImplementedError

    def _call(self, method: str, *pair) -> Tensor | float:
        CALLS.number += 1
        try:
            if self.use_rep is None:
                with _noise_kept():
                    self.use_rep = self._takes_rep(*pair)
            return self._mean(method, *pair)
        except ValueError as error:
            if _raised_in(error).startswith(PACKAGE):
                CALLS.refusals.append(error)
            raise

    def _takes_rep(self, *pair) -> bool:
        self.use_rep = True
        try:
            self._mean("differentiable_loss", *pair)  # not "loss", which takes no gradients, as a guide may
        except ValueError as error:
            return not str(error).startswith(SAMPLER)
        finally:
            self.use_rep = None
        return True

    def _mean(self, method: str, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> Tensor | float:
        together = self.num_particles > 1 and (self.vectorize_particles or self.in_one_pass)
        if together and self.max_plate_nesting == float("inf"):
            with _noise_kept():
                self._guess_max_plate_nesting(model, guide, args, kwargs)
        of_particles = self.vectorize_particles and self.num_particles > 1  # which Pyro counts among the plates
        estimator = self.estimator(
            num_particles=self.num_particles if together else 1,
            use_rep=self.use_rep,
            max_plate_nesting=max(self.max_plate_nesting - of_particles, 1) if together else 1,
        )
        runs = 1 if together else self.num_particles
        return sum(getattr(estimator, method)(model, guide, *args, **kwargs) for _ in range(runs)) / runs


class MeanField(StandIn):
    def estimator(self, **settings) -> Estimator:
        return AnalyticKL(**settings)


class Weighted(StandIn):
    in_one_pass = True

    def __init__(self, alpha: float = 0.0, num_particles: int = 2, **settings):
        super().__init__(num_particles=num_particles, **settings)
        self.alpha = alpha

    def estimator(self, **settings) -> Estimator:
        return Renyi(alpha=self.alpha, **settings)


class Wake(StandIn):
    in_one_pass = True

    def __init__(self, num_particles: int = 2, insomnia: float = 1.0, **settings):
        settings = {name: settings[name] for name in settings if name in ("max_plate_nesting", "retain_graph")}
        super().__init__(num_particles=num_particles, vectorize_particles=True, **settings)
        self.insomnia = insomnia

    def estimator(self, **settings) -> Estimator:
        return Rws(**settings | {"use_rep": False})


STAND_INS = {
    "Trace_ELBO": StandIn,
    "TraceGraph_ELBO": StandIn,
    "TraceEnum_ELBO": StandIn,
    "TraceMeanField_ELBO": MeanField,
    "RenyiELBO": Weighted,
    "ReweightedWakeSleep": Wake,
}


class Outcome(NamedTuple):
    """What became of a test, and why where it has not passed."""

    kind: str
    reason: str


class Results:
    """A pytest plugin that notes the outcome of each test."""

    def __init__(self, file: Path | None = None):
        self.outcomes: dict[str, Outcome] = {}
        self.file = file

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        CALLS.clear()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
        report = yield
        if report.when == "call":
            self.outcomes[item.nodeid] = outcome = self._outcome(item.nodeid, report, call)
            if self.file:
                with self.file.open("a") as lines:
                    lines.write(json.dumps([item.nodeid, *outcome, round(report.duration, 1)]) + "\n")
        return report

    def _outcome(self, name: str, report: pytest.TestReport, call: pytest.CallInfo) -> Outcome:
        if not CALLS.number:
            return Outcome("not ours", "")
        if report.outcome != "failed":
            return Outcome(report.outcome, "")
        what = str(call.excinfo.value).strip()
        if call.excinfo.value in CALLS.refusals:
            return Outcome("refused", what)
        if CALLS.refusals and what.startswith(OTHER_WORDS):
            return Outcome("refused", str(CALLS.refusals[-1]))  # as the test demands
        for pattern, reason in OTHERS.items():
            if re.search(pattern, name):
                return Outcome("left out", reason)
        return Outcome("failed", what.split("\n")[0])


@contextlib.contextmanager
def _noise_kept() -> Iterator[None]:
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)


def _raised_in(error: Exception) -> str:
    traceback = error.__traceback__
    while traceback.tb_next:
        traceback = traceback.tb_next
    return traceback.tb_frame.f_code.co_filename


@contextlib.contextmanager
def replaced() -> Iterator[None]:
    """While entered, Pyro has the stand-ins, each under the name of the ELBO that it stands for."""
    before = {name: getattr(pyro.infer, name) for name in STAND_INS}
    here = {name: type(name, (stand_in,), {}) for name, stand_in in STAND_INS.items()}

    def put(elbos: dict[str, type[ELBO]]) -> None:
        for name, elbo in elbos.items():
            for module in pyro.infer, sys.modules[before[name].__module__]:
                setattr(module, name, elbo)

    put(here)
    try:
        yield
    finally:
        put(before)


def run(checkout: Path, arguments: list[str], file: Path | None = None) -> dict[str, Outcome]:
    """The outcome of each test that pytest runs with some arguments; one line of JSON for each in the file."""
    results = Results(file)
    options = ["-q", "-p", "no:cacheprovider", "--no-header", "--tb=short", "--rootdir", str(checkout)]
    options += ["-c", str(checkout / "setup.cfg")]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of plugins that are imported by now
    code = pytest.main([*options, *arguments], plugins=[results])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise click.ClickException(
            f"expected tests that pytest can run, got its exit code {int(code)}: see above"
        )
    return results.outcomes


def failing_anyway(checkout: Path, names: list[str]) -> set[str]:
    """Those of some tests that fail with Pyro's estimators as well."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "outcomes"
        command = [sys.executable, __file__, str(checkout), *names, "--as-they-are", "--json", str(file)]
        subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
        rows = [json.loads(line) for line in file.read_text().splitlines()]
    passed = {name for name, kind, _, _ in rows if kind != "failed"}
    return set(names) - passed


def report(outcomes: dict[str, Outcome]) -> list[str]:
    """A table of numbers of tests by file, and the reasons of those that have not passed."""
    counts: dict[str, Counter] = {}
    for name, outcome in outcomes.items():
        counts.setdefault(name.split("::")[0], Counter())[outcome.kind] += 1
    counts = {file: kinds for file, kinds in counts.items() if any(kinds[kind] for kind in COUNTED)}
    width = max(map(len, [*counts, "file"]))
    lines = ["  ".join([f"{'file':<{width}}", *(f"{kind:>8}" for kind in COUNTED)])]
    for file, kinds in counts.items():
        lines.append("  ".join([f"{file:<{width}}", *(f"{kinds[kind]:>8}" for kind in COUNTED)]))
    for kind in COUNTED[1:]:
        reasons = Counter(_alike(o.reason) for o in outcomes.values() if o.kind == kind)
        lines += [f"{kind}: {number} x {reason}" for reason, number in reasons.most_common()]
    return lines + [f"failed: {name}: {o.reason}" for name, o in outcomes.items() if o.kind == "failed"]


def _alike(reason: str) -> str:
    """A reason without what is the pair's own: from "expected ..., got ...: remedy" the first and the last."""
    expected, _, rest = reason.partition(", got ")
    remedy = rest.rpartition(": ")[2] if ": " in rest else ""
    return f"{expected}: {remedy}" if remedy else expected


@click.command()
@click.argument("checkout", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("files", nargs=-1)
@click.option("-k", "expression", default="", help="Only tests whose names match, as pytest has it.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Add a line for each test to it.")
@click.option("--as-they-are", is_flag=True, help="With Pyro's own estimators.")
def main(checkout: Path, files: tuple[str, ...], expression: str, json_file: Path | None, as_they_are: bool):
    """Run Pyro's tests, from CHECKOUT, with pyrovae's estimators; say which pass, and why others are refused.

    FILES are tests as pytest has them, from within the checkout; by default those that take any ELBO.
    """
    checkout = checkout.resolve()
    arguments = [str(checkout / file) for file in files or FILES] + (["-k", expression] if expression else [])
    with contextlib.nullcontext() if as_they_are else replaced():
        outcomes = run(checkout, arguments, json_file)
    failed = [name for name, outcome in outcomes.items() if outcome.kind == "failed"]
    if failed and not as_they_are:
        for name in failing_anyway(checkout, failed):
            outcomes[name] = Outcome("left out", "it fails with Pyro's estimators as well")
    versions = ", ".join(f"{name} {version(name)}" for name in ("pyro-ppl", "torch"))
    click.echo("\n".join([versions, *report(outcomes)]))
    sys.exit(any(outcome.kind == "failed" for outcome in outcomes.values()))


if __name__ == "__main__":
    main()

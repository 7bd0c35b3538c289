"""Whether the tests notice a small fault in the package: random mutants, each judged by its module's own tests.

    python -m benchmarks.mutants [--number N] [--seed N] [--module NAME]... [--jobs N] [--at MODULE:LINE]...

A mutant is the package with one operator, comparison, number, flag or `not` changed (`mutations.py`). Its
judges are the tests of the files in JUDGES that reach the changed statement, the fastest first, up to the
first that fails; a test that takes far longer than usual notices it too. Which test reaches what is measured
once for each state of the package (`covering.py`). Survivors that no test can or should notice stand in
`mutants.toml` with the reason. The command fails if more than 5 % of the mutants survive without one.

All that is measured stays in the folder `--cache`, so that an interrupted call goes on where it was.
"""

import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import click

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from benchmarks.covering import PACKAGE, PATIENCE, ROOT, Reach, collect, copy_tree, judge, record, start
from benchmarks.mutations import Mutation, mutations

# Each module's own tests, those that say most of it first.
JUDGES = {
    "evaluation/annealing": ("evidence",),
    "variance/bias": ("bias", "comparison"),
    "runtime/buffers": ("run_once",),
    "training/checkpoints": ("training", "whole_files", "config", "pyro_traps", "cli"),
    "variance/bench": ("comparison", "laboratory"),
    "variance/comparison": ("comparison", "laboratory"),
    "variance/results": ("comparison", "laboratory"),
    "data/arrays": ("data", "files", "sizes"),
    "data/datasets": ("data", "files", "config"),
    "data/images": ("inputs", "data", "files"),
    "data/sources": ("data",),
    "guides/distributions": ("distributions", "guides", "vae", "posterior_gap"),
    "estimators/antithetic": ("antithetic", "estimators", "guides"),
    "estimators/codes": ("estimators", "testbed", "plates"),
    "estimators/twins": ("testbed",),
    "estimators/sampling": ("estimators", "autoguides", "antithetic"),
    "estimators/base": ("estimators", "plates", "scales_and_masks", "autoguides", "pyro_traps", "testbed"),
    "estimators/dependence": ("plates", "autoguides"),
    "estimators/draws": ("run_once", "scales_and_masks", "analytic_kl", "estimators", "plates", "autoguides"),
    "estimators/importance_weighted": ("estimators", "testbed"),
    "estimators/kl": ("analytic_kl", "plates", "autoguides"),
    "estimators/layout": ("plates", "scales_and_masks", "estimators"),
    "estimators/pathwise": ("estimators", "analytic_kl", "testbed", "autoencoder"),
    "estimators/baselines": ("estimators", "plates", "scales_and_masks", "testbed"),
    "estimators/traces": ("run_once", "scales_and_masks", "analytic_kl", "autoguides", "estimators"),
    "estimators/weights": ("scales_and_masks", "plates", "estimators"),
    "evaluation/bounds": ("evaluation", "training", "autoencoder", "files"),
    "evaluation/chains": ("evidence", "conditional"),
    "evaluation/chunks": ("evidence",),
    "evaluation/importance": ("evidence", "conditional", "posterior_gap"),
    "guides/base": ("guides", "vae", "config"),
    "guides/codes": ("guides", "vae", "config"),
    "guides/flows": ("guides", "vae", "config"),
    "guides/gaussians": ("guides", "vae", "config"),
    "guides/mixture": ("guides", "vae", "config"),
    "guides/points": ("guides", "vae", "autoencoder"),
    "guides/refined": ("guides", "vae", "config"),
    "guides/registry": ("guides", "config"),
    "guides/student_t": ("guides", "vae", "config"),
    "runtime/inputs": ("inputs", "vae", "conditional"),
    "variance/intervals": ("intervals", "variance"),
    "likelihoods/base": ("likelihoods", "vae", "evaluation"),
    "likelihoods/bernoulli": ("likelihoods", "vae", "evaluation"),
    "likelihoods/categorical": ("likelihoods", "vae", "evaluation"),
    "likelihoods/continuous_bernoulli": ("likelihoods", "vae", "evaluation"),
    "likelihoods/gaussian": ("likelihoods", "vae", "evaluation"),
    "networks/base": ("networks", "conditional", "vae"),
    "networks/cnn": ("networks", "conditional", "vae"),
    "networks/mlp": ("networks", "conditional", "vae"),
    "evaluation/pareto": ("weights", "evidence"),
    "variance/layers": ("per_draw", "per_datum", "variance"),
    "variance/passes": ("per_draw", "per_datum", "variance"),
    "variance/per_draw": ("per_draw", "per_datum", "variance"),
    "training/fitting": ("training", "messages", "inputs"),
    "training/loop": ("training", "autoencoder", "conditional"),
    "training/progress": ("training", "autoencoder"),
    "training/saving": ("training", "pyro_traps"),
    "training/steps": ("training", "autoencoder", "conditional", "distributed"),
    "vae": ("vae", "conditional", "guides", "autoencoder", "files"),
    "variance/moments": ("variance", "per_datum", "laboratory", "comparison"),
    "variance/stats": ("variance", "per_datum", "laboratory", "comparison"),
    "variance/tallies": ("variance", "per_draw", "per_datum"),
    "evaluation/weights": ("weights", "evidence", "evaluation"),
    "runtime/whole_files": ("whole_files", "training"),
}
DOCUMENTATION = "tests/test_docs.py"  # examples in docstrings judge every module
EXPLAINED = Path(__file__).with_suffix(".toml")
LIMIT = 0.05  # of the mutants may survive without an explanation
IMPORTED = (
    "torch torch._dynamo torch._inductor torchvision pyro scipy.stats sklearn.linear_model sklearn.neighbors"
)
IMPORTED += " matplotlib.pyplot PIL.Image jinja2 tqdm beartype jaxtyping hypothesis IPython nbclient"


@dataclass
class Sources:
    """The package and its tests as they are now, and what earlier calls measured of them."""

    cache: Path
    modules: tuple[str, ...]
    files: dict[str, str] = field(default_factory=dict)
    reaches: dict[str, Reach] = field(default_factory=dict)

    def __post_init__(self):
        self.cache.mkdir(parents=True, exist_ok=True)
        for module in self.modules:
            self.files[f"{module}.py"] = (ROOT / PACKAGE / f"{module}.py").read_text()
        package = b"".join(path.read_bytes() for path in sorted((ROOT / PACKAGE).rglob("*.py")))
        self.package = hashlib.sha256(package).hexdigest()

    def test_files(self, module: str) -> list[str]:
        """The files of a module's own tests, also those whose name goes on after an underscore."""
        tests = ROOT / "tests"
        found = [
            path.relative_to(ROOT).as_posix()
            for name in JUDGES[module]
            for path in [*tests.glob(f"test_{name}.py"), *sorted(tests.glob(f"test_{name}_*.py"))]
        ]
        return [*dict.fromkeys(found), DOCUMENTATION]

    def key(self, *files: str) -> str:
        """Changes with the package and with these files of tests."""
        contents = [(ROOT / file).read_bytes() for file in [*files, "tests/conftest.py"]]
        return hashlib.sha256(b"".join([self.package.encode(), *contents])).hexdigest()[:16]

    def judges(self, mutation: Mutation) -> dict[str, float]:
        """The tests to run, in order, with their usual seconds: those that start processes at the end."""
        lines = None if mutation.once else range(mutation.lines[0], mutation.lines[1] + 1)
        reaches = [self.reaches[file] for file in self.test_files(mutation.path.removesuffix(".py"))]
        found: dict[str, float] = {}
        for reach in reaches:
            found |= {test: reach.seconds[test] for test in reach.tests(mutation.path, lines)}
        for reach in reaches:
            found |= {test: reach.seconds[test] for test in reach.starters if test not in found}
        return found


@dataclass
class Workers:
    """Processes that run in copies of the repository."""

    trees: list[Path]
    running: dict[int, tuple[Path, object, float]] = field(default_factory=dict)

    def start(self, work, tree: Path, what: object, seconds: float) -> None:
        """Starts some work, which is stopped after so many seconds."""
        self.trees.remove(tree)
        self.running[start(partial(work, tree), tree, Path(f"{tree}.log"))] = (
            tree,
            what,
            time.monotonic() + seconds,
        )

    def wait(self) -> tuple[Path, object, int]:
        """The tree, the subject and the exit code of the next work that ends; -9 of what took too long."""
        while True:
            for process, (tree, what, deadline) in self.running.items():
                ended, status = os.waitpid(process, os.WNOHANG)
                if ended or time.monotonic() > deadline:
                    self.stop(process)
                    self.trees.append(tree)
                    del self.running[process]
                    return tree, what, os.waitstatus_to_exitcode(status) if ended else -9
            time.sleep(0.02)

    def stop(self, process: int) -> None:
        """Ends a process with all that it started."""
        try:
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


def measure(sources: Sources, workers: Workers, tree: Path) -> None:
    """Finds which tests reach what, where no earlier call did."""
    files = dict.fromkeys(file for module in sources.modules for file in sources.test_files(module))
    for file in files:
        kept = sources.cache / f"{Path(file).stem}-{sources.key(file)}.json"
        if not kept.exists():
            click.echo(f"measuring what {file} reaches", err=True)
            workers.start(partial(record, test_file=file, into=kept), tree, file, 3600)
            code = workers.wait()[2]
            if code != 0:
                raise click.ClickException(f"expected {file} to pass, got exit code {code}: see {tree}.log")
        sources.reaches[file] = Reach.read(kept)
    workers.start(partial(collect, test_files=list(files)), tree, "", 3600)
    workers.wait()


def judge_all(sources: Sources, workers: Workers, chosen: list[Mutation], verdicts: dict[str, str]) -> None:
    """Judges mutants and adds their verdicts: noticed, survived, or unreached."""
    written = sources.cache / f"verdicts-{sources.key(*sorted(sources.reaches))}.json"
    if written.exists():
        verdicts |= json.loads(written.read_text())
    queue = [mutation for mutation in chosen if name(mutation) not in verdicts]
    while queue or workers.running:
        while queue and workers.trees:
            mutation, tree = queue.pop(0), workers.trees[0]
            judges = sources.judges(mutation)
            if not judges:
                verdicts[name(mutation)] = "unreached"
                continue
            install(mutation.apply(sources.files[mutation.path]), tree, mutation.path)
            limit = 5 * (PATIENCE[0] + sum(judges.values()))  # each test has a limit of its own
            workers.start(partial(judge, seconds=judges), tree, mutation, limit)
        tree, mutation, code = workers.wait()
        install(sources.files[mutation.path], tree, mutation.path)
        if code == 5:
            raise click.ClickException(f"expected the judges of {name(mutation)}, got none: see {tree}.log")
        verdicts[name(mutation)] = "survived" if code == 0 else "noticed"
        written.write_text(json.dumps(verdicts))
        click.echo(f"{len(chosen) - len(queue):4} {verdicts[name(mutation)]:9} {name(mutation)}", err=True)


def install(source: str, tree: Path, path: str) -> None:
    """Puts a source into the tree, with a time of its own, so that no older bytecode is taken for it."""
    file = tree / PACKAGE / path
    file.write_text(source)
    now = time.time_ns()
    os.utime(file, ns=(now, now))


def name(mutation: Mutation) -> str:
    """What a mutation is called in what is printed and kept."""
    return f"{mutation.path}:{mutation.line}:{mutation.start}  {mutation.change}"


def explanations() -> dict[tuple[str, str, str], str]:
    """Why survivors are equivalent or cosmetic, by path, text of the line and change."""
    entries = tomllib.loads(EXPLAINED.read_text()).get("explained", []) if EXPLAINED.exists() else []
    return {(entry["path"], entry["text"], entry["change"]): entry["reason"] for entry in entries}


def choose(sources: Sources, number: int, seed: int, places: tuple[str, ...]) -> list[Mutation]:
    """Draws mutations of all modules together, or takes every one of the given lines."""
    every = [m for path, source in sorted(sources.files.items()) for m in mutations(source, path)]
    if places:
        return [m for m in every if f"{m.path.removesuffix('.py')}:{m.line}" in places]
    return random.Random(seed).sample(every, min(number, len(every)))


def report(chosen: list[Mutation], verdicts: dict[str, str]) -> float:
    """Prints the survivors and a table; gives the fraction of mutants that survived without an explanation."""
    reasons, counts = explanations(), Counter()
    for mutation in sorted(chosen, key=lambda m: (m.path, m.start)):
        verdict, module = verdicts[name(mutation)], mutation.path.removesuffix(".py")
        counts[module, "tried"] += 1
        counts[module, "noticed"] += verdict == "noticed"
        if verdict != "noticed":
            reason = reasons.get((mutation.path, mutation.text, mutation.change))
            counts[module, "survived"] += 1
            counts[module, "explained"] += reason is not None
            note = reason or ("NO TEST REACHES IT" if verdict == "unreached" else "NOT EXPLAINED")
            click.echo(f"{mutation.path}:{mutation.line}: {mutation.change}\n    {mutation.text}\n    {note}")
    columns = "tried", "noticed", "survived", "explained"
    click.echo(f"{'module':32}" + "".join(f"{column:>10}" for column in columns))
    for module in [*dict.fromkeys(module for module, _ in counts), "all"]:
        numbers = [
            sum(n for (m, c), n in counts.items() if c == column and module in (m, "all")) for column in columns
        ]
        click.echo(f"{module:32}" + "".join(f"{number:10}" for number in numbers))
    tried, _, survived, explained = numbers
    click.echo(f"{survived} of {tried} survived, of which {explained} are explained")
    return (survived - explained) / max(tried, 1)


@click.command()
@click.option("--number", "-n", type=click.IntRange(1), default=400, show_default=True, help="Mutants to try.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of their choice.")
@click.option(
    "--module",
    "-m",
    "modules",
    multiple=True,
    type=click.Choice(JUDGES),
    help="Modules to change [default: all].",
)
@click.option(
    "--at", "places", multiple=True, metavar="MODULE:LINE", help="Try all mutants of this line instead."
)
@click.option("--jobs", "-j", type=click.IntRange(1), default=2, show_default=True, help="Mutants at a time.")
@click.option(
    "--cache", type=click.Path(path_type=Path), help="Folder of what is measured [default: a temporary one]."
)
def main(
    number: int, seed: int, modules: tuple[str, ...], places: tuple[str, ...], jobs: int, cache: Path | None
) -> None:
    """Tries random mutants of the package and says which of them its tests notice."""
    cache = (cache or Path(tempfile.gettempdir()) / "pyrovae-mutants").resolve()
    named = {place.rsplit(":", 1)[0] for place in places}
    if named - JUDGES.keys():
        raise click.BadParameter(
            f"expected MODULE:LINE of {', '.join(JUDGES)}, got {', '.join(places)}", param_hint="--at"
        )
    sources = Sources(cache, tuple(sorted(named or modules or JUDGES)))
    chosen, verdicts = choose(sources, number, seed, places), {}
    for module in IMPORTED.split():  # in this process once, for all that are forked from it
        importlib.import_module(module)
    workers = Workers([copy_tree(cache / "tree-0")])
    try:
        measure(sources, workers, workers.trees[0])
        for job in range(1, jobs):  # with the bytecode
            shutil.rmtree(cache / f"tree-{job}", ignore_errors=True)
            workers.trees.append(Path(shutil.copytree(workers.trees[0], cache / f"tree-{job}")))
        judge_all(sources, workers, chosen, verdicts)
    finally:
        for process in workers.running:
            workers.stop(process)
    if report(chosen, verdicts) > LIMIT:
        raise click.ClickException(
            f"expected at most {LIMIT:.0%} to survive without an explanation in {EXPLAINED.name}"
        )


if __name__ == "__main__":
    main()

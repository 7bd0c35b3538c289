"""Which tests reach which lines of the package, and running such tests on a changed copy of it.

Every run of tests is a process that is forked from this one, where torch and the like are imported already, and
works in a copy of the repository.
"""

import faulthandler
import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import coverage
import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "pyrovae"
IGNORED = shutil.ignore_patterns(
    ".git", ".venv", "build", "runs", "data", "*.egg-info", ".*_cache", "__pycache__"
)
PATIENCE = 60, 20  # seconds that every test gets, and how many times its usual seconds
STARTS = {"subprocess.Popen", "os.fork", "os.posix_spawn"}  # audit events of a process that starts another


@dataclass(frozen=True)
class Reach:
    """What the tests of one file reach.

    Attributes:
        seconds: Each test, in the order of the file, and the time that its call took.
        lines: The tests that run a line, by the path below the package and the number of the line.
        starters: Tests that start processes, whose lines are not known.
    """

    seconds: dict[str, float]
    lines: dict[str, dict[int, list[str]]]
    starters: list[str]

    @classmethod
    def read(cls, file: Path) -> "Reach":
        """The inverse of `write`."""
        contents = json.loads(file.read_text())
        contents["lines"] = {
            path: {int(line): tests for line, tests in lines.items()}
            for path, lines in contents["lines"].items()
        }
        return cls(**contents)

    def write(self, file: Path) -> None:
        """Leaves it as JSON."""
        file.write_text(json.dumps(asdict(self)))

    def tests(self, path: str, lines: Collection[int] | None) -> list[str]:
        """The tests that run one of these lines of a file, or any line if None, the fastest first."""
        known = self.lines.get(path, {})
        found = {test for line in (known if lines is None else lines) for test in known.get(line, ())}
        return sorted(found, key=self.seconds.__getitem__)


@dataclass(eq=False)
class _Recorder:
    """A plugin of pytest that names each test to coverage as the context of what runs.

    What a fixture of a module or session runs counts for every test that uses it.
    """

    coverage: coverage.Coverage
    seconds: dict[str, float] = field(default_factory=dict)
    users: dict[str, list[str]] = field(default_factory=dict)
    starters: list[str] = field(default_factory=list)
    context: str = ""

    def __post_init__(self):
        sys.addaudithook(self.audit)

    def audit(self, event: str, args: Any) -> None:
        if event in STARTS and self.context in self.users and self.context not in self.starters:
            self.starters.append(self.context)

    def within(self, context: str) -> Iterator[None]:
        before, self.context = self.context, context
        self.coverage.switch_context(context)
        try:
            return (yield)
        finally:
            self.context = before
            self.coverage.switch_context(before)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        for context in (item.nodeid, *(f"fixture {name}" for name in item.fixturenames)):
            self.users.setdefault(context, []).append(item.nodeid)
        return (yield from self.within(item.nodeid))

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        shared = fixturedef.scope != "function"
        return (yield from self.within(f"fixture {fixturedef.argname}" if shared else self.context))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self.seconds[report.nodeid] = report.duration

    def reach(self, package: Path) -> Reach:
        data, lines = self.coverage.get_data(), {}
        for file in data.measured_files():
            known = lines[Path(file).relative_to(package).as_posix()] = {}
            for line, contexts in data.contexts_by_lineno(file).items():
                tests = {
                    test for context in contexts for test in self.users.get(context, ())
                } & self.seconds.keys()
                known[line] = sorted(tests)
        return Reach(self.seconds, lines, self.starters)


@dataclass(eq=False, frozen=True)
class _Selection:
    """A plugin of pytest that runs some tests only, in their order, and ends the process where one hangs."""

    seconds: dict[str, float]

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        place = {test: number for number, test in enumerate(self.seconds)}
        items[:] = sorted((item for item in items if item.nodeid in place), key=lambda item: place[item.nodeid])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        every, times = PATIENCE
        faulthandler.dump_traceback_later(every + times * self.seconds[item.nodeid], exit=True)
        try:
            return (yield)
        finally:
            faulthandler.cancel_dump_traceback_later()


def copy_tree(target: Path) -> Path:
    """Copies the repository to a folder that this call makes anew, which may lie in the repository itself."""

    def ignored(folder: str, names: list[str]) -> set[str]:
        return IGNORED(folder, names) | {name for name in names if Path(folder, name) == target.parent}

    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(ROOT, target, ignore=ignored))


def record(tree: Path, test_file: str, into: Path) -> int:
    """Runs a file of tests and leaves what each reaches; gives pytest's exit code. Call it by `start`."""
    os.environ["COVERAGE_CORE"] = "ctrace"  # the others know no contexts
    measured = coverage.Coverage(
        data_file=None, include=[f"{tree / PACKAGE}/*"], config_file=False, messages=False
    )
    measured.start()
    recorder = _Recorder(measured)
    code = pytest.main([*_arguments(tree), test_file], [recorder])
    measured.stop()
    if code == 0:
        recorder.reach(tree / PACKAGE).write(into)
    return code


def collect(tree: Path, test_files: Sequence[str]) -> int:
    """Imports the tests, so that their bytecode lies in the tree. Call it by `start`."""
    sys.dont_write_bytecode = False
    return pytest.main([*_arguments(tree), "--collect-only", *test_files])


def judge(tree: Path, seconds: dict[str, float]) -> int:
    """Runs some tests up to the first that fails; gives pytest's exit code. Call it by `start`."""
    files = dict.fromkeys(test.split("::")[0] for test in seconds)
    return pytest.main([*_arguments(tree), "-x", "--tb=short", *files], [_Selection(seconds)])


def _arguments(tree: Path) -> list[str]:
    of_tree = [f"--rootdir={tree}", f"--config-file={tree / 'pyproject.toml'}", f"--basetemp={tree}.tmp"]
    imported_before = "-Wignore:Module already imported:pytest.PytestAssertRewriteWarning"
    return [*of_tree, "--quiet", "-p", "no:cacheprovider", imported_before]


def start(work: Callable[[], int], tree: Path, log: Path) -> int:
    """Forks a process group that does some work in a tree and exits with what it returns; gives its id."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        os.setsid()
        with log.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        _enter(tree)
        code = int(work())
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _enter(tree: Path) -> None:
    """Imports everything of the repository from the tree from here on, also in processes that start later."""
    os.chdir(tree)
    sys.dont_write_bytecode = True  # which would be taken for that of another mutant
    sys.path[:] = [str(tree), *(place for place in sys.path if Path(place).resolve() != ROOT)]
    os.environ.update(PYTHONPATH=str(tree), PYTHONDONTWRITEBYTECODE="1", OMP_NUM_THREADS="1")
    for name in [name for name in sys.modules if name.split(".")[0] in (PACKAGE, "tests", "benchmarks")]:
        del sys.modules[name]

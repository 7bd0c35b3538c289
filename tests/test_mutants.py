"""The command that tries mutants: which it makes, and that each is judged by the tests that reach it."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import mutants
from benchmarks.covering import PACKAGE, ROOT
from benchmarks.mutations import mutations

SOURCE = '''"""A text with 1 + 1."""

SCALE: int = 2


@dataclass(frozen=True)
class Half:
    """Half of 4."""

    whole: "Float[Tensor, 'B 2']" = 0.5

    def __call__(self, x: Literal[3] = -1, *, plain=False) -> Literal[4]:
        """Gives 5."""
        if not plain or x:
            raise ValueError(f"expected {x + 1}, got {1}")
        assert x > 0, 1
        warnings.warn("6", stacklevel=2)
        return (x -
                self.whole) if 0 <= x < SCALE else isinstance(x, int | float)
'''
CHANGES = {
    3: ["2 -> 3"],
    10: ["0.5 -> 1.0"],
    12: ["-1 -> 1", "1 -> 2", "False -> True"],
    14: [
        "not plain or x -> not (not plain or x)",
        "not plain or x -> not plain and x",
        "not plain -> plain",
    ],
    18: ["x - self.whole -> x + self.whole"],
    19: ["0 <= x < SCALE -> 0 < x < SCALE", "0 <= x < SCALE -> 0 <= x <= SCALE", "0 -> 1"],
}

# A package of one module, of which one line is judged well, one badly, one not at all, and one for ever.
MODULE = """
FACTOR = 3


def scaled(x):
    return FACTOR * x


def shifted(x):
    return x + 1 if x > 0 else x


def unused(x):
    return x - 1


def counted(n):
    while n > 0:
        n = n - 1
    return n
"""
TESTS = """
from pyrovae.likelihoods.gaussian import counted, scaled, shifted


def test_scaled():
    assert scaled(2) == 6


def test_shifted():
    assert shifted(2) == 3


def test_counted():
    assert counted(3) == 0
"""
EXPLAINED = """
[[explained]]
path = "likelihoods/gaussian.py"
text = "while n > 0:"
change = "n > 0 -> n >= 0"
reason = "Not so, but a test needs an entry."

[[explained]]
path = "likelihoods/gaussian.py"
text = "return x - 1"
change = "x - 1 -> x + 1"
reason = "Nobody calls it."
"""


def test_mutations_are_those_that_may_change_a_result():
    found = mutations(SOURCE, "half.py")
    changes = {
        line: [m.change for m in found if m.line == line] for line in dict.fromkeys(m.line for m in found)
    }
    assert {line: sorted(of_line) for line, of_line in changes.items()} == {
        line: sorted(of_line) for line, of_line in CHANGES.items()
    }
    for mutation in found:
        ast.parse(mutation.apply(SOURCE))
        assert mutation.text == SOURCE.splitlines()[mutation.line - 1].strip()


def test_a_mutation_knows_its_statement_and_when_that_runs():
    found = {m.change: m for m in mutations(SOURCE, "half.py")}
    assert found["x - self.whole -> x + self.whole"].lines == (18, 19)
    assert not found["not plain -> plain"].once
    for at_import in ("2 -> 3", "0.5 -> 1.0", "False -> True"):
        assert found[at_import].once


def test_mutations_of_the_package_can_be_told_apart_and_compiled():
    for module in mutants.JUDGES:
        source = (ROOT / PACKAGE / f"{module}.py").read_text()
        found = mutations(source, f"{module}.py")
        assert len({mutants.name(m) for m in found}) == len(found) > 0
        for mutation in found[::60]:
            compile(mutation.apply(source), mutation.path, "exec")


def test_every_module_has_judges():
    for module, names in mutants.JUDGES.items():
        assert (ROOT / PACKAGE / f"{module}.py").is_file(), module
        for name in names:
            assert (ROOT / "tests" / f"test_{name}.py").is_file(), name


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """A repository of one module and its tests, with the command."""
    root = tmp_path_factory.mktemp("repository")
    for folder in (PACKAGE, "tests", "benchmarks"):
        (root / folder).mkdir()
        (root / folder / "__init__.py").touch()  # without it, a package of this name elsewhere would be taken
    for name in ("mutants", "covering", "mutations"):
        shutil.copy(ROOT / "benchmarks" / f"{name}.py", root / "benchmarks")
    (root / PACKAGE / "likelihoods").mkdir()
    (root / PACKAGE / "likelihoods" / "__init__.py").touch()
    (root / PACKAGE / "likelihoods" / "gaussian.py").write_text(MODULE)
    (root / "tests" / "test_likelihoods.py").write_text(TESTS)
    (root / "tests" / "test_docs.py").write_text("def test_nothing():\n    pass\n")
    (root / "tests" / "conftest.py").touch()
    (root / "pyproject.toml").write_text("[tool.pytest.ini_options]\nfilterwarnings = ['error']\n")
    (root / "benchmarks" / "mutants.toml").write_text(EXPLAINED)
    return root


def call(repository: Path, *args: str) -> subprocess.CompletedProcess:
    """Calls the command without torch and pytest's plugins, which the repository does not need.

    PYTHONPATH may name a place with tests of its own, which would be found in place of the repository's.
    """
    program = "from benchmarks import covering, mutants; mutants.IMPORTED = ''; covering.PATIENCE = 2, 1"
    command = [
        sys.executable,
        "-c",
        f"{program}; mutants.main()",
        "-m",
        "likelihoods/gaussian",
        "--cache",
        repository / "cache",
        *args,
    ]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    return subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(sys.platform == "win32", reason="needs os.fork")
def test_mutants_are_judged(repository):
    result = call(repository, "--number", "100", "--jobs", "2")
    pattern = r"^likelihoods/gaussian\.py:\d+: (.*)\n.*\n    (.*)$"
    survivors = re.findall(pattern, result.stdout, flags=re.MULTILINE)
    unreached = "NO TEST REACHES IT"
    assert sorted(survivors) == [
        ("0 -> 1", "NOT EXPLAINED"),
        ("1 -> 2", unreached),
        ("x - 1 -> x + 1", "Nobody calls it."),
        ("x > 0 -> x >= 0", "NOT EXPLAINED"),
    ]
    tried = len(mutations(MODULE, "likelihoods/gaussian.py"))
    assert f"4 of {tried} survived, of which 1 are explained" in result.stdout
    assert result.returncode == 1
    assert "at most 5%" in result.stderr
    again = call(repository, "--number", "100")  # by what was measured and judged before
    assert (again.stdout, again.stderr.count("measuring")) == (result.stdout, 0)


@pytest.mark.skipif(sys.platform == "win32", reason="needs os.fork")
def test_a_place_may_be_named(repository):
    result = call(repository, "--at", "likelihoods/gaussian:6")
    assert "0 of 1 survived" in result.stdout
    assert result.returncode == 0
    assert "expected MODULE:LINE" in call(repository, "--at", "likelihood:6").stderr

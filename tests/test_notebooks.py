"""Each notebook runs from top to bottom, briefly; as committed it has no outputs, and needs only the package.

Cells are executed in this process and not in a kernel: five kernels would import torch and Pyro anew, which
costs more than the smoke runs themselves, and here a warning is an error, as everywhere.
So that this means what a kernel does, a figure on a cell's last line is drawn, as are pyplot's. The one line
that only a kernel understands, `%matplotlib inline`, is left out; a kernel shows once that it does its part.
"""

import ast
import io
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pytest
from matplotlib.figure import Figure

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
MAGIC = "%matplotlib inline\n"
IMPORTABLE = {"pyrovae", "pyro", "torch", "numpy", "matplotlib"} | sys.stdlib_module_names
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_of(path: Path) -> list[str]:
    cells = nbformat.read(path, as_version=4).cells
    return [cell.source.replace(MAGIC, "") for cell in cells if cell.cell_type == "code"]


def run_cell(source: str, names: dict) -> int:
    """Runs a cell, and draws and counts the figures that a kernel would show."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "<cell>", "exec"), names)
    value = None if last is None else eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)
    shown = [value] if isinstance(value, Figure) else []
    shown += [plt.figure(number) for number in plt.get_fignums()]
    for figure in shown:
        figure.savefig(io.BytesIO())
    plt.close("all")
    return len(shown)


def test_there_are_five():
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05"]


@each
@pytest.mark.usefixtures("unchecked")
def test_runs_briefly(path, tmp_path, monkeypatch):
    """In an empty directory, where it leaves nothing: a notebook may be opened anywhere."""
    (tmp_path / "tmp").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("PYROVAE_SMOKE", "1")
    names: dict = {"__name__": "__main__"}
    shown = sum(run_cell(source, names) for source in code_of(path))
    assert names["smoke"] is True
    assert shown >= 2
    assert not list(Path().iterdir())


@pytest.mark.slow
def test_a_kernel_shows_the_figures(tmp_path):
    """Of the package too, which are no pyplot figures: without the magic only their names would be seen."""
    command = [sys.executable, "-c", KERNEL, str(NOTEBOOKS[0]), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "image/png\n"


# Runs the first notebook as far as its first figure, which is one of the package.
KERNEL = """
import sys
import nbformat
from nbclient import NotebookClient

notebook = nbformat.read(sys.argv[1], as_version=4)
first = next(n for n, cell in enumerate(notebook.cells) if "figures.grid" in cell.source)
del notebook.cells[first + 1 :]
NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": sys.argv[2]}}).execute()
print(*(kind for output in notebook.cells[-1].outputs for kind in output.get("data", {}) if "image" in kind))
"""


@each
def test_is_committed_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.nbformat == 4
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    for cell in notebook.cells:
        assert not cell.metadata
        if cell.cell_type == "code":
            assert not cell.outputs, "clear outputs, as CONTRIBUTING.md says"
            assert cell.execution_count is None


@each
def test_is_a_lesson(path):
    """Prose before anything runs, mathematics, and code cells that a reader can take in at once."""
    notebook = nbformat.read(path, as_version=4)
    prose = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    assert notebook.cells[0].source.startswith("# ")
    assert sum("$" in text for text in prose) >= 3
    assert len(prose) >= len(code_of(path)) - 1
    assert max(len(source.splitlines()) for source in code_of(path)) <= 40


@each
def test_needs_only_the_package(path):
    """Nothing but the package and what it is made of, no other magic, at most one class."""
    tree = ast.parse("\n".join(code_of(path)))
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in modules} <= IMPORTABLE
    assert "sys" not in modules
    assert sum(isinstance(node, ast.ClassDef) for node in ast.walk(tree)) <= 1

"""The shape of the package: imports only downward, registries complete, public names that exist."""

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import GenericAlias

import jaxtyping
import pytest
import torch

import pyrovae
from pyrovae import estimators, guides, likelihoods, networks
from pyrovae.data import DATASETS
from pyrovae.evaluation.bounds import variance_of_means

PACKAGE = Path(pyrovae.__file__).parent
FLOORS = [  # folders and modules of the package, which import from lower floors only
    {"runtime"},
    {"likelihoods", "networks", "data", "estimators"},
    {"guides", "programs"},
    {"vae", "variance"},
    {"evaluation"},
    {"training", "figures"},
    {"runs"},
    {"report"},
    {"cli"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in sorted(rooms)}
ENTRY_POINTS = {"__init__", "__main__"}  # these import nothing, or only when asked


def imports(path: Path) -> set[str]:
    """The modules of pyrovae that a file imports, wherever in it, as names under pyrovae."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "pyrovae":
            found |= {alias.name for alias in node.names if alias.name != "__version__"}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("pyrovae."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("pyrovae.")}
    return found


def imported_files(path: Path) -> set[Path]:
    """The files of pyrovae from which a file imports names, or which it imports as modules."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("pyrovae."):
            place = PACKAGE.joinpath(*node.module.split(".")[1:])
            found |= {place.with_suffix(".py"), *(place / f"{alias.name}.py" for alias in node.names)}
    return {path for path in found if path.exists()}


def files(room: str) -> list[Path]:
    return [*PACKAGE.glob(f"{room}.py"), *PACKAGE.glob(f"{room}/**/*.py")]


def functions_within(node: ast.AST, within: bool = False) -> Iterator[ast.FunctionDef]:
    for child in ast.iter_child_nodes(node):
        is_function = isinstance(child, ast.FunctionDef)
        if is_function and within:
            yield child
        yield from functions_within(child, within or is_function)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_functions_within_functions_have_no_shapes(path):
    """The tests check the shapes of all others (`conftest.py`)."""
    for function in functions_within(ast.parse(path.read_text())):
        signature = f"{ast.unparse(function.args)} -> {function.returns and ast.unparse(function.returns)}"
        assert "[Tensor, '" not in signature, f"{function.name}({signature})"


def test_shapes_are_checked():
    assert variance_of_means(torch.zeros(3, 2)).tolist() == [0, 0]
    with pytest.raises(jaxtyping.TypeCheckError, match="means"):
        variance_of_means(torch.zeros(3))


def test_every_room_has_a_floor():
    found = {p.stem for p in PACKAGE.glob("*.py")} | {p.parent.name for p in PACKAGE.glob("*/__init__.py")}
    assert found - ENTRY_POINTS == FLOOR_OF.keys()


@pytest.mark.parametrize("room", FLOOR_OF)
def test_imports_go_downward_only(room):
    for path in files(room):
        for other in imports(path) - {room} - ENTRY_POINTS:
            assert FLOOR_OF[other] < FLOOR_OF[room], f"{path.name} imports {other}"


def test_within_a_room_imports_do_not_run_in_a_circle():
    for room in FLOOR_OF:
        of = {path: imported_files(path) & set(files(room)) - {path} for path in files(room)}
        of = {path: {p for p in others if p.name != "__init__.py"} for path, others in of.items()}
        while free := {path for path, others in of.items() if not others & of.keys()}:
            of = {path: others for path, others in of.items() if path not in free}
        assert not of, f"{sorted(path.name for path in of)} import each other"


def test_figures_know_nothing_of_what_computes_results():
    for path in files("figures"):
        assert imports(path) <= {"figures", "runtime"}, path


def test_estimators_programs_and_variance_know_nothing_of_vaes():
    for room in ("estimators", "programs", "variance"):
        for path in files(room):
            assert imports(path) <= {"estimators", "programs", "variance", "runtime"}, path


@pytest.mark.parametrize(
    ("module", "base", "registry"),
    [
        (likelihoods, likelihoods.Likelihood, likelihoods.LIKELIHOODS),
        (networks, networks.Network, networks.NETWORKS),
        (guides, guides.Guide, guides.GUIDES),
        (estimators, estimators.Estimator, estimators.ESTIMATORS),
    ],
)
def test_registries_hold_every_family(module, base, registry):
    classes = [c for c in vars(module).values() if isinstance(c, type) and not isinstance(c, GenericAlias)]
    families = {c for c in classes if issubclass(c, base) and not inspect.isabstract(c)}
    ours = {entry for entry in registry.values() if entry.__module__.startswith("pyrovae.")}  # not a user's own
    assert ours == families
    assert inspect.isabstract(base)


@pytest.mark.parametrize(
    "entry",
    [
        *likelihoods.LIKELIHOODS.values(),
        *networks.NETWORKS.values(),
        *guides.GUIDES.values(),
        *estimators.ESTIMATORS.values(),
        *DATASETS.values(),
    ],
)
def test_every_entry_says_what_it_is_in_one_line(entry):
    first = inspect.getdoc(entry).splitlines()[0]
    assert first.endswith(".")


@pytest.mark.parametrize("name", pyrovae.__all__)
def test_public_names_exist(name):
    assert getattr(pyrovae, name) is not None
    assert name in dir(pyrovae)


@pytest.mark.parametrize("module", FLOOR_OF)
def test_modules_are_at_hand_without_another_import(module):
    assert inspect.ismodule(getattr(pyrovae, module))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = pyrovae.nothing

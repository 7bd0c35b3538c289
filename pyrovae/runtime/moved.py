"""The names that modules had before they lay in packages, so that what imports them goes on working."""

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {
    "annealing": "evaluation.annealing",
    "assessment": "runs.assessment",
    "bias": "variance.bias",
    "buffers": "runtime.buffers",
    "cell": "cli.cell",
    "checkpoints": "training.checkpoints runtime.random_states",
    "checks": "guides.checks",
    "commands": "cli",
    "comparison": "variance.comparison",
    "config": "runs.config",
    "distributed": "runtime.distributed",
    "distributions": "guides.distributions",
    "evidence": "evaluation.evidence",
    "files": "data.files",
    "folders": "data.folders",
    "graphs": "programs.graphs",
    "inputs": "runtime.inputs",
    "intervals": "variance.intervals",
    "laboratory": "runs.laboratory",
    "locks": "runtime.locks",
    "optimizers": "runtime.optimizers",
    "pairs": "programs.pairs",
    "pareto": "evaluation.pareto",
    "parts": "runtime.parts",
    "per_draw": "variance.per_draw",
    "pictures": "runs.pictures",
    "processes": "runtime.processes",
    "references": "programs.references",
    "run_directories": "runs.directories",
    "schemas": "runtime.schemas",
    "signals": "runtime.signals",
    "sizes": "runtime.sizes",
    "sweep": "runs.sweeps",
    "testbed": "variance.testbed",
    "texts": "runtime.texts",
    "versions": "runtime.versions",
    "weights": "evaluation.weights",
    "whole_files": "runtime.whole_files",
}


class Moved(MetaPathFinder, Loader):
    """Finds a module under its former name; both names mean the same module."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if _present(fullname) else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(_present(spec.name))
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = module.__spec__.loader_state  # which importing by the former name has just replaced


def _present(former: str) -> str:
    """The present name of a module, or "" if it has no other."""
    package, _, name = former.partition(".")
    first, dot, rest = name.partition(".")
    return f"{package}.{MOVED[first]}{dot}{rest}" if package == "pyrovae" and first in MOVED else ""


def install() -> None:
    """Makes the former names known to `import`, before others find the files of a package that moved."""
    if not any(isinstance(finder, Moved) for finder in sys.meta_path):
        sys.meta_path.insert(0, Moved())

"""The names that modules had before they lay in packages, so that what imports them goes on working.

A module that was divided comes back as one that has the names of all its parts.
"""

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
    "comparison": "variance.comparison variance.results variance.names variance.bench estimators.references",
    "config": "runs.config",
    "distributed": "runtime.distributed",
    "distributions": "guides.distributions",
    "estimators.score_function": "estimators.baselines estimators.codes",
    "evidence": "evaluation.importance evaluation.chains evaluation.chunks",
    "files": "data.files",
    "folders": "data.folders",
    "graphs": "programs.graphs",
    "graphs.denormals": "runtime.denormals",
    "inputs": "runtime.inputs",
    "intervals": "variance.intervals",
    "laboratory": "runs.laboratory",
    "locks": "runtime.locks",
    "optimizers": "runtime.optimizers",
    "pairs": "programs.pairs",
    "pareto": "evaluation.pareto",
    "parts": "runtime.parts",
    "per_draw": "variance.per_draw variance.passes variance.layers",
    "pictures": "runs.pictures",
    "processes": "runtime.processes",
    "references": "programs.references",
    "run_directories": "runs.directories",
    "schemas": "runtime.schemas",
    "signals": "runtime.signals",
    "sizes": "runtime.sizes",
    "sweep": "runs.sweeps",
    "testbed": "variance.testbed estimators.twins",
    "texts": "runtime.texts",
    "versions": "runtime.versions",
    "weights": "evaluation.weights",
    "whole_files": "runtime.whole_files",
}


class Moved(MetaPathFinder, Loader):
    """Finds a module under its former name. Both names mean the same module, unless it was divided."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if _present(fullname) else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        parts = [import_module(name) for name in _present(spec.name)]
        module = parts[0] if len(parts) == 1 else _joined(spec.name, parts)
        spec.loader_state = module.__spec__ or spec
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = module.__spec__.loader_state  # which importing by the former name has just replaced


def _present(former: str) -> list[str]:
    """The present names of a module, if it has others: of a package's module, also by the package's name."""
    package, _, name = former.partition(".")
    first, dot, rest = name.partition(".")
    if package != "pyrovae":
        return []
    present = MOVED[name].split() if name in MOVED else [f"{MOVED[first]}{dot}{rest}"] if first in MOVED else []
    return [f"pyrovae.{place}" for place in present]


def _joined(name: str, parts: list[ModuleType]) -> ModuleType:
    """A module in which names are looked up in several."""
    joined = ModuleType(name, parts[0].__doc__)

    def get(attribute: str) -> Any:
        for part in parts:
            if hasattr(part, attribute):
                return getattr(part, attribute)
        raise AttributeError(f"module {name!r} has no attribute {attribute!r}")

    joined.__getattr__ = get
    return joined


def install() -> None:
    """Makes the former names known to `import`, before others find the files of a package that moved."""
    if not any(isinstance(finder, Moved) for finder in sys.meta_path):
        sys.meta_path.insert(0, Moved())

"""The one door through which a name, `package.module:Class`, becomes a class of one's own.

To import a module is to run it. A name that was read from a file (see Received) is therefore resolved only if
its module is pyrovae's, if the program has imported it already, or if the caller says so by `trust`. A name
that the caller wrote, in a program or on the command line, is its own consent. Nothing is ever imported
from within the directory of a run or a sweep, which may come from anybody.
"""

import contextlib
import inspect
import json
import os
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from pyrovae.runtime.errors import FieldError

T = TypeVar("T")
PACKAGE = __name__.partition(".")[0]
OF_RUN = ("checkpoint.pt", "best.pt", "metrics.jsonl")  # what lies beside a run's config.json


class Received(str):
    """A name that was read from a file, and that nobody who can consent has written.

    Copies of settings keep it as it is, so that no way through the program turns it into consent.
    """

    __slots__ = ()


class TrustError(ValueError):
    """A part is foreign code, which nobody has consented to import.

    Attributes:
        found: What it is, and what to do.
    """

    def __init__(self, expected: str, found: str):
        super().__init__(f"expected {expected}, got {found}")
        self.found = found


class TrustWarning(UserWarning):
    """Something was left out, since it needs foreign code that nobody has consented to import."""


def is_foreign(name: str) -> bool:
    """Whether a name stands for a class outside of pyrovae."""
    return ":" in name and not _is_ours(name.partition(":")[0])


def find(kind: str, name: str, base: type[T], *, trust: bool = False) -> type[T]:
    """The class that a name stands for.

    Args:
        kind: What the class is for, in words: a guide, say.
        name: `package.module:Class`; the class is defined in the module or imported there.
        base: What it must be a subclass of.
        trust: Whether a module may be imported that only a file names.

    Raises:
        TrustError: The name is Received, its module is foreign and not imported, and `trust` is False.
        ValueError: The module cannot be imported or lies in a run, or has no such class.
    """
    module_name, _, class_name = name.partition(":")
    module = sys.modules.get(module_name)
    if module is None:
        if isinstance(name, Received) and not (trust or _is_ours(module_name)):
            raise TrustError(
                f"parts of {PACKAGE} alone",
                f"the {kind} {name!r}, which is foreign code: "
                "add --trust (in Python, trust=True) if you trust it",
            )
        module = _imported(kind, name, module_name)
    # pyrovae imports its names when they are asked for; a foreign module is asked for nothing.
    found = getattr(module, class_name, None) if _is_ours(module_name) else vars(module).get(class_name)
    if not (isinstance(found, type) and issubclass(found, base)) or inspect.isabstract(found):
        got = f"no {class_name!r} there" if found is None else f"{found!r}"
        needed = ", ".join(sorted(getattr(base, "__abstractmethods__", ())))
        raise FieldError(
            f"expected {kind} {name!r} to be a subclass of {PACKAGE}.{base.__name__} with {needed}, got {got}",
            field=kind,
        )
    return found


def in_a_line(error: BaseException) -> str:
    """What foreign code has raised, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def _is_ours(module_name: str) -> bool:
    return module_name.partition(".")[0] == PACKAGE


def _imported(kind: str, name: str, module_name: str) -> ModuleType:
    """Imports a module that is installed or lies in the current directory."""
    with _current_directory():
        try:
            places = _places(module_name)
            runs = {place: run for place in places if (run := run_around(place))}
            if not runs:
                return import_module(module_name)
        except (Exception, SystemExit) as error:  # whatever a foreign module raises
            raise FieldError(
                f"expected {kind} {name!r} in a module to import, got {in_a_line(error)}", field=kind
            ) from error
    place, run = next(iter(runs.items()))
    raise FieldError(
        f"expected {kind} {name!r} in a module outside of runs, got {place} in {run}: "
        "read it, and copy it elsewhere if you trust it",
        field=kind,
    )


@contextlib.contextmanager
def _current_directory() -> Iterator[None]:
    """Lets modules be found in the current directory, after all others, unless it is one of a run."""
    here = None
    with contextlib.suppress(FileNotFoundError):  # it was deleted
        here = os.getcwd()
    if here is None or here in sys.path or run_around(here):
        yield
        return
    sys.path.append(here)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(here)


def _places(module_name: str) -> list[str]:
    """The files and folders of a module and of the packages around it, found without running any of them.

    `importlib.util.find_spec` would import the packages.

    Raises:
        ModuleNotFoundError: There is no such module.
    """
    places: list[str] = []
    path = None
    names = module_name.split(".")
    for count, name in enumerate(names, start=1):
        whole = ".".join(names[:count])
        if not name.isidentifier() or (count > 1 and path is None):
            raise ModuleNotFoundError(f"No module named {whole!r}")
        if sys.modules.get(whole) is not None:
            path = getattr(sys.modules[whole], "__path__", None)
            continue
        spec = None
        for finder in sys.meta_path:
            # A package without a file would look for its parent among imported modules: by its last name alone
            # it does not.
            sought = name if finder is PathFinder else whole
            spec = finder.find_spec(sought, path) if hasattr(finder, "find_spec") else None
            if spec is not None:
                break
        if spec is None:
            raise ModuleNotFoundError(f"No module named {whole!r}")
        path = spec.submodule_search_locations and list(spec.submodule_search_locations)
        places += [*([spec.origin] if spec.has_location else []), *(path or [])]
    return places


def run_around(place: str | Path) -> Path | None:
    """The run or sweep in whose directory a file or folder lies, by its name or by its links, if in any."""
    for path in (Path(os.path.abspath(place)), Path(os.path.realpath(place))):
        for folder in (path, *path.parents):
            if _is_run(folder):
                return folder
    return None


def _is_run(folder: Path) -> bool:
    settings = folder / "config.json"
    if settings.is_file():
        if any((folder / name).exists() for name in OF_RUN):
            return True
        with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):
            return json.loads(settings.read_bytes()).keys() >= {"config", "data"}
    return (folder / "sweep.json").is_file() and (folder / "cells").is_dir()

"""What stands in classes: the package that a class is of, its slots, and the functions behind its members."""

import functools
import types
from typing import Any


def package_of(kind: type) -> str:
    """The name of the package that a class is of."""
    return str(kind.__module__).partition(".")[0]


def slots_of(kind: type, value: Any) -> list[str]:
    """The names of the slots of a class that have a value in an object."""
    names = vars(kind).get("__slots__", ())
    return [name for name in ([names] if isinstance(names, str) else names) if hasattr(value, name)]


def function_of(member: Any) -> Any:
    """The function behind what stands in a class, if it is one; None if it is not."""
    for kind, name in _BEHIND.items():
        if isinstance(member, kind):
            return getattr(member, name) if name else member
    return None


_BEHIND = {
    types.FunctionType: "",
    property: "fget",
    staticmethod: "__func__",
    classmethod: "__func__",
    functools.cached_property: "func",
}

"""What a function's bytecode does with what it names: the attributes that it reads, calls and sets, of what."""

import dis
import functools
import types
from dataclasses import dataclass, field

_MORE = (
    "CACHE",
    "COPY",
    "DUP_TOP",
    "EXTENDED_ARG",
    "PUSH_NULL",
    "RESUME",
)  # these leave the object at hand as it is


@dataclass
class Access:
    """How some code uses an object.

    Attributes:
        parts: The attributes that it reads or calls, and how it uses them.
        stored: The attributes that it sets.
        called: Whether it calls it as a method, and does nothing else with it.
        loose: Whether it does anything with the object itself: passes it on, calls it, looks into it. Other
            code may then use any attribute.
    """

    parts: dict[str, "Access"] = field(default_factory=dict)
    stored: set[str] = field(default_factory=set)
    called: bool = False
    loose: bool = False

    def part(self, name: str, *, called: bool = False) -> "Access":
        """The access to an attribute."""
        self.called = False
        if name not in self.parts:
            self.parts[name] = Access(called=called)
        self.parts[name].called &= called
        return self.parts[name]

    def merge(self, other: "Access") -> None:
        """Adds what other code does with the same object."""
        self.loose |= other.loose
        self.called &= other.called
        self.stored |= other.stored
        for name, access in other.parts.items():
            self.part(name, called=access.called).merge(access)


LOOSE = Access(loose=True)


class Names:
    """Names of attributes of objects that are not known: of arguments, of results, of what is in containers."""

    def __init__(self) -> None:
        self.read: set[str] = set()
        self.called: set[str] = set()
        self.stored: set[str] = set()

    def __len__(self) -> int:
        return len(self.read) + len(self.called) + len(self.stored)

    def add(self, access: Access) -> None:
        """Adds all names in an access to an object that is not known."""
        self.stored |= access.stored
        for name, part in access.parts.items():
            (self.called if part.called else self.read).add(name)
            self.add(part)

    def update(self, other: "Names") -> None:
        """Adds those that other code names."""
        self.read |= other.read
        self.called |= other.called
        self.stored |= other.stored


@dataclass
class Code:
    """What is known of some code, with the functions inside it.

    Attributes:
        variables: How it uses its arguments, its other variables, and those of the functions around it.
        named: How it uses globals.
        names: Attributes of other objects.
    """

    variables: dict[str, Access] = field(default_factory=dict)
    named: dict[str, Access] = field(default_factory=dict)
    names: Names = field(default_factory=Names)


@functools.lru_cache(maxsize=4096)
def read_code(code: types.CodeType) -> Code:
    """Reads the bytecode of a function."""
    found = Code()
    unknown, now = Access(), None  # `now`: how the object is used that was pushed last
    for step in dis.get_instructions(code):
        kind = step.opname
        if kind in _MORE:
            continue
        if kind in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
            name, called = step.argval, kind == "LOAD_METHOD" or "NULL|self" in step.argrepr
            if kind == "LOAD_SUPER_ATTR":
                now = _of_self(code, found)
            now = (unknown if now is None else now).part(name, called=called)
            continue
        if kind == "STORE_ATTR":
            (unknown if now is None else now).stored.add(step.argval)
        elif now is not None:
            now.loose = True
        now = None
        variables = next((of for word, of in _variables(found).items() if kind.startswith(word)), None)
        if variables is not None:
            *first, last = step.argval if isinstance(step.argval, tuple) else (step.argval,)
            for name in first:  # of two that are pushed at once
                variables.setdefault(name, Access()).loose = True
            now = variables.setdefault(last, Access())
    if "super" in found.named:  # what it names of that, it may have from its own object
        _of_self(code, found).merge(unknown)
    if found.named.keys() & {"getattr", "hasattr", "attrgetter"}:
        for name in filter(str.isidentifier, (c for c in code.co_consts if isinstance(c, str))):
            unknown.part(name)
    found.names.add(unknown)
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            _add_inner(found, inner)
    return found


def _variables(found: Code) -> dict[str, dict[str, Access]]:
    """Where the variable belongs that an instruction pushes, by how its name begins."""
    of_function = dict.fromkeys(("LOAD_FAST", "LOAD_DEREF", "LOAD_CLASSDEREF"), found.variables)
    return of_function | dict.fromkeys(("LOAD_GLOBAL", "LOAD_NAME"), found.named)


def _of_self(code: types.CodeType, found: Code) -> Access:
    name = code.co_varnames[0] if code.co_argcount else "self"
    return found.variables.setdefault(name, Access())


def _add_inner(found: Code, inner: types.CodeType) -> None:
    """Adds what a function inside does: with variables around it, with globals, and with anything else."""
    read = read_code(inner)
    for name, access in read.variables.items():
        if name in inner.co_freevars:
            found.variables.setdefault(name, Access()).merge(access)
        else:
            found.names.add(access)
    for name, access in read.named.items():
        found.named.setdefault(name, Access()).merge(access)
    found.names.update(read.names)

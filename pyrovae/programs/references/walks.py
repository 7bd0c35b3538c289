"""The walk from programs to all that they refer to."""

import functools
import random
import sys
import types
from collections import deque
from collections.abc import Iterable, Mapping
from functools import singledispatchmethod
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyrovae.programs.references.code import LOOSE, Access, Names, read_code
from pyrovae.programs.references.members import function_of, package_of, slots_of
from pyrovae.programs.references.places import EMPTY, PLAIN, Attributes, Inherited, Place

MOST_OBJECTS = 10_000  # that a walk visits
MOST_ITEMS = 1_000  # of a container that a walk looks at
_OPEN = {"torch", "pyro"}  # every attribute of their objects counts, because their code is not read
_UNREAD = {*sys.stdlib_module_names, *_OPEN, "numpy", "scipy", "jaxtyping", "beartype"}
_FIXED = {*_UNREAD, "pyrovae"}  # nobody rebinds their globals and the attributes of their classes
_OURS = "pyrovae.programs"  # whose own state does not matter to programs
_IMPLIED = ("__call__", "__getattr__", "__getitem__", "__iter__", "__len__", "__enter__", "forward")
_OF_MODULES = vars(nn.Module()).keys() - {"training"}  # where PyTorch keeps what a module is made of
_PARTS = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
_SHARED = (random.random.__self__, np.random.rand.__self__)  # generators behind functions of their modules


class Walk:
    """One walk from some programs, with the names of attributes that code is known to use of any object.

    Args:
        roots: The programs.
        names: The names. Those that are found on the way are added.

    Attributes:
        modules, generators, tensors, arrays: As in `References`.
        places, whole: The same, by what they are.
    """

    def __init__(self, roots: list[Any], names: Names):
        self.names = names
        self._heads = {function for root in roots for function in _heads(root)}
        self.modules: list[nn.Module] = []
        self.generators: list[Any] = []
        self.tensors: list[Tensor] = []
        self.arrays: list[np.ndarray] = []
        self.places: dict[tuple[int, Any], Place] = {}
        self.whole: dict[int, Place] = {}
        self._seen: dict[tuple[int, ...], Any] = {}
        self._queue = deque((root, Place(None, None, type(root).__name__), LOOSE) for root in roots)
        follow = self._follow  # which functools makes anew each time that it is asked for
        while self._queue:
            value, place, access = self._queue.popleft()
            if not isinstance(value, PLAIN) and self._is_new(value, access):
                follow(value, place, access)

    def _is_new(self, *values: Any) -> bool:
        key = tuple(map(id, values))
        if key in self._seen or len(self._seen) >= MOST_OBJECTS:
            return False
        self._seen[key] = values  # which keeps their numbers theirs
        return True

    def _add(self, place: Place, access: Access = LOOSE) -> None:
        known = self.places.get(place.identity)
        if known is None or (place.read and not known.read):
            self.places[place.identity] = place
        self._queue.append((place.value(), place, access))

    def _add_items(self, container: Any, via: Place) -> None:
        self.whole[id(container)] = Place(container, None, via.label, own=via.own, private=via.private)
        for key in islice(container if isinstance(container, dict) else range(len(container)), MOST_ITEMS):
            self._add(Place(container, key, f"{via.label}[{key!r}]", own=via.own, private=via.private))

    def _also(self, values: Iterable[Any], via: Place, access: Access = LOOSE) -> None:
        self._queue.extend((value, via, access) for value in values)

    def _accesses(self, access: Access, values: Mapping[str, Any]) -> dict[str, Access | None]:
        """How these attributes of an object are used; None for what is set alone."""
        found: dict[str, Access | None] = dict.fromkeys(access.stored & values.keys())
        if access.loose:
            named = values.keys() & (self.names.read | self.names.called | self.names.stored)
            for name in named:
                read = name in self.names.read or (name in self.names.called and callable(values[name]))
                if read or name in self.names.stored:
                    found[name] = LOOSE if read else None
        found |= {name: part for name, part in access.parts.items() if name in values}
        return {name: found[name] for name in sorted(found) if not name.startswith("__")}

    def _add_attributes(
        self, container: Any, values: Mapping[str, Any], access: Access, of: str, *, own: bool = True
    ) -> None:
        """Adds those attributes of an object, standing in a container, that some code uses."""
        for name, part in self._accesses(access, values).items():
            place = Place(container, name, f"{name!r} of {of}", part is not None, own, name.startswith("_"))
            self._add(place, part or Access())

    def _add_class(self, kind: type, owner: Any, access: Access, via: Place) -> None:
        """Adds what an object has from its class, as far as some code uses it: attributes and methods."""
        inherited: dict[str, Any] = {}
        for base in kind.__mro__:
            if package_of(base) in _UNREAD:
                continue
            members = vars(base)
            used = {*access.parts, *(_IMPLIED if access.loose else ())}
            used |= members.keys() & (self.names.read | self.names.called) if access.loose else set()
            for name in sorted(members.keys() & used):
                if function_of(members[name]) is not None:
                    self._add_method(members[name], owner, access.parts.get(name, LOOSE), via)
            if package_of(base) not in _FIXED:
                inherited = {n: v for n, v in members.items() if function_of(v) is None} | inherited
        its_own = {} if isinstance(owner, type) else getattr(owner, "__dict__", {})
        missing = {name: value for name, value in inherited.items() if name not in its_own}
        self._add_attributes(Inherited(owner), missing, access, kind.__name__)

    def _add_method(self, member: Any, owner: Any, access: Access, via: Place) -> None:
        if isinstance(member, classmethod):
            owner = owner if isinstance(owner, type) else type(owner)
        function = function_of(member)
        if isinstance(function, types.FunctionType):
            self._add_function(function, EMPTY if isinstance(member, staticmethod) else owner, via)
        else:
            self._also([function], via, access)

    def _add_function(self, function: types.FunctionType, owner: Any, via: Place) -> None:
        """Adds what a function's code uses.

        Args:
            owner: What its first argument is; an empty mark where that is not known.
        """
        if not self._is_new(function, owner, via.own):
            return
        cells = {
            name: Place(Attributes(cell), "cell_contents", f"{name!r} in a closure")
            for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        }
        inner = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        module = function.__globals__.get("__name__", "")
        if _is_unread(module) and function not in self._heads:
            inner += [*vars(function).values(), *(cell.value() for cell in cells.values())]
            for content in filter(callable, inner):  # what it wraps, if it does
                if isinstance(content, types.FunctionType):
                    self._add_function(content, owner, via)
                else:
                    self._also([content], via)
            self._also([owner], via)
            return
        code = read_code(function.__code__)
        self.names.update(code.names)
        first = function.__code__.co_varnames[:1]
        for name, access in code.variables.items():
            if name in cells:
                self._add(cells[name], access)
            elif name in first and owner is not EMPTY:
                self._also([owner], via, access)
            else:
                self.names.add(access)
        for name, access in code.named.items():
            if name in function.__globals__:
                content = function.__globals__[name]
                if module.partition(".")[0] in _FIXED or isinstance(content, types.ModuleType):
                    self._also([content], via, access)
                else:
                    self._add(Place(function.__globals__, name, f"the global {name!r}"), access)
        self._also([*inner, getattr(function, "__wrapped__", None)], via)

    @singledispatchmethod
    def _follow(self, value: Any, via: Place, access: Access) -> None:
        """Goes on from an object of no special kind."""
        kind, package, values = type(value), package_of(type(value)), getattr(value, "__dict__", {})
        if package in _OPEN:
            for name in values:
                self._add(Place(values, name, f"{name!r} of {kind.__name__}", own=False))
            return
        slots = {name: getattr(value, name) for base in kind.__mro__ for name in slots_of(base, value)}
        for container, content in ((values, values), (Attributes(value), slots)):
            self._add_attributes(container, content, access, kind.__name__, own=package != "pyrovae")
        self._add_class(kind, value, access, via)
        self._also([values.get("__wrapped__")], via)

    @_follow.register
    def _(self, value: types.FunctionType, via: Place, access: Access) -> None:
        self._add_function(value, EMPTY, via)
        self._add_attributes(vars(value), vars(value), access, value.__name__)

    @_follow.register
    def _(self, value: types.MethodType, via: Place, access: Access) -> None:
        if isinstance(value.__func__, types.FunctionType):
            self._add_function(value.__func__, value.__self__, via)
        else:
            self._also([value.__self__], via)

    @_follow.register
    def _(self, value: types.BuiltinMethodType, via: Place, access: Access) -> None:
        self._also([value.__self__], via)

    @_follow.register
    def _(self, value: functools.partial, via: Place, access: Access) -> None:
        self._also([value.func, *value.args], via)
        self._add_items(value.keywords, via)

    @_follow.register(list)
    @_follow.register(deque)
    @_follow.register(dict)
    def _(self, value: Any, via: Place, access: Access) -> None:
        self._add_items(value, via)

    @_follow.register(tuple)
    @_follow.register(set)
    @_follow.register(frozenset)
    def _(self, value: Any, via: Place, access: Access) -> None:
        self._also(islice(value, MOST_ITEMS), via)

    @_follow.register
    def _(self, value: nn.Module, via: Place, access: Access) -> None:
        kind, values, own = type(value), vars(value), package_of(type(value)) not in _FIXED
        if self._is_new(value):
            self.modules.append(value)
            for part in _PARTS:
                label = f"the {part.strip('_')} of {kind.__name__}"
                self.whole[id(values.get(part))] = Place(values.get(part, {}), None, label, own=own)
                for name in values.get(part, ()):
                    self._add(Place(values[part], name, f"{name!r} of {kind.__name__}", own=own))
            for name in values.keys() - _OF_MODULES:
                private = name.startswith("_")
                self._add(Place(values, name, f"{name!r} of {kind.__name__}", own=own, private=private))
        self._add_class(kind, value, access, via)

    @_follow.register
    def _(self, value: type, via: Place, access: Access) -> None:
        self._add_class(value, value, access, via)
        for base in value.__mro__ if access.loose else ():
            if package_of(base) not in _UNREAD and "__init__" in vars(base):
                self._add_method(vars(base)["__init__"], Access(), LOOSE, via)  # of an object that is new

    @_follow.register
    def _(self, value: types.ModuleType, via: Place, access: Access) -> None:
        if value.__name__.partition(".")[0] not in _FIXED:
            self._add_attributes(vars(value), vars(value), access, value.__name__)

    @_follow.register
    def _(self, value: Tensor, via: Place, access: Access) -> None:
        if self._is_new(value):
            self.tensors.append(value)

    @_follow.register
    def _(self, value: np.ndarray, via: Place, access: Access) -> None:
        if self._is_new(value):
            self.arrays.append(value)

    @_follow.register(random.Random)
    @_follow.register(np.random.Generator)
    @_follow.register(np.random.RandomState)
    @_follow.register(torch.Generator)
    def _(self, value: Any, via: Place, access: Access) -> None:
        has_state = not isinstance(value, random.SystemRandom) and value not in _SHARED
        if has_state and self._is_new(value):
            self.generators.append(value)


def _heads(root: Any) -> Iterable[types.FunctionType]:
    """The functions that a root is, and wraps: they are read wherever they are from."""
    function = getattr(root, "__func__", root)
    while isinstance(function, types.FunctionType):
        yield function
        function = getattr(function, "__wrapped__", None)


def _is_unread(module: str) -> bool:
    return module.partition(".")[0] in _UNREAD or module.startswith(_OURS)

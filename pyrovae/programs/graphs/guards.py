"""What a graph holds for besides its arguments: everything that a function refers to, as it is now."""

import pickle
from collections.abc import Collection, Iterable
from itertools import compress
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn

from pyrovae.programs.references import Place, References, same

LARGEST_ARRAY = 4096  # bytes of a numpy array whose contents are watched


class Guards:
    """Tells the states apart in which a function's surroundings are.

    Settings count by their values; tensors by which they are, and by their shapes, types, devices and hooks;
    modules, functions and other objects by which they are and by what they hold.

    Args:
        roots: The function, and whatever else it is known to use.
    """

    def __init__(self, *roots: Any):
        self.roots = list(roots)
        self.left: dict[tuple[int, Any], Place] = {}  # what is not watched
        self.states: list[_State] = []
        self.last: _State | None = None

    def state(self) -> int:
        """The number of the present state: equal numbers mean that nothing has changed that is watched."""
        if self.last is None or not self.last.stands():
            self.last = next((state for state in self.states if state.equals()), None) or self._found()
        return self.last.number

    @property
    def references(self) -> References:
        """All that the function refers to in the present state."""
        self.state()
        return self.last.references

    def look(self, modules: Iterable[nn.Module] = ()) -> None:
        """Finds out anew what the function refers to: perhaps more than before in the same state.

        Args:
            modules: Modules that it was seen to use. They are watched from now on.
        """
        known = {id(module) for module in (*self.roots, *self.references.modules)}
        self.roots += [module for module in modules if id(module) not in known]
        self.last = self._found()

    def leave(self, places: Iterable[Place]) -> None:
        """Watches these places no longer."""
        self.left |= {place.identity: place for place in places}
        for state in self.states:
            state.leave(self.left.keys())

    def _found(self) -> "_State":
        found = _State(References(self.roots), len(self.states))
        found.leave(self.left.keys())
        for state in self.states:
            if state.identities == found.identities and state.equals():
                return state
        self.states.append(found)
        return found


class _State:
    """One state, in a form that is quickly compared with the present one."""

    def __init__(self, references: References, number: int):
        self.references, self.number = references, number
        self.watched = [place for place in references.places if place.read]
        self.values = [place.value() for place in self.watched]
        self.whole = references.whole
        self.sizes = [len(place.container) for place in self.whole]
        self.tensors = [t for t in references.tensors if t.grad_fn is None and t.layout is torch.strided]
        self.arrays = [array for array in references.arrays if array.nbytes <= LARGEST_ARRAY]
        self.looks = self._looks()
        self.leave(())

    def leave(self, identities: Collection[tuple[int, Any]]) -> None:
        """Watches these places no longer."""
        kept = [place.identity not in identities for place in self.watched]
        self.watched, self.values = list(compress(self.watched, kept)), list(compress(self.values, kept))
        kept = [place.identity not in identities for place in self.whole]
        self.whole, self.sizes = list(compress(self.whole, kept)), list(compress(self.sizes, kept))
        self.places = [(place.container, place.key) for place in self.watched]
        self.containers = [place.container for place in self.whole]
        self.identities = [place.identity for place in (*self.watched, *self.whole)]

    def stands(self) -> bool:
        """Whether it is the present state: the very same objects stand everywhere."""
        values = self._values()
        return values is not None and all(map(is_, values, self.values)) and self._looks_the_same()

    def equals(self) -> bool:
        """Whether it is the present state, where settings of equal values stand for each other."""
        values = self._values()
        if values is None or not all(map(same, values, self.values)) or not self._looks_the_same():
            return False
        self.values = values
        return True

    def _values(self) -> list[Any] | None:
        try:
            return [container[key] for container, key in self.places]
        except (LookupError, AttributeError, ValueError):
            return None  # something is no longer there

    def _looks_the_same(self) -> bool:
        return [*map(len, self.containers)] == self.sizes and self._looks() == self.looks

    def _looks(self) -> list[Any]:
        """All that a graph depends on of tensors besides their numbers, and the contents of arrays."""
        return [
            *map(_look, self.tensors),
            *map(Tensor.stride, self.tensors),
            *map(len, filter(None, map(_hooks, self.tensors))),
            *map(pickle.dumps, self.arrays),
        ]


_look = attrgetter("requires_grad", "dtype", "device", "shape")
_hooks = attrgetter("_backward_hooks")

"""All that programs refer to: `References`."""

from collections.abc import Iterable
from typing import Any

from pyrovae.programs.references.code import Names
from pyrovae.programs.references.places import EMPTY, Place, Snapshot, copied, refill, same
from pyrovae.programs.references.walks import Walk


class References:
    """All that some programs refer to, at present.

    Args:
        roots: The programs: functions, methods, modules, other objects.

    Attributes:
        modules: In the order in which they were found.
        generators: Random generators that somebody made, of Python, numpy or PyTorch.
        tensors: All tensors.
        arrays: All arrays of numpy.
        places: Where the code finds what it works with, except for the items of tuples and sets.
        whole: Containers all of whose items count.
    """

    def __init__(self, roots: Iterable[Any]):
        roots, names, known = list(roots), Names(), -1
        while known < (known := len(names)):
            walk = Walk(roots, names)  # again, because code that came later may use any object that came before
        self.modules, self.generators = walk.modules, walk.generators
        self.tensors, self.arrays = walk.tensors, walk.arrays
        self.places, self.whole = list(walk.places.values()), list(walk.whole.values())

    def snapshot(self) -> Snapshot:
        """What stands at all places."""
        return [place.value() for place in self.places], [copied(place.container) for place in self.whole]

    def changes(self, before: Snapshot) -> list[Place]:
        """The places where something else stands by now, and the containers that grew or shrank."""
        values, contents = before
        return [
            *(p for p, value in zip(self.places, values, strict=True) if not same(p.value(), value)),
            *(p for p, content in zip(self.whole, contents, strict=True) if len(p.container) != len(content)),
        ]

    def restore(self, before: Snapshot, *, keep_new: bool = False) -> None:
        """Puts back what stood at all places.

        Args:
            keep_new: Whether to leave what has been made since: what stands where nothing or None stood, new
                items of dictionaries, and whatever a library's objects hold.
        """
        values, contents = before
        for place, content in zip(self.whole, contents, strict=True):
            kept = keep_new and (isinstance(content, dict) or not place.own)
            if len(place.container) != len(content) and not kept:
                refill(place.container, content)
        for place, value in zip(self.places, values, strict=True):
            kept = keep_new and (value is None or value is EMPTY or not place.own)
            if place.value() is not value and not kept:
                place.put(value)

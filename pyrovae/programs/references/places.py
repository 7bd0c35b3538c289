"""Places where programs find what they work with, and what it means that the same thing stands there."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

PLAIN = (bool, int, float, complex, str, bytes, type(None), np.generic, torch.dtype, torch.device, torch.Size)
Snapshot = tuple[list[Any], list[Any]]  # what stands at places, and copies of containers

EMPTY = object()


@dataclass(frozen=True)
class Place:
    """Where a value stands: `container[key]`; or a whole container, where the key is None.

    Attributes:
        label: The place in words.
        read: Whether some code reads it; if not, some code sets it.
        own: Whether it belongs to the programs, and not to an object of a library.
        private: Whether it is a private attribute or lies in one, where objects keep what they cache.
    """

    container: Any
    key: Any
    label: str
    read: bool = True
    own: bool = True
    private: bool = False

    @property
    def identity(self) -> tuple[int, Any]:
        """Equal for two descriptions of one place."""
        owner = self.container.owner if isinstance(self.container, Attributes) else self.container
        return id(owner), self.key

    def value(self) -> Any:
        """What stands there now, or a mark where nothing does."""
        try:
            return self.container[self.key]
        except (LookupError, AttributeError, ValueError):
            return EMPTY

    def put(self, value: Any) -> None:
        """Puts back what stood there before."""
        if value is not EMPTY:
            self.container[self.key] = value
        elif self.value() is not EMPTY:
            del self.container[self.key]


class Attributes:
    """An object's attributes, in the manner of a dictionary."""

    def __init__(self, owner: Any):
        self.owner = owner

    def __getitem__(self, name: str) -> Any:
        return getattr(self.owner, name)

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self.owner, name, value)

    def __delitem__(self, name: str) -> None:
        delattr(self.owner, name)


class Inherited(Attributes):
    """Attributes that an object has from its class, unless somebody gives it one of its own."""

    def __setitem__(self, name: str, value: Any) -> None:
        vars(self.owner).pop(name, None)
        if getattr(self.owner, name, EMPTY) is not value:
            kind = self.owner if isinstance(self.owner, type) else type(self.owner)
            setattr(next(base for base in kind.__mro__ if name in vars(base)), name, value)


def is_plain(value: Any) -> bool:
    """Whether a value never changes and has no parts but such values."""
    return isinstance(value, PLAIN) or (type(value) is tuple and all(map(is_plain, value)))


def same(a: Any, b: Any) -> bool:
    """Whether two settings are the same to a program: one object, or plain values equal to the last bit."""
    return a is b or (type(a) is type(b) and is_plain(a) and repr(a) == repr(b))


def copied(container: Any) -> Any:
    """A copy of a container, of which its items are the same."""
    return dict(container) if isinstance(container, dict) else list(container)


def refill(container: Any, content: Any) -> None:
    """Gives a container back what it held."""
    container.clear()
    (container.update if isinstance(container, dict) else container.extend)(content)

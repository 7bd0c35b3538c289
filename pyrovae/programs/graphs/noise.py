"""Where a function's noise comes from: all random generators, before and after it has run."""

import pickle
import random
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from pyrovae.runtime.random_states import all_random_states, set_all_random_states

_FAMILIES: dict[type, tuple[Callable[[Any], Any], Callable[[Any, Any], Any]]] = {
    random.Random: (random.Random.getstate, random.Random.setstate),
    np.random.RandomState: (np.random.RandomState.get_state, np.random.RandomState.set_state),
    np.random.Generator: (
        lambda generator: generator.bit_generator.state,
        lambda generator, state: setattr(generator.bit_generator, "state", state),
    ),
    torch.Generator: (
        lambda generator: generator.get_state().numpy().tobytes(),
        lambda generator, state: generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8)),
    ),
}
_LIBRARIES = {"python": "Python's random module", "numpy": "numpy's random module"}
RESEEDED = {_LIBRARIES["python"]: random.seed, _LIBRARIES["numpy"]: np.random.seed}


class Noise:
    """The present states of all random generators: PyTorch's, Python's, numpy's, and some that somebody made.

    Args:
        generators: Those that somebody made.
    """

    def __init__(self, generators: Iterable[Any]):
        self.states = all_random_states()
        self.made = [(generator, _family(generator)[0](generator)) for generator in generators]

    def restore(self) -> None:
        """Sets all generators back to where they were."""
        set_all_random_states(self.states)
        for generator, state in self.made:
            _family(generator)[1](generator, state)

    def restore_torch(self) -> None:
        """Sets PyTorch's default generators back to where they were."""
        set_all_random_states(self.states | {name: all_random_states()[name] for name in _LIBRARIES})

    def now(self) -> "Noise":
        """The states of the same generators now."""
        return Noise(generator for generator, _ in self.made)

    def drawn(self, later: "Noise") -> list[str]:
        """What has been drawn from since that a graph does not draw from, in words."""
        made = zip(self.made, later.made, strict=True)
        return [
            *(words for name, words in _LIBRARIES.items() if self.states[name] != later.states[name]),
            *(
                f"a {type(generator).__module__.split('.')[0]} generator of its own"
                for (generator, before), (_, after) in made
                if pickle.dumps(before) != pickle.dumps(after)
            ),
        ]

    def equals(self, other: "Noise") -> bool:
        """Whether PyTorch's default generators, on each device, stand where they stood."""
        names = self.states.keys() - _LIBRARIES.keys()
        return names == other.states.keys() - _LIBRARIES.keys() and all(
            torch.equal(self.states[name], other.states[name]) for name in names
        )


def _family(generator: Any) -> tuple[Callable[[Any], Any], Callable[[Any, Any], Any]]:
    return next(functions for kind, functions in _FAMILIES.items() if isinstance(generator, kind))

"""`Capture`: a function that runs as compiled graphs, each watched and compared with the function."""

import contextlib
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator
from itertools import compress
from typing import Any

import torch
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor

from pyrovae.programs.graphs.comparisons import NotCaptured, compare
from pyrovae.programs.graphs.guards import Guards
from pyrovae.programs.graphs.noise import RESEEDED, Noise
from pyrovae.programs.graphs.traces import Backend, Graph, inductor
from pyrovae.programs.pairs import clones, copy, device_of, unchanged, unchanged_buffers
from pyrovae.programs.references import Place, References, Snapshot, is_plain
from pyrovae.runtime.texts import first_line

MOST_GRAPHS = 16
CHECKED = 2  # first calls of each graph that are compared with the function; then one at each doubling
LOOSER = 10  # how many times more the later ones may be off by rounding


class CaptureWarning(UserWarning):
    """Something runs uncompiled, and why."""


class Capture:
    """A function of tensors that runs as a compiled graph.

    What the function refers to is watched: settings, modules, containers, and tensors that are exchanged. When
    something changes, the function gets another graph. Each graph is also compared with the function, at its
    calls number 1, 2, 4, 8 and so on; such a call takes as long as the function and the graph together. A
    function that draws from other generators than PyTorch's default ones, or that changes anything but tensors,
    is not captured. Nor is a call inside one of Pyro's handlers.

    Args:
        function: Takes tensors and plain values, and returns a tuple of tensors and of whatever else holds for
            a whole trace. It may draw noise, take gradients by `torch.autograd.grad`, and change tensors in
            place, except for its arguments. What it does must not depend on the values of tensors.
        owners: Further modules and objects that are watched.
        apart: The number of leading tensors among its results that are compared each on its own scale. The
            others are compared on the scale of their largest number.
        backend: What compiles a graph, given its inputs.

    Attributes:
        reason: Why the function runs uncompiled, or "".
        due: Whether the next call is compared with the function, whatever its number.

    Warns:
        CaptureWarning: The function runs uncompiled.
    """

    def __init__(
        self,
        function: Callable[..., tuple],
        owners: Iterable[object] = (),
        *,
        apart: int = 0,
        backend: Backend = inductor,
    ):
        self.function, self.apart, self.backend = function, apart, backend
        self.guards = Guards(function, *owners)
        self.graphs: dict[Hashable, Graph] = {}
        self.reason, self.due, self.wrapped = "", False, False
        self.idle: set[str] = set()  # random modules that the function draws from to no effect

    def __call__(self, *args: Any, **kwargs: Any) -> tuple:
        if not self.reason and not self._is_wrapped():
            kwargs = dict(sorted(kwargs.items())) if kwargs else kwargs
            try:
                graph = self.graphs.get(self.key(args, kwargs)) or self._trace(args, kwargs)
            except NotCaptured as error:
                self._give_up(str(error))
            else:
                graph.calls += 1
                if self._is_due(graph):
                    return self._checked(graph, args, kwargs)
                return graph(args, kwargs)
        return self.function(*args, **kwargs)

    def key(self, args: tuple, kwargs: dict[str, Any] | None = None) -> Hashable:
        """What a graph holds for: the kinds of the arguments, the state of all that is watched, and modes."""
        kinds = [_kind(arg) for arg in args]
        if kwargs:
            kinds += [(name, _kind(arg)) for name, arg in kwargs.items()]
            args = (*args, *kwargs.values())
        device = device_of(args).type
        modes = (
            torch.is_autocast_enabled(device),
            torch.get_autocast_dtype(device),
            torch.get_num_threads(),
            torch.get_default_dtype(),
        )
        return tuple(kinds), self.guards.state(), modes

    def _trace(self, args: tuple, kwargs: dict[str, Any]) -> Graph:
        if len(self.graphs) == MOST_GRAPHS:
            raise NotCaptured(
                f"arguments and settings came in more than {MOST_GRAPHS} kinds: pass what changes as tensors"
            )
        references = self.guards.references
        before = references.snapshot()
        with self._restored(), unchanged_buffers() as called:
            self.function(*args, **kwargs)  # what it makes when it is first run is made before the trace
        references.restore(before, keep_new=True)
        self.guards.look(called)
        known = self.graphs.get(self.key(args, kwargs))
        if known:
            return known
        try:
            graph = self._graph(args, kwargs)
        except NotCaptured:
            references.restore(before)
            raise
        self.graphs[self.key(args, kwargs)] = graph
        return graph

    def _graph(self, args: tuple, kwargs: dict[str, Any]) -> Graph:
        references = self.guards.references
        before, noise = references.snapshot(), Noise(references.generators)
        try:
            with self._restored():
                graph = Graph(self.function, args, kwargs, self.backend)
                drawn = noise.drawn(noise.now())
                self._check_effects(references, before)
        finally:
            references.restore(before)  # from tensors of the trace, which hold no numbers
        self._check_noise(drawn, graph, args, kwargs)
        return graph

    def _is_due(self, graph: Graph) -> bool:
        """Whether a call is to be compared with the function."""
        if graph.calls > CHECKED and graph.calls & (graph.calls - 1) and not graph.doubted and not self.due:
            return False
        recorded = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
        return not recorded  # while a stream is recorded, no value can be looked at

    def _checked(self, graph: Graph, args: tuple, kwargs: dict[str, Any]) -> tuple:
        """The graph's results if they and its effects are the function's; else the function's."""
        self.due = False
        references = self.guards.references
        state = [*self._state(), *graph.written]
        before, standing, noise = clones(state), references.snapshot(), Noise(references.generators)
        expected = self.function(*args, **kwargs)
        after, noise_after = clones(state), noise.now()
        try:
            self._check_effects(references, standing)
            self._check_noise(noise.drawn(noise_after), graph, args, kwargs)
        except NotCaptured as error:
            self._give_up(str(error))
            return expected
        try:
            copy(before, state)
            noise.restore_torch()
            got = graph(args, kwargs)
            self._compare(graph, got, expected)
            self._compare_state(graph, state, before, after)
            if not noise.now().equals(noise_after):
                raise NotCaptured("its graph draws other noise")
        except Exception as error:  # of a compiled program, say
            copy(after, state)
            noise_after.restore()
            if graph.calls <= CHECKED:
                self._give_up(first_line(error))
            elif graph.doubted:  # twice in succession is no draw that rounding has decided
                unseen = "something that is not watched has changed"
                self._give_up(f"{first_line(error)}, at call {graph.calls}: {unseen}")
            graph.doubted = True
            return expected
        graph.doubted = False
        return got

    def _compare(self, graph: Graph, got: tuple, expected: tuple) -> None:
        ours, theirs = ([r for r in results if isinstance(r, Tensor)] for results in (got, expected))
        for number in range(self.apart):
            compare([ours[number]], [theirs[number]], self._tolerance(graph))
        compare(ours[self.apart :], theirs[self.apart :], self._tolerance(graph))

    def _compare_state(self, graph: Graph, state: list[Tensor], *held: list[Tensor]) -> None:
        """Compares the tensors that a run changes, given what they held before and after it."""
        three = zip(*held, state, strict=True)
        changed = [not (torch.equal(was, then) and torch.equal(then, now)) for was, then, now in three]
        compare(*(list(compress(tensors, changed)) for tensors in (state, held[1])), self._tolerance(graph))

    def _tolerance(self, graph: Graph) -> float:
        return graph.tolerance * (1 if graph.calls <= CHECKED else LOOSER)

    def _check_effects(self, references: References, before: Snapshot) -> None:
        """Checks that a run of the function has changed nothing but tensors.

        What an object keeps for itself may change, a cache for instance, and is watched no longer.

        Raises:
            NotCaptured: It has.
        """
        changed = references.changes(before)
        for place in changed:
            if _is_seen(place):
                raise NotCaptured(f"it changes {place.label} when it runs: change a tensor in place")
        self.guards.leave(changed)

    def _check_noise(self, drawn: list[str], graph: Graph, args: tuple, kwargs: dict[str, Any]) -> None:
        """Checks that what a run has drawn, and a graph does not draw, makes no difference.

        Raises:
            NotCaptured: It does.
        """
        for source in drawn:
            if source not in self.idle and not self._ignores(source, graph, args, kwargs):
                raise NotCaptured(f"it draws from {source}: draw from PyTorch's default generators")
            self.idle.add(source)

    def _ignores(self, source: str, graph: Graph, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Whether the function's results do not depend on the numbers that it draws from a random module."""
        if source not in RESEEDED:
            return False
        references = self.guards.last.references
        before, found = references.snapshot(), []
        for seed in (1, 2):
            with self._restored():
                RESEEDED[source](seed)
                found.append(self.function(*args, **kwargs))
        references.restore(before)
        try:
            self._compare(graph, *found)
        except NotCaptured:
            return False
        return True

    @contextlib.contextmanager
    def _restored(self) -> Iterator[None]:
        """On leaving, all tensors that are found and all random states are as they were."""
        noise = Noise(self.guards.references.generators)
        try:
            with unchanged(self._state()):
                yield
        finally:
            noise.restore()

    def _state(self) -> list[Tensor]:
        """The tensors that the function may change."""
        return [tensor for tensor in self.guards.references.tensors if _can_change(tensor)]

    def _is_wrapped(self) -> bool:
        """Whether one of Pyro's handlers is around the call; warns once."""
        if not am_i_wrapped():
            return False
        if not self.wrapped:
            self.wrapped = True
            _warn("one of Pyro's handlers is around the call")
        return True

    def _give_up(self, reason: str) -> None:
        self.reason = reason
        _warn(reason)


def _warn(reason: str) -> None:
    warnings.warn(f"runs uncompiled: {reason}", CaptureWarning, stacklevel=5)


def _is_seen(place: Place) -> bool:
    """Whether what a program puts there matters after its run."""
    return place.own and (not place.private or (place.read and is_plain(place.value())))


def _can_change(tensor: Tensor) -> bool:
    """Whether it can be written to: no result of other tensors, nor one number in many places."""
    if tensor.grad_fn is not None or tensor.is_inference() or tensor.layout is not torch.strided:
        return False
    return all(stride or size <= 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def _kind(arg: Any) -> Hashable:
    """What a graph depends on of an argument: of a tensor, all but its numbers."""
    if isinstance(arg, Tensor):
        return arg.shape, arg.stride(), arg.dtype, arg.device, arg.requires_grad
    if arg is None:
        return None
    if not is_plain(arg):
        raise NotCaptured(f"an argument is a {type(arg).__name__}, neither a tensor nor a plain value")
    return type(arg), repr(arg)

"""`Replay`: a procedure on a GPU, recorded as a CUDA graph."""

import warnings
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from pyrovae.programs.graphs.captures import CHECKED, Capture, CaptureWarning
from pyrovae.programs.graphs.comparisons import NotCaptured, compare
from pyrovae.programs.pairs import clones, copy, device_of
from pyrovae.runtime.random_states import random_states, set_random_states
from pyrovae.runtime.texts import first_line

REPLAYED = 1e-3  # of the largest number
UNRECORDED = CHECKED + 1  # calls on a GPU before the procedure is recorded


class Replay:
    """A procedure on a GPU that is recorded as a CUDA graph, and replayed: one launch for all its kernels.

    A replay is compared with the procedure when it is new, and then whenever the number of calls has doubled.
    The captured function that the procedure calls is compared with itself at the same time.

    Args:
        procedure: Takes tensors or None, and returns nothing. All that it does, it does to tensors on the GPU;
            it must be what a CUDA graph can hold: no look at a value, no copy from the host.
        state: The tensors that it changes.
        judged: Groups of tensors, each on one scale, by which a replay is compared with the procedure.
        capture: What the procedure calls; a recording holds for one state of what that watches.

    Attributes:
        reason: Why the procedure is run instead of replayed, or "".

    Warns:
        CaptureWarning: It is run.
    """

    def __init__(
        self,
        procedure: Callable[..., None],
        state: Callable[[], list[Tensor]],
        judged: Callable[[], list[list[Tensor]]],
        capture: Capture,
    ):
        self.procedure, self.state, self.judged, self.capture = procedure, state, judged, capture
        self.recorded: dict[Hashable, tuple[torch.cuda.CUDAGraph, list[Tensor]]] = {}
        self.calls: dict[Hashable, int] = {}
        self.reason = ""

    def __call__(self, *args: Tensor | None) -> None:
        if self.reason or self.capture.reason:  # what runs uncompiled is not what was recorded
            self.procedure(*args)
            return
        kind = self.capture.key(args)
        calls = self.calls[kind] = self.calls.get(kind, 0) + 1
        if calls <= UNRECORDED:
            self.procedure(*args)
            return
        try:
            if kind not in self.recorded:
                self.recorded[kind] = self._record(args)
                self._check(kind, args)
            elif calls & (calls - 1) == 0:
                self._check(kind, args)
            else:
                self._replay(kind, args)
        except (RuntimeError, NotCaptured) as error:
            if isinstance(error, RuntimeError) and kind in self.recorded and calls > UNRECORDED + 1:
                raise  # it has been replayed before: this is no matter of recording
            self.reason = first_line(error)
            self.recorded.clear()
            warnings.warn(f"runs without a CUDA graph: {self.reason}", CaptureWarning, stacklevel=3)
            self.procedure(*args)

    def _record(self, args: tuple) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
        inputs = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=torch.cuda.Stream()):  # nothing is done, only noted
            self.procedure(*inputs)
        return graph, inputs

    def _replay(self, kind: Hashable, args: tuple) -> None:
        graph, inputs = self.recorded[kind]
        for held, arg in zip(inputs, args, strict=True):
            if isinstance(arg, Tensor):
                held.copy_(arg, non_blocking=True)
        graph.replay()

    def _check(self, kind: Hashable, args: tuple) -> None:
        """Replays the recording, and leaves what it did if that is what the procedure does."""
        state, device = self.state(), device_of(args)
        before, seed = clones(state), random_states(device)
        self.capture.due = True
        self.procedure(*args)
        if self.capture.reason:  # the procedure is another by now, and has done its work
            self.recorded.clear()
            return
        expected = [clones(group) for group in self.judged()]
        copy(before, state)
        set_random_states(seed, device)
        try:
            self._replay(kind, args)
            for group, values in zip(self.judged(), expected, strict=True):
                compare(group, values, REPLAYED)
        except Exception:
            copy(before, state)
            set_random_states(seed, device)
            raise

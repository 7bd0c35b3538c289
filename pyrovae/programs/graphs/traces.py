"""From a function to a graph: traced at PyTorch's dispatcher, its tensors made inputs, and compiled."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from pyrovae.programs.graphs.comparisons import NotCaptured
from pyrovae.runtime.denormals import flushes_denormals
from pyrovae.runtime.texts import first_line

TOLERANCES = {  # of the largest number
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}

_LOOKS = {"DataDependentOutputException", "GuardOnDataDependentSymNode"}  # imported, they take a second

Backend = Callable[[GraphModule, Sequence[Tensor]], Callable[..., Sequence[Tensor]]]


def inductor(graph: GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Sequence[Tensor]]:
    """Compiles a graph by TorchInductor: C++ on a CPU, Triton on a GPU."""
    from torch._inductor import config  # takes seconds
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.lowering import lowerings, make_fallback

    flushed = flushes_denormals()
    try:
        with config.patch(fallback_random=True):
            as_it_is = torch.ops.aten.bernoulli.default  # taken apart, it draws other noise
            apart = {op: how for op, how in select_decomp_table().items() if op != as_it_is}
            if as_it_is not in lowerings:
                make_fallback(as_it_is, override_decomp=True)
            return compile_fx(graph, list(inputs), decompositions=apart)
    finally:
        torch.set_flush_denormal(flushed)  # loading what was linked with -ffast-math may change it


class Graph:
    """A function's compiled trace.

    Args:
        function: It is called with the arguments, and returns tensors and whatever else it likes.
        args, kwargs: The arguments; the graph holds for others that differ only in the numbers of tensors.
        backend: What compiles it.

    Attributes:
        calls: How often it was asked for.
        doubted: Whether it differed from the function when it was compared last.
        written: The tensors that it changes in place.
        tolerance: How far it may be off by rounding.

    Raises:
        NotCaptured: The function cannot be traced, or not compiled.
    """

    def __init__(self, function: Callable[..., tuple], args: tuple, kwargs: dict[str, Any], backend: Backend):
        self.calls, self.doubted = 0, False
        self.without_gradients = torch.no_grad()  # to make one at each call takes a while
        tensors = tensors_of(args, kwargs)

        def of_tensors(*tensors: Tensor) -> tuple[Tensor, ...]:
            given = iter(tensors)
            one = [next(given) if isinstance(arg, Tensor) else arg for arg in args]
            two = {name: next(given) if isinstance(kwargs[name], Tensor) else kwargs[name] for name in kwargs}
            results = function(*one, **two)
            self.others = [(n, result) for n, result in enumerate(results) if not isinstance(result, Tensor)]
            return tuple(result for result in results if isinstance(result, Tensor))

        try:
            with warnings.catch_warnings(), pyro.validation_enabled(False):
                warnings.simplefilter("ignore")
                traced = make_fx(of_tensors, tracing_mode="fake", _allow_non_fake_inputs=True)(*tensors)
                self.held = _lift(traced)
                with torch.no_grad():
                    self.run = backend(traced, [*self.held, *tensors])
        except NotCaptured:
            raise
        except Exception as error:  # whatever a foreign program, or a compiler, makes of it
            looks = any(kind.__name__ in _LOOKS for kind in type(error).__mro__)
            reason = "it looks at the value of a tensor" if looks else first_line(error)
            raise NotCaptured(reason) from error
        changed = _written(traced)
        inputs = [node for node in traced.graph.nodes if node.op == "placeholder"]
        self.written = [tensor for node, tensor in zip(inputs, self.held, strict=False) if node in changed]
        types = {getattr(node.meta.get("val"), "dtype", None) for node in traced.graph.nodes}
        self.tolerance = max((TOLERANCES[dtype] for dtype in TOLERANCES if dtype in types), default=0.0)

    def __call__(self, args: tuple, kwargs: dict[str, Any]) -> tuple:
        """What the function returns: tensors as computed now, and anything else as it was in the trace."""
        with self.without_gradients:
            results = list(self.run(*self.held, *tensors_of(args, kwargs)))
        for place, other in self.others:
            results.insert(place, other)
        return tuple(results)


def tensors_of(args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors among a call's arguments, in order."""
    return [arg for arg in ((*args, *kwargs.values()) if kwargs else args) if isinstance(arg, Tensor)]


def _lift(traced: GraphModule) -> list[Tensor]:
    """Replaces the tensors that a graph holds by inputs before the others, and returns them.

    Raises:
        NotCaptured: It holds a random generator.
    """
    held: dict[int, Tensor] = {}
    inputs: dict[int, Node] = {}
    first = next(iter(traced.graph.nodes))
    for node in [node for node in traced.graph.nodes if node.op == "get_attr"]:
        tensor = getattr(traced, node.target)
        if isinstance(tensor, torch.Generator):
            raise NotCaptured("it draws from a torch.Generator of its own: draw from PyTorch's default one")
        if id(tensor) not in held:
            held[id(tensor)] = tensor
            with traced.graph.inserting_before(first):
                inputs[id(tensor)] = traced.graph.placeholder(f"held_{len(inputs)}")
            inputs[id(tensor)].meta = dict(node.meta)
        node.replace_all_uses_with(inputs[id(tensor)])
        traced.graph.erase_node(node)
    traced.recompile()
    return list(held.values())


def _written(traced: GraphModule) -> set[Node]:
    """The nodes that some operation changes in place, and those that they are views of."""
    written: set[Node] = set()
    for node in traced.graph.nodes:
        if node.op == "call_function" and hasattr(node.target, "_schema"):
            for argument, given in zip(node.target._schema.arguments, node.args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    while isinstance(given, Node):
                        written.add(given)
                        given = given.args[0] if given.args else None
    return written

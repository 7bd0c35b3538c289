"""Pyro programs as compiled graphs: Pyro's handlers run once, and what they did to tensors is replayed.

A function is traced at PyTorch's dispatcher (`make_fx`), below Pyro, distributions and autograd, so that
its trace is a flat list of operations, those of its gradients among them. Whatever tensors it reaches
besides its arguments (parameters, buffers, an estimator's running means) become inputs of the graph, read
and changed where they stand. TorchInductor compiles it. Noise comes from PyTorch's generators by the
operations that the function uses, so a seed gives the noise that it gives without.

A trace holds for what it was made with: other shapes, types, devices, settings or modes get one of their
own. What is compiled is compared with the function at its first two calls. What cannot be traced, or
differs, runs as it is, with one warning that says why.
"""

import contextlib
import math
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

import pyro
import torch
from jaxtyping import Float
from pyro.infer import ELBO
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from pyrovae.checkpoints import preserved_random_states, random_states, set_random_states
from pyrovae.estimators import Draws, Estimator
from pyrovae.pairs import clones, copy, device_of, leaves_of, modules_of, unchanged

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2}  # of the largest number
MOST_GRAPHS = 16
CHECKED = 2  # calls of each graph that are compared with the function
REPLAYED = 1e-3  # of the largest number
UNRECORDED = CHECKED + 1  # calls on a GPU before the procedure is recorded

_LOOKS = {"DataDependentOutputException", "GuardOnDataDependentSymNode"}  # imported, they take a second

_PLAIN = (bool, int, float, str, type(None))

Slot = tuple[dict[str, Any], str]  # a dictionary and a key in it
Backend = Callable[[GraphModule, Sequence[Tensor]], Callable[..., Sequence[Tensor]]]


class CaptureWarning(UserWarning):
    """Something runs uncompiled, and why."""


class NotCaptured(Exception):
    """A function for which no graph stands."""


def inductor(graph: GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Sequence[Tensor]]:
    """Compiles a graph by TorchInductor: C++ on a CPU, Triton on a GPU."""
    from torch._inductor import config  # takes seconds
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.lowering import lowerings, make_fallback

    flushed = _flushes_denormals()
    try:
        with config.patch(fallback_random=True):
            as_it_is = torch.ops.aten.bernoulli.default  # taken apart, it draws other noise
            apart = {op: how for op, how in select_decomp_table().items() if op != as_it_is}
            if as_it_is not in lowerings:
                make_fallback(as_it_is, override_decomp=True)
            return compile_fx(graph, list(inputs), decompositions=apart)
    finally:
        torch.set_flush_denormal(flushed)  # loading what was linked with -ffast-math may change it


@contextlib.contextmanager
def flushed_denormals() -> Iterator[None]:
    """While entered, numbers below the smallest normal one count as zero in this thread, on a CPU.

    They come up in Adam's moments of weights that seldom have a gradient, and in the normalised weights of
    many particles, and take tens of times longer. Threads that PyTorch starts meanwhile do the same, for good.
    """
    flushed = _flushes_denormals()
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(flushed)


def start_workers() -> None:
    """Starts PyTorch's threads on a CPU, if there are none yet, such that they flush denormals."""
    with flushed_denormals():
        torch.ones(2**20).sum()


class Capture:
    """A function of tensors that runs as a compiled graph.

    Args:
        function: Of tensors and plain values, to a tuple of tensors. It may draw noise, take gradients by
            `torch.autograd.grad`, and change tensors in place, but for its arguments; nothing else. What
            it does must not depend on the values of tensors.
        owners: The modules and other objects that it uses. A change of their settings (plain values) or an
            exchange of their tensors needs another graph; what else changes is not noticed.
        apart: So many first results are compared each on its own scale, the others on that of their largest.
        backend: What compiles a graph, given its inputs.

    Attributes:
        reason: Why the function runs uncompiled, or "".

    Warns:
        CaptureWarning: It runs uncompiled.
    """

    def __init__(
        self,
        function: Callable[..., tuple],
        owners: Iterable[object],
        *,
        apart: int = 0,
        backend: Backend = inductor,
    ):
        self.function, self.owners, self.backend = function, list(owners), backend
        self.apart = apart
        self.graphs: dict[Hashable, _Graph] = {}
        self.plain: list[Slot] = []  # where the owners keep settings
        self.slots: list[Slot] = []  # and where tensors and modules
        self.reason = ""

    def __call__(self, *args: Any) -> tuple[Tensor, ...]:
        if not self.reason:
            try:
                graph = self.graphs.get(self.key(args)) or self._trace(args)
                if graph.calls < CHECKED:
                    return self._checked(graph, args)
                with torch.no_grad():
                    return graph(args)
            except NotCaptured as error:
                self.reason = str(error)
                warnings.warn(f"runs uncompiled: {self.reason}", CaptureWarning, stacklevel=3)
        return self.function(*args)

    def key(self, args: tuple) -> Hashable:
        """What a graph holds for."""
        settings = [values.get(name) for values, name in self.plain]
        tensors = [_identity(values.get(name)) for values, name in self.slots]
        device = device_of(args).type
        modes = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device), torch.get_num_threads()
        return tuple([_kind(arg) for arg in args]), tuple(settings), tuple(tensors), modes

    def _trace(self, args: tuple) -> "_Graph":
        if len(self.graphs) == MOST_GRAPHS:
            raise NotCaptured(
                f"arguments and settings came in more than {MOST_GRAPHS} kinds: pass what changes as tensors"
            )
        self._look_up()
        with self._restored():
            self.function(*args)  # an error of its own is raised as it is; what it makes when first run is made
        self._look_up()
        tensors = _tensors(args)

        def function(*tensors: Tensor) -> tuple[Tensor, ...]:
            given = iter(tensors)
            return self.function(*[next(given) if isinstance(arg, Tensor) else arg for arg in args])

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with self._restored(), pyro.validation_enabled(False):
                    traced = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*tensors)
                held = _lift(traced)
                with torch.no_grad():
                    graph = _Graph(traced, held, self.backend(traced, [*held, *tensors]))
        except Exception as error:  # whatever a foreign program, or a compiler, makes of it
            looks = any(kind.__name__ in _LOOKS for kind in type(error).__mro__)
            reason = "it looks at the value of a tensor" if looks else _first_line(error)
            raise NotCaptured(reason) from error
        self.graphs[self.key(args)] = graph
        return graph

    def _checked(self, graph: "_Graph", args: tuple) -> tuple[Tensor, ...]:
        """What the graph gives, if that is what the function gives and the state is the same afterwards."""
        device = device_of(args)
        state = [*self._held(), *graph.written]
        before, seed = clones(state), random_states(device)
        expected = self.function(*args)
        after, random_after = clones(state), random_states(device)

        def rewind() -> None:
            copy(before, state)
            set_random_states(seed, device)

        rewind()
        try:
            with torch.no_grad():
                got = graph(args)
            for number in range(self.apart):
                _compare([got[number]], [expected[number]], graph.tolerance)
            _compare(got[self.apart :], expected[self.apart :], graph.tolerance)
            _compare(state, after, graph.tolerance)
            now = random_states(device)
            if not all(
                torch.equal(now[name], random_after[name]) for name in {"torch", device.type} & now.keys()
            ):
                raise NotCaptured("its graph draws other noise")
        except Exception as error:
            rewind()
            raise error if isinstance(error, NotCaptured) else NotCaptured(_first_line(error)) from error
        graph.calls += 1
        return got

    def _look_up(self) -> None:
        slots = [slot for owner in self.owners for slot in _slots(owner)]
        self.plain = [(values, name) for values, name in slots if isinstance(values[name], _PLAIN)]
        self.slots = [(values, name) for values, name in slots if not isinstance(values[name], _PLAIN)]

    def _held(self) -> list[Tensor]:
        """The tensors of the owners that the function may change."""
        found = [value for values, name in self.slots if isinstance(value := values.get(name), Tensor)]
        return [tensor for tensor in found if not tensor.requires_grad]

    @contextlib.contextmanager
    def _restored(self) -> Iterator[None]:
        """On leaving, the owners' tensors and all random states are as they were."""
        with unchanged(self._held()), preserved_random_states():
            yield


class _Graph:
    """A compiled trace, the tensors that it holds besides its arguments, and those that it changes."""

    def __init__(self, traced: GraphModule, held: list[Tensor], run: Callable[..., Sequence[Tensor]]):
        self.held, self.run, self.calls = held, run, 0
        changed = _written(traced)
        inputs = [node for node in traced.graph.nodes if node.op == "placeholder"]
        self.written = [tensor for node, tensor in zip(inputs, held, strict=False) if node in changed]
        types = {getattr(node.meta.get("val"), "dtype", None) for node in traced.graph.nodes}
        self.tolerance = max(TOLERANCES[dtype] for dtype in TOLERANCES if dtype in types)

    def __call__(self, args: tuple) -> tuple[Tensor, ...]:
        return tuple(self.run(*self.held, *_tensors(args)))


class Step:
    """An estimator's loss and its gradients for a Pyro pair, compiled: see `capture`.

    Args:
        leaves: The tensors that may be learned, by name; frozen ones get no gradient.
        value: What a call returns of the draws; minus the bound, summed over the data, if None.
        backend: What compiles a graph.
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        estimator: ELBO,
        leaves: dict[str, Tensor],
        *,
        value: Callable[[Draws], Tensor] | None = None,
        backend: Backend = inductor,
    ):
        self.model, self.guide, self.estimator = model, guide, estimator
        self.leaves, self.value = leaves, value
        self.adapts = isinstance(estimator, Estimator) and estimator.adapts
        store = pyro.get_param_store()
        self.stored = {name: leaf for name, leaf in leaves.items() if store._params.get(name) is leaf}
        owners = [*modules_of(model, guide), estimator, _Named(leaves)]
        self.graph = Capture(self._run, owners, apart=3 if self.adapts else 1, backend=backend)

    @property
    def parameters(self) -> list[Tensor]:
        """What is learned: for an optimizer."""
        return [leaf for leaf in self.leaves.values() if leaf.requires_grad]

    @property
    def reason(self) -> str:
        """Why it runs uncompiled, or ""."""
        return self.graph.reason

    def __call__(self, *args: Any, weights: Float[Tensor, "#B"] | None = None) -> Tensor:
        """The loss in nats; each parameter's `.grad` is its gradient afterwards, whatever it was before.

        Args:
            weights: Of each datum in the gradient, or one for all; 1 if None. For our estimators.

        Raises:
            ValueError: Pyro's parameter store has others by now than the step was made for, or there are
                weights for an estimator of Pyro's.
        """
        if weights is not None and not isinstance(self.estimator, Estimator):
            raise ValueError(
                f"expected no weights for {type(self.estimator).__name__}, which sums over the data"
            )
        store = pyro.get_param_store()._params
        for name, leaf in self.stored.items():
            if store.get(name) is not leaf:
                raise ValueError(f"expected {name!r} in Pyro's store to be what was captured: capture it again")
        for parameter in self.parameters:
            parameter.grad = None  # so that the new ones take its place, which is still in the cache
        value, *results = self.graph(weights, *args)
        if self.adapts:
            log_weight, observations, *results = results
            self.estimator.adapt(log_weight, observations)
        for parameter, gradient in zip(self.parameters, results, strict=True):
            parameter.grad = gradient
        return value

    def _run(self, weights: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
        learned: tuple[Tensor, ...] = ()
        with torch.enable_grad():
            if isinstance(self.estimator, Estimator):
                draws = self.estimator.draws(self.model, self.guide, *args)
                surrogate = self.estimator.surrogate(draws)
                surrogate = surrogate if weights is None else surrogate * weights
                loss = -surrogate.sum() * draws.subsampling
                value = (
                    self.value(draws) if self.value else -self.estimator.bound(draws).sum() * draws.subsampling
                )
                if self.adapts:
                    learned = draws.log_weight, draws.observations
            else:
                loss = value = self.estimator.differentiable_loss(self.model, self.guide, *args)
            gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True, materialize_grads=True)
        laid_out = [_laid_out(gradient, p) for gradient, p in zip(gradients, self.parameters, strict=True)]
        return tuple(tensor.detach() for tensor in (value, *learned, *laid_out))


def capture(model: Callable, guide: Callable, estimator: ELBO, *args: Any, backend: Backend = inductor) -> Step:
    """Compiles the loss of a Pyro pair and its gradients; Pyro's handlers run only while it is traced.

    The step takes the place of `SVI.step` up to the optimizer, which is any of `torch.optim`. It gives
    what the estimator gives under the same seed, up to rounding; see `Capture` for what it must not do.
    Anything that changes from call to call must be a tensor among the arguments. The programs are run once
    here, for their parameters, which start as the caller's generators have it. Long training is faster on a
    CPU under `torch.set_flush_denormal(True)`.

    Args:
        model, guide: A Pyro pair.
        estimator: One of ours, or a `pyro.infer.ELBO` whose `differentiable_loss` looks at no tensor's value.
        args: Arguments of both, a first batch, say: to find the parameters.
        backend: What compiles a graph, given its inputs.

    Returns:
        A function of such arguments: it sets the `.grad` of its `parameters`, and returns the loss.

    Raises:
        ValueError: The pair has nothing to learn.

    Example:
        >>> import pyro
        >>> from pyrovae import Elbo
        >>> def model(x):
        ...     w = pyro.param("w", torch.tensor(0.5))
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(w * z, 1.0), obs=x)
        >>> def guide(x):
        ...     a, b = pyro.param("a", torch.tensor(0.1)), pyro.param("b", torch.tensor(-1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(a * x, b.exp()))
        >>> x = torch.linspace(-3, 3, 64)
        >>> step = capture(model, guide, Elbo(), x)
        >>> optimizer = torch.optim.Adam(step.parameters, lr=0.01, fused=True)
        >>> for _ in range(100):
        ...     loss = step(x)
        ...     optimizer.step()
        >>> pyro.param("w").item() > 0.8
        True
    """
    return Step(model, guide, estimator, leaves_of(model, guide, *args, seed=None), backend=backend)


class Replay:
    """A procedure on a GPU that is recorded as a CUDA graph, and replayed: one launch for all its kernels.

    Args:
        procedure: Of tensors or None, to nothing. All that it does, it does to tensors on the GPU; it must be
            what a CUDA graph can hold: no look at a value, no copy from the host.
        state: The tensors that it changes.
        judged: Groups of tensors on one scale by which a replay is compared with the procedure.
        key: What else a recording holds for, given the arguments.

    Attributes:
        reason: Why it is run instead of replayed, or "".

    Warns:
        CaptureWarning: It is.
    """

    def __init__(
        self,
        procedure: Callable[..., None],
        state: Callable[[], list[Tensor]],
        judged: Callable[[], list[list[Tensor]]],
        key: Callable[[tuple], Hashable],
    ):
        self.procedure, self.state, self.judged, self.key = procedure, state, judged, key
        self.recorded: dict[Hashable, tuple[torch.cuda.CUDAGraph, list[Tensor]]] = {}
        self.calls: dict[Hashable, int] = {}
        self.reason = ""

    def __call__(self, *args: Tensor | None) -> None:
        kind = self.key(args)
        calls = self.calls[kind] = self.calls.get(kind, 0) + 1
        if self.reason or calls <= UNRECORDED:
            self.procedure(*args)
            return
        try:
            if kind not in self.recorded:
                self.recorded[kind] = self._record(args)
                self._check(kind, args)
            else:
                self._replay(kind, args)
        except (RuntimeError, NotCaptured) as error:
            if kind in self.recorded and calls > UNRECORDED + 1:
                raise  # it has been replayed before: this is no matter of recording
            self.reason = _first_line(error)
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
        """Replays it, and leaves what it did if that is what the procedure does."""
        state, device = self.state(), device_of(args)
        before, seed = clones(state), random_states(device)
        self.procedure(*args)
        expected = [clones(group) for group in self.judged()]
        copy(before, state)
        set_random_states(seed, device)
        try:
            self._replay(kind, args)
            for group, values in zip(self.judged(), expected, strict=True):
                _compare(group, values, REPLAYED)
        except Exception:
            copy(before, state)
            set_random_states(seed, device)
            raise


class _Named:
    """An owner of tensors that no module may hold."""

    def __init__(self, tensors: dict[str, Tensor]):
        vars(self).update(tensors)


def _slots(owner: object) -> list[Slot]:
    """Where an object keeps plain values, tensors and modules: dictionaries and keys, in this object alone."""
    values = getattr(owner, "__dict__", {})
    parts = [values, *(values.get(name, {}) for name in ("_parameters", "_buffers", "_modules"))]
    kept = (*_PLAIN, Tensor, nn.Module)
    return [(part, name) for part in parts for name, value in part.items() if isinstance(value, kept)] + [
        slot
        for value in ([] if isinstance(owner, nn.Module) else values.values())
        if isinstance(value, nn.Module)
        for module in value.modules()
        for slot in _slots(module)
    ]


def _identity(value: Any) -> Hashable:
    """What tells one setting from another: of tensors and modules, which one it is."""
    if isinstance(value, Tensor):
        return id(value), value.requires_grad, value.dtype, value.device, value.shape
    return id(value) if isinstance(value, nn.Module) else value


def _kind(arg: Any) -> Hashable:
    """What a graph depends on of an argument: of a tensor, all but its numbers."""
    if isinstance(arg, Tensor):
        return arg.shape, arg.stride(), arg.dtype, arg.device, arg.requires_grad
    if not isinstance(arg, _PLAIN):
        raise NotCaptured(f"an argument is a {type(arg).__name__}, neither a tensor nor a plain value")
    return type(arg), arg


def _laid_out(gradient: Tensor, parameter: Tensor) -> Tensor:
    """The gradient, in memory as its parameter: a fused optimizer reads both in one order."""
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


def _tensors(args: tuple) -> list[Tensor]:
    return [arg for arg in args if isinstance(arg, Tensor)]


def _lift(traced: GraphModule) -> list[Tensor]:
    """Makes inputs, before the others, of the tensors that a graph holds; which they are."""
    held: dict[int, Tensor] = {}
    inputs: dict[int, Node] = {}
    first = next(iter(traced.graph.nodes))
    for node in [node for node in traced.graph.nodes if node.op == "get_attr"]:
        tensor = getattr(traced, node.target)
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


def _compare(got: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    """Whether they are equal, each up to a part of its largest number, or a tenth of that part of all numbers'.

    Some are nothing but rounding, as the gradient of a bias before batch norm. Integers are to be the same.

    Raises:
        NotCaptured: They are not. What is not finite counts as equal: training stops for that itself.
    """
    sizes = [tensor.double().abs().max().item() if tensor.numel() else 0.0 for tensor in expected]
    real = [size for size, tensor in zip(sizes, expected, strict=True) if tensor.is_floating_point()]
    floor = 0.1 * tolerance * max(filter(math.isfinite, real), default=0.0)
    for number, (a, b, size) in enumerate(zip(got, expected, sizes, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            raise NotCaptured(
                f"result {number} of its graph is {a.dtype} {tuple(a.shape)}, not {b.dtype} {tuple(b.shape)}"
            )
        off = (a.double() - b.double()).abs().max().item() if b.numel() else 0.0
        if math.isfinite(size) and not off <= (max(tolerance * size, floor) if b.is_floating_point() else 0):
            raise NotCaptured(
                f"result {number} of its graph is off by {off:.1e}, where the largest number is {size:.1e}"
            )


def _flushes_denormals() -> bool:
    return bool(torch.full((1,), 2.0**-1022, dtype=torch.float64).div(4) == 0)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__

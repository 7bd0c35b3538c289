"""What a Pyro model/guide pair is made of: its modules, and the tensors that it learns."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from pyrovae.programs.references import References
from pyrovae.runtime.random_states import seeded


def modules_of(*programs: Callable) -> list[nn.Module]:
    """The modules that the programs refer to, in whatever way their code shows, and all in them."""
    return References(programs).modules


@contextlib.contextmanager
def noticed_modules(notice: Callable[[nn.Module], None]) -> Iterator[None]:
    """While entered, `notice` is called with each module before it is called for the first time."""
    seen: dict[int, nn.Module] = {}

    def hook(module: nn.Module, inputs: Any) -> None:
        if id(module) not in seen:
            seen[id(module)] = module
            notice(module)

    handle = register_module_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def untouched(*programs: Callable) -> Iterator[None]:
    """The programs' modules in evaluation mode; on leaving they and Pyro's parameter store are as they were.

    Modules that the programs' code does not show are put into that mode when they are first called.
    """
    modes: list[tuple[nn.Module, bool]] = []

    def evaluate(module: nn.Module) -> None:
        modes.append((module, module.training))
        module.training = False

    for module in modules_of(*programs):
        evaluate(module)
    store = pyro.get_param_store()
    try:
        with store.scope(store.get_state()), noticed_modules(evaluate):
            yield
    finally:
        for module, training in reversed(modes):
            module.training = training


@contextlib.contextmanager
def unchanged_buffers(*programs: Callable) -> Iterator[list[nn.Module]]:
    """On leaving, the buffers of the programs' modules, and of others that were called, hold what they held.

    Gives a list of the modules that were called.
    """
    called: list[nn.Module] = []
    held: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module) -> None:
        buffers = list(module.buffers(recurse=False))
        held.extend(zip(buffers, clones(buffers), strict=True))

    for module in modules_of(*programs):
        keep(module)

    def notice(module: nn.Module) -> None:
        called.append(module)
        keep(module)

    try:
        with noticed_modules(notice):
            yield called
    finally:
        for buffer, value in reversed(held):
            copy([value], [buffer])


@contextlib.contextmanager
def unchanged(tensors: Sequence[Tensor]) -> Iterator[None]:
    """On leaving, the tensors hold what they held."""
    values = clones(tensors)
    try:
        yield
    finally:
        copy(values, tensors)


def clones(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Copies of what the tensors hold."""
    return [tensor.detach().clone() for tensor in tensors]


def copy(values: Iterable[Tensor], tensors: Iterable[Tensor]) -> None:
    """Has the tensors hold these values. One that holds its value already is not written to."""
    with torch.no_grad():
        for tensor, value in zip(tensors, values, strict=True):
            if not torch.equal(tensor, value):
                tensor.copy_(value)


def parameters_of(model: Callable, guide: Callable, *args: Any) -> tuple[dict[str, Tensor], set[str]]:
    """The tensors that a pair learns, unconstrained, by name, and the names of those that the guide uses.

    They are those of `leaves_of` that require a gradient.

    Raises:
        ValueError: There is none.
    """
    parameters = {n: leaf for n, leaf in leaves_of(model, guide, *args).items() if leaf.requires_grad}
    with seeded(0, device_of(args)), _Watch(parameters) as watch:
        guide(*args)
    return parameters, watch.seen


def leaves_of(
    model: Callable, guide: Callable, *args: Any, seed: int | None = 0, **kwargs: Any
) -> dict[str, Tensor]:
    """The tensors that a pair may learn, unconstrained, by name, with those that are frozen.

    They are the parameters of the modules whose methods the programs are, and what the programs declare by
    `pyro.param` and `pyro.module`. The programs are run for that, on their arguments.

    Args:
        model, guide: A Pyro pair.
        args, kwargs: The arguments of both.
        seed: Of the noise; None for noise of the caller's generators.

    Raises:
        ValueError: Nothing is learned, because all are frozen or there is none.
    """
    noise = contextlib.nullcontext() if seed is None else seeded(seed, device_of(args))
    with noise, unchanged_buffers(model, guide), torch.no_grad():
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
    leaves = registered((guide, model), (guide_trace, model_trace))
    if not any(leaf.requires_grad for leaf in leaves.values()):
        raise ValueError(
            "expected a model or guide with parameters that require a gradient, got none: "
            "declare them by pyro.param or pyro.module"
        )
    return leaves


def registered(programs: Iterable[Callable], traces: Iterable[poutine.Trace]) -> dict[str, Tensor]:
    """The unconstrained parameters of the modules whose methods the programs are, and of the traces' sites.

    Two of one name get primes: w, w', w''.
    """
    store = dict(pyro.get_param_store().named_parameters())
    found = [pair for program in programs for pair in own_parameters(program)]
    for trace in traces:
        sites = ((name, site["value"]) for name, site in trace.nodes.items() if site["type"] == "param")
        found += [(name, store.get(name, value)) for name, value in sites]
    leaves: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, leaf in found:
        if id(leaf) not in seen:
            seen.add(id(leaf))
            while name in leaves:
                name += "'"
            leaves[name] = leaf
    return leaves


def own_parameters(program: Callable) -> Iterable[tuple[str, Tensor]]:
    """The named parameters of the module that a program is, or is a method of; none if it is of no module."""
    while isinstance(program, functools.partial):
        program = program.func
    owner = getattr(program, "__self__", program)
    return owner.named_parameters() if isinstance(owner, nn.Module) else ()


class _Watch(TorchFunctionMode):
    """Notes which parameters are used."""

    def __init__(self, parameters: dict[str, Tensor]):
        super().__init__()
        self.names = {id(tensor): name for name, tensor in parameters.items()}
        self.seen: set[str] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not reads_attribute(func):
            self.seen.update(used_tensors(self.names, args, kwargs))
        return func(*args, **kwargs)


def used_tensors(names: dict[int, str], args: tuple, kwargs: dict) -> list[str]:
    """The parameters among a function's arguments, in lists as well."""
    return [names[id(leaf)] for leaf in tree_leaves((args, kwargs)) if id(leaf) in names]


def reads_attribute(func: Callable) -> bool:
    """Whether a function of PyTorch only looks at a tensor."""
    return getattr(func, "__name__", "") in ("__get__", "dim", "size", "numel", "is_floating_point", "__len__")


def device_of(args: tuple) -> torch.device:
    """The first tensor's."""
    for arg in args:
        if isinstance(arg, Tensor):
            return arg.device
    return torch.device("cpu")

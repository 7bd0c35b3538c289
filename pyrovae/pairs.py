"""What a Pyro model/guide pair is made of: its modules, and the tensors that it learns."""

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from pyrovae.evidence import seeded


def modules_of(*programs: Callable) -> set[nn.Module]:
    """The modules that the programs are, are methods of, or name, and all in them."""
    owners: list[Any] = []
    for program in programs:
        owner = getattr(program, "__self__", program)
        owners.append(owner)
        if inspect.isfunction(owner):
            named = inspect.getclosurevars(owner)
            owners += [*named.nonlocals.values(), *named.globals.values()]
        elif not isinstance(owner, nn.Module):
            owners += getattr(owner, "__dict__", {}).values()
    return {module for owner in owners if isinstance(owner, nn.Module) for module in owner.modules()}


@contextlib.contextmanager
def untouched(*programs: Callable) -> Iterator[None]:
    """The programs' modules in evaluation mode; on leaving they and Pyro's parameter store are as they were."""
    modes = {module: module.training for module in modules_of(*programs)}
    for module in modes:
        module.training = False
    store = pyro.get_param_store()
    try:
        with store.scope(store.get_state()):
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def buffers_of(*programs: Callable) -> list[Tensor]:
    """The buffers of the programs' modules."""
    return [buffer for module in modules_of(*programs) for buffer in module.buffers(recurse=False)]


@contextlib.contextmanager
def unchanged(tensors: Sequence[Tensor]) -> Iterator[None]:
    """On leaving, the tensors hold what they held."""
    values = clones(tensors)
    try:
        yield
    finally:
        copy(values, tensors)


def clones(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What they hold."""
    return [tensor.detach().clone() for tensor in tensors]


def copy(values: Iterable[Tensor], tensors: Iterable[Tensor]) -> None:
    """Has the tensors hold these values."""
    with torch.no_grad():
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)


def parameters_of(model: Callable, guide: Callable, *args: Tensor) -> tuple[dict[str, Tensor], set[str]]:
    """The tensors that a pair learns, unconstrained, by name, and the names of those that the guide uses.

    Those of the modules that the programs are methods of, and of `pyro.param` and `pyro.module`.

    Raises:
        ValueError: There is none.
    """
    parameters = {n: leaf for n, leaf in leaves_of(model, guide, *args).items() if leaf.requires_grad}
    with seeded(0, device_of(args)), _Watch(parameters) as watch:
        guide(*args)
    return parameters, watch.seen


def leaves_of(model: Callable, guide: Callable, *args: Any, seed: int | None = 0) -> dict[str, Tensor]:
    """The same tensors, and those among them that are frozen: that require no gradient.

    The programs are run, with noise of the seed, or of the caller's generators if there is none.

    Raises:
        ValueError: Nothing is learned: all are frozen, or there is none.
    """
    named: dict[int, tuple[str, Tensor]] = {}
    noise = contextlib.nullcontext() if seed is None else seeded(seed, device_of(args))
    with noise, unchanged(buffers_of(model, guide)), torch.no_grad():
        for program in (guide, model):
            owner = getattr(program, "__self__", program)
            if isinstance(owner, nn.Module):
                for name, parameter in owner.named_parameters():
                    named.setdefault(id(parameter), (name, parameter))
        guide_trace = poutine.trace(guide).get_trace(*args)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args)
        for trace in (guide_trace, model_trace):
            for name, site in trace.nodes.items():
                if site["type"] == "param":
                    leaf = pyro.get_param_store().get_state()["params"].get(name, site["value"])
                    named.setdefault(id(leaf), (name, leaf))
    if not any(leaf.requires_grad for _, leaf in named.values()):
        raise ValueError("expected a model or guide with parameters that require a gradient, got none")
    return dict(named.values())


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
    return next((a.device for a in args if isinstance(a, Tensor)), torch.device("cpu"))

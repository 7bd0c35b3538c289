"""Each process's rows of a batch, and how gradients and statistics of all processes meet."""

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pyrovae.runtime.distributed.agreements import gathered, watched
from pyrovae.runtime.distributed.groups import rank, world

_NORMS = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d


def shard(chosen: Int[Tensor, " B"]) -> Int[Tensor, " rows"]:
    """This process's rows of a batch: its own, `own_rows` of them, and others' that do not count.

    There are at least two if the batch has two, since batch norm needs two and every process a gradient.
    """
    if world() == 1:
        return chosen
    own, size = chosen[rank() :: world()], len(chosen)
    borrowed = [(rank() + 1 + i) % size for i in range(min(2, size) - len(own))]
    return torch.cat([own, chosen[borrowed]]) if borrowed else own


def own_rows(size: int) -> int:
    """How many rows of a batch of this size are this process's own: they come first in its shard."""
    return len(range(rank(), size, world()))


def own(values: Float[Tensor, "rows *rest"], size: int) -> Float[Tensor, "own *rest"]:
    """Those of a shard's values that are of this process's own rows of a batch of this size."""
    return values if world() == 1 else values[: own_rows(size)]


def weights(shard: Float[Tensor, "rows *rest"], size: int) -> Float[Tensor, " rows"]:
    """Of a shard's rows: the average over processes of weighted sums is the mean over a batch of this size."""
    return (torch.arange(len(shard)) < own_rows(size)).to(shard) * (world() / size)


def total(sums: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The sum over processes, in the order of their ranks."""
    return sums if world() == 1 else torch.stack(gathered(sums.cpu())).sum(0).to(sums)


def parallel(module: nn.Module) -> nn.Module:
    """The module, such that each backward pass leaves gradients averaged over processes.

    Parameters become the first process's. Buffers do not, until `share` is called.
    """
    if world() == 1:
        return module
    known = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    # A static graph, which allows for parameters without a gradient, whichever they are.
    return DistributedDataParallel(module, static_graph=True, **{buffers: False})


def average(tensors: Iterable[Tensor]) -> None:
    """Puts the mean over processes in place of each floating-point tensor, in one message of each type."""
    if world() == 1:
        return
    by_type: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.is_floating_point():
            by_type.setdefault((tensor.dtype, tensor.device), []).append(tensor.detach())
    with watched():
        for alike in by_type.values():
            flat = torch.cat([tensor.reshape(-1) for tensor in alike])
            dist.all_reduce(flat)
            for tensor, part in zip(alike, (flat / world()).split([t.numel() for t in alike]), strict=True):
                tensor.copy_(part.view_as(tensor))


def share(tensors: Iterable[Tensor]) -> None:
    """Puts the first process's values in place of each tensor."""
    if world() > 1:
        with watched():
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0)


def tensors_in(state: Any) -> Iterator[Tensor]:
    """All tensors of nested dictionaries and lists, in order."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, Mapping | list | tuple):
        for value in state.values() if isinstance(state, Mapping) else state:
            yield from tensors_in(value)


def norms_to_synchronise(module: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """The batch norms whose statistics would be of a process's own rows though they need not be.

    Each with the module that it is in, and its name there.
    """
    if world() == 1 or not all(parameter.is_cuda for parameter in module.parameters()):
        return []
    return [(m, name, n) for m in module.modules() for name, n in m.named_children() if type(n) in _NORMS]


@contextlib.contextmanager
def synchronised_norms(module: nn.Module) -> Iterator[None]:
    """While entered, batch norm on GPUs has the statistics of the whole batch, of all processes.

    On CPUs, for which PyTorch has no such thing, each process normalises with those of its own rows.
    Names and parameters stay as they are.
    """
    norms = norms_to_synchronise(module)
    for parent, name, norm in norms:
        setattr(parent, name, nn.SyncBatchNorm.convert_sync_batchnorm(norm))
    try:
        yield
    finally:
        for parent, name, norm in norms:  # whose parameters and buffers were in use
            setattr(parent, name, norm.train(getattr(parent, name).training))

"""Several processes that train one model: who writes, what all agree on, and how their gradients meet.

`torchrun` starts the processes and numbers them; number 0, the first, prints and writes. Each works on its
rows of every batch. With one process, or none of PyTorch's process groups, everything here is a no-op.
"""

import contextlib
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pyrovae.runtime import locks
from pyrovae.runtime.errors import FieldError
from pyrovae.runtime.whole_files import write_errors

T = TypeVar("T")

PATIENCE = timedelta(minutes=30)  # for what the others do, the first's validation say, before it is an error
_NEEDED = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}  # variables; below, how such begin
_OF_LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC_")
_NORMS = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d


class LostProcess(OSError):
    """Another process of the run ended, or does not answer."""


# Who is who


def world() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this one, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Makes one group of the processes that torchrun has started, by gloo on CPUs and nccl on GPUs.

    A process that an error ends leaves the group with its last breath and not before, so that it can say
    why first.

    Raises:
        LostProcess: They do not find each other.
    """
    if not _launched() or dist.is_initialized():
        yield
        return
    # Both: tensors on a GPU go by nccl, flags and Python objects by gloo, which does not wait for the GPU.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        dist.init_process_group(backend, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise LostProcess(f"expected {os.environ['WORLD_SIZE']} processes to meet, got: {reason}") from None
    yield
    dist.destroy_process_group()


def _launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return dist.is_available() and os.environ.keys() >= _NEEDED and os.environ["WORLD_SIZE"] != "1"


def check_group() -> None:
    """That the processes can tell each other more than tensors on GPUs.

    Raises:
        ValueError: They cannot.
    """
    if world() > 1 and dist.get_backend() == "nccl":
        raise ValueError(
            "expected a process group with gloo, got nccl alone: use init_process_group('cpu:gloo,cuda:nccl')"
        )


def launcher() -> list[str]:
    """What was typed before the program so that there are this many processes; nothing for one."""
    if world() == 1:
        return []
    nodes, local = os.environ.get("GROUP_WORLD_SIZE", "1"), os.environ.get("LOCAL_WORLD_SIZE", str(world()))
    return ["torchrun", *(["--nnodes", nodes] if nodes != "1" else []), "--nproc-per-node", local]


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for a program that is to be a run of its own, whoever started this one."""
    return {name: value for name, value in environment.items() if not name.startswith(_OF_LAUNCHER)}


def own_device(device: torch.device) -> torch.device:
    """This process's own device of a kind: on a node with several GPUs, one each.

    Raises:
        ValueError: The node has fewer GPUs than processes.
    """
    if device.type != "cuda" or world() == 1:
        return device
    number, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= there:
        raise FieldError(
            f"expected cuda with at most one process per GPU of a node, {there}, got more: "
            "lower --nproc-per-node",
            field="cuda",
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


# What all know, and do together


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """What PyTorch raises in here because another process is gone becomes one line.

    Raises:
        LostProcess: It does.
    """
    try:
        yield
    except RuntimeError as error:
        if world() == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        reason = str(error).strip().splitlines()[0].split(". ")[0]
        raise LostProcess(
            f"lost another process of the run, so that this one cannot go on ({reason}): "
            "resume the run, whose last checkpoint is whole"
        ) from None


def gathered(value: T) -> list[T]:
    """The value of every process, by rank."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    with watched():
        dist.all_gather_object(values, value)
    return values


def broadcast(value: T) -> T:
    """The first process's value, on all."""
    if world() == 1:
        return value
    box = [value]
    with watched():
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def wait() -> None:
    """Until all processes are here."""
    gathered(None)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """An error that one process meets in here is raised on all; there is no communication in here."""
    if world() == 1:
        yield
        return
    met = None
    try:
        yield
    except (ValueError, ArithmeticError, OSError) as error:
        met = error
    errors = [error for error in gathered(met) if error is not None]
    if errors:
        raise met or errors[0]


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Holds the lock on a directory (see `locks`), by the first process for all.

    Raises:
        LockedError: Another run holds it.
        WriteError: The directory is not there, or cannot be written to.
    """
    with contextlib.ExitStack() as stack:
        with together():
            if rank() == 0:
                with write_errors(directory):
                    stack.enter_context(locks.held(directory))
        yield


def from_first(work: Callable[[], T]) -> T:
    """What the first process makes, or the error that it meets, on all."""
    made: Any = None
    with together():
        if rank() == 0:
            made = work()
    return broadcast(made)


def in_turn(work: Callable[[], T]) -> T:
    """What each process makes: the first, then one on each node, then the others.

    What one puts into a cache, a download say, those after it find there.
    """
    mine = 0 if rank() == 0 else 1 if os.environ.get("LOCAL_RANK") == "0" else 2
    made: Any = None
    for turn in range(3 if world() > 1 else 1):
        with together():
            if turn == mine:
                made = work()
    return made


class Agreement:
    """The largest number that any process brings, on all of them alike.

    Example:
        >>> Agreement().now(3)
        3
    """

    def __init__(self):
        self.pending: tuple[dist.Work, Tensor] | None = None

    def soon(self, number: int) -> int:
        """That of the last call, 0 at first; this call's travels meanwhile. With one process, this call's."""
        if world() == 1:
            return number
        with watched():
            last = self._arrived()
            box = torch.tensor([number])
            self.pending = dist.all_reduce(box, dist.ReduceOp.MAX, async_op=True), box
        return last

    def now(self, number: int) -> int:
        """That of this call."""
        self.soon(number)
        if world() == 1:
            return number
        with watched():
            return self._arrived()

    def _arrived(self) -> int:
        if self.pending is None:
            return 0
        work, box = self.pending
        work.wait()
        self.pending = None
        return int(box)


def first_to_say(what: str) -> bool:
    """Whether no other process has asked this: then it is this one that prints the line."""
    if not _launched():
        return True
    try:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(*address, timeout=timedelta(seconds=5), wait_for_workers=False)
        return store.add(f"{what}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", 1) == 1
    except RuntimeError:  # the process that kept the store is gone
        return True


# Rows of a batch, and gradients


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

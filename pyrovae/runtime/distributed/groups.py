"""The processes of a run: who is who, how they meet, and which device is whose."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from datetime import timedelta

import torch
import torch.distributed as dist

from pyrovae.runtime.errors import FieldError
from pyrovae.runtime.texts import first_line

PATIENCE = timedelta(minutes=30)  # for what the others do, the first's validation say, before it is an error
_NEEDED = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}  # variables; below, how such begin
_OF_LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC_")


class LostProcess(OSError):
    """Another process of the run ended, or does not answer."""


def world() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this one, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Makes one group of the processes that torchrun has started, by gloo on CPUs and nccl on GPUs.

    A failing process leaves the group only when it exits, so that it can report first.

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
        reason = first_line(error)
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

"""Several processes that train one model: who writes, what all agree on, and how their gradients meet.

`torchrun` starts the processes and numbers them. Number 0, the first, prints and writes. Each works on its
rows of every batch. With one process, or none of PyTorch's process groups, everything here is a no-op.
"""

from pyrovae.runtime.distributed.agreements import (
    Agreement,
    broadcast,
    from_first,
    gathered,
    in_turn,
    locked,
    together,
    wait,
    watched,
)
from pyrovae.runtime.distributed.gradients import (
    average,
    norms_to_synchronise,
    own,
    own_rows,
    parallel,
    shard,
    share,
    synchronised_norms,
    tensors_in,
    total,
    weights,
)
from pyrovae.runtime.distributed.groups import (
    PATIENCE,
    LostProcess,
    check_group,
    first_to_say,
    joined,
    launcher,
    own_device,
    rank,
    without_launcher,
    world,
)

__all__ = [
    "PATIENCE",
    "Agreement",
    "LostProcess",
    "average",
    "broadcast",
    "check_group",
    "first_to_say",
    "from_first",
    "gathered",
    "in_turn",
    "joined",
    "launcher",
    "locked",
    "norms_to_synchronise",
    "own",
    "own_device",
    "own_rows",
    "parallel",
    "rank",
    "shard",
    "share",
    "synchronised_norms",
    "tensors_in",
    "together",
    "total",
    "wait",
    "watched",
    "weights",
    "without_launcher",
    "world",
]

"""Whether some sites of a program depend on others, found out by running it once more at the same values."""

import contextlib
import random
from collections.abc import Iterable, Iterator

import numpy as np
import pyro
import pyro.poutine as poutine
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from pyrovae.estimators.traces import Program, traced
from pyrovae.runtime.buffers import kept_buffers

# Functions that read nothing but the form of a tensor.
_FORMS = {"__get__", "__len__", "dim", "element_size", "get_device", "is_complex", "is_contiguous"}
_FORMS |= {"is_floating_point", "is_signed", "ndimension", "nelement", "numel", "size", "stride", "type"}


def depends(
    program: Program,
    trace: poutine.Trace,
    num_particles: int,
    dim: int,
    *,
    on: Iterable[str],
    of: Iterable[str],
) -> bool:
    """Whether a density of some sites may depend on the samples of others, by way of PyTorch's functions.

    The program is run without gradients, at the samples of its trace; noise, buffers and modes are left as they
    were. A number that leaves PyTorch (`.item()`, or a branch on a value) counts as seen by all sites.

    Args:
        program: A model or a guide.
        trace: A trace of it.
        num_particles, dim: The plate over particles.
        on: The sites whose samples are followed.
        of: The sites whose densities are looked at.
    """
    followed = [trace.nodes[name]["value"] for name in on]
    with torch.no_grad(), _noise_kept(), kept_buffers(), pyro.validation_enabled(False):
        with _Followed(followed) as mode:
            again = traced(program, num_particles, dim, at=trace)
            densities = [again.nodes[n]["fn"].log_prob(trace.nodes[n]["value"]) for n in of]
        return mode.has_left or any(id(density) in mode.seen for density in densities)


class _Followed(TorchFunctionMode):
    """Notes what is made of some tensors.

    Attributes:
        seen: The tensors and all that is made of them, by identity.
        has_left: Whether some became a number outside PyTorch.
    """

    def __init__(self, tensors: list[Tensor]):
        super().__init__()
        self.seen, self.has_left = {id(tensor): tensor for tensor in tensors}, False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        result = func(*args, **kwargs)
        if not any(id(tensor) in self.seen for tensor in given):
            return result
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if result is None:
            made = given[:1]  # what an assignment changes
        if not made and func.__name__ not in _FORMS:
            self.has_left = True
        self.seen.update({id(tensor): tensor for tensor in made})
        return result


@contextlib.contextmanager
def _noise_kept() -> Iterator[None]:
    """On leaving, the states of random number generators are as they were."""
    plain, arrays = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
            yield
    finally:
        random.setstate(plain)
        np.random.set_state(arrays)

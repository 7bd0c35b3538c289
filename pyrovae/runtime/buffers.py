"""Buffers of modules, such as running statistics, that must not change when a program is run again."""

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook


@contextlib.contextmanager
def kept_buffers() -> Iterator[None]:
    """Sets the buffers of all modules that are called while it is entered back to what they held before.

    A module in training mode still normalises by its batch's statistics, for example, but does not count
    the batch. Graphs from before and from within can be run backward afterwards.
    """
    held: list[tuple[nn.Module, str, Tensor, Tensor]] = []
    seen: set[nn.Module] = set()

    def hold(module: nn.Module, args: tuple) -> None:
        if module not in seen:
            seen.add(module)
            for name, buffer in module.named_buffers(recurse=False):
                held.append((module, name, buffer, buffer.detach().clone()))

    handle = register_module_forward_pre_hook(hold)
    try:
        yield
    finally:
        handle.remove()
        for module, name, buffer, value in held:
            buffer.data.copy_(
                value
            )  # without .data, a graph that has saved the buffer would refuse to run back
            module._buffers[name] = buffer

"""The random states of PyTorch, Python and numpy: to seed them, to keep them, and to put them back."""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


@contextlib.contextmanager
def seeded(seed: int, device: torch.device | str) -> Iterator[None]:
    """Seeds the default generators of torch, on the CPU and the device, of numpy and of Python.

    On leaving, all are as they were.
    """
    device = torch.device(device)
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def random_states(device: torch.device) -> dict[str, Any]:
    """Every random state (torch's, Python's, numpy's) as tensors and plain types."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    states = {
        "torch": torch.get_rng_state(),
        "python": [version, list(internal), gauss],
        "numpy": [name, keys.tolist(), position, has_gauss, cached],
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: dict[str, Any], device: torch.device) -> None:
    """The inverse of `random_states`."""
    version, internal, gauss = states["python"]
    name, keys, position, has_gauss, cached = states["numpy"]
    torch.set_rng_state(states["torch"].cpu())
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)


def all_random_states() -> dict[str, Any]:
    """The random states of torch, Python, numpy and every GPU that is in use."""
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    return random_states(torch.device("cpu")) | {f"cuda:{gpu}": torch.cuda.get_rng_state(gpu) for gpu in gpus}


def set_all_random_states(states: dict[str, Any]) -> None:
    """The inverse of `all_random_states`."""
    set_random_states(states, torch.device("cpu"))
    for name in states:
        if name.startswith("cuda:"):
            torch.cuda.set_rng_state(states[name], name)


@contextlib.contextmanager
def preserved_random_states() -> Iterator[None]:
    """On leaving, every random state is as it was."""
    states = all_random_states()
    try:
        yield
    finally:
        set_all_random_states(states)

"""A VAE's functions applied to many images or codes, and the checks of arguments that pictures share."""

from collections.abc import Callable
from itertools import repeat
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from pyrovae.data.files import FilePixels
from pyrovae.runs.loading import load
from pyrovae.runtime.errors import FieldError
from pyrovae.vae import VAE

BATCH = 100  # images or codes that go through a VAE at once
MOST = 50  # images along a side of a picture


def continuous(run: str | Path, what: str, which: str, device: str, trust: bool) -> VAE:
    """Loads a run's VAE, and checks that points between its codes can be decoded."""
    vae = load(run, which=which, device=device, trust=trust)
    if vae.posterior.discrete:
        raise ValueError(
            f"expected a run with a continuous latent space for {what}, got one whose codes are bits, "
            "with nothing between them: see its samples instead"
        )
    return vae


def in_batches(
    function: Callable[..., Tensor], inputs: Tensor | FilePixels, labels: Tensor | None = None
) -> Tensor:
    """Applies the function to all inputs with their labels, a batch at a time, with the results on the CPU."""
    of_labels = repeat(None) if labels is None else labels.split(BATCH)
    return torch.cat(
        [function(batch, y).detach().cpu() for batch, y in zip(inputs.split(BATCH), of_labels, strict=False)]
    )


def decoded_as(vae: VAE, z: Float[Tensor, "A B L"], label: int) -> Float[Tensor, "A B C H W"]:
    """Decoded points of one class, where the VAE is conditional."""
    flat = z.flatten(0, 1)
    return in_batches(vae.decode, flat, torch.full((len(flat),), label)).unflatten(0, z.shape[:2])


def check_class(vae: VAE, label: int | None) -> None:
    """Checks that a VAE has this class, if one is asked for."""
    if label is not None and not vae.classes:
        raise FieldError(
            "expected digit with a conditional VAE, got one without classes: train it --conditional",
            field="digit",
        )
    if label is not None:
        check_range("digit", label, 0, vae.classes - 1)


def check_range(name: str, value: int, low: int, high: int) -> None:
    """Checks that a number lies from `low` to `high`."""
    if not low <= value <= high:
        raise FieldError(f"expected {name} from {low} to {high}, got {value}", field=name)

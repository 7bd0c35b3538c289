"""Loads the VAE of a run."""

from pathlib import Path
from typing import Any

import torch

from pyrovae.runs.directories import RunError, admit, read_config
from pyrovae.runtime.errors import FieldError
from pyrovae.runtime.schemas import Best, State
from pyrovae.training.checkpoints import explained, load_checkpoint, load_model
from pyrovae.vae import VAE


def load(
    run: str | Path, *, which: str = "best", device: torch.device | str = "cpu", trust: bool = False
) -> VAE:
    """A trained VAE, in evaluation mode.

    Args:
        which: "best", the parameters with the best validation objective, or "last".
        trust: Whether to import foreign code that the run names, a guide of one's own, and so to run it. What
            the program has imported already needs no trust.

    Raises:
        RunError: The directory is no run, or it names foreign code and `trust` is False.
        CheckpointError: The checkpoint is missing, damaged or of another run.
    """
    files = {"best": "best.pt", "last": "checkpoint.pt"}
    if which not in files:
        raise FieldError(f"expected which in {', '.join(files)}, got {which!r}", field="which")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        if "out of memory" in str(error):
            raise
        raise ValueError(f"expected a device that PyTorch has here, got {device}") from None
    directory = Path(run)
    config, data = read_config(directory)
    path = directory / files[which]
    if which == "best" and not path.exists() and (directory / files["last"]).exists():
        raise RunError(
            f"expected the best of at least one epoch in {path}, got no such file: resume the run first"
        )
    state = load_checkpoint(path, device, holds=Best if which == "best" else State)
    _check_weights(directory, path, state)
    admit(directory, config, trust=trust)
    with explained(path):
        vae = config.make_vae(tuple(data["shape"]), data["levels"], data.get("classes", 0)).to(device)
        load_model(vae, state["model"])
    return vae.eval()


def _check_weights(directory: Path, path: Path, state: dict[str, Any]) -> None:
    """Checks that a run's settings declare no more weights than its checkpoint has, before they are made.

    The encoder mirrors the decoder, but a guide need not have it.
    """
    config, data = read_config(directory)
    with explained(path):
        declared = config.decoder_weights(tuple(data["shape"]), data["levels"], data.get("classes", 0))
        held = sum(tensor.numel() for tensor in state["model"].values())
        if declared > held:
            raise ValueError(
                f"{held:,} weights, where {directory / 'config.json'} declares at least {declared:,}"
            )


def load_best(directory: Path, vae: VAE) -> None:
    """Gives a VAE the best parameters of a run."""
    state = load_checkpoint(directory / "best.pt", vae.zeros.device, holds=Best)
    with explained(directory / "best.pt"):
        load_model(vae, state["model"])

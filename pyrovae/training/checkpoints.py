"""Files that a run continues from: written whole, read without executing anything, checked by their CRCs."""

import contextlib
import io
import json
import os
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from pyrovae.runtime.inputs import MOST
from pyrovae.runtime.schemas import Row, Saved, check, refused
from pyrovae.runtime.sizes import check_fits
from pyrovae.runtime.whole_files import replacing

FORMAT = "pyrovae checkpoint 1"
OF_DENSITY = "elbo", "kl", "validation_elbo", "validation_kl"  # metrics that an autoencoder has none of


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or of another model."""


def read_metrics(directory: Path) -> list[Row]:
    """The rows of `metrics.jsonl`, up to the first that is incomplete; none if there is no file.

    Raises:
        CheckpointError: A line is no text, or it is JSON but no row of metrics.
    """
    path, rows, missing = directory / "metrics.jsonl", [], set()
    if not path.exists():
        return rows
    with refused(CheckpointError, f"metrics of epochs in {path}"):
        lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        with refused(CheckpointError, f"metrics of an epoch in line {number} of {path}"):
            try:
                row = json.loads(line.decode())
            except json.JSONDecodeError:
                break
            check(row, Row)
            missing |= {row[name] is None for name in OF_DENSITY}
            if len(missing) > 1:
                raise ValueError("a KL and an ELBO that are null in some places only")
            large = {name: float(value) for name, value in row.items() if _is_large(value)}
        rows.append({"bound": row["elbo"], "validation_bound": row["validation_elbo"]} | row | large)
    return rows


def _is_large(value: Any) -> bool:
    """Whether this is a number without a point that arrays cannot take as such."""
    return isinstance(value, int) and abs(value) > MOST


def read_history(directory: Path, epochs: int) -> list[Row]:
    """The metrics of these many epochs.

    Raises:
        CheckpointError: There are fewer, or other lines.
    """
    rows = read_metrics(directory)[:epochs]
    if len(rows) < epochs:
        raise CheckpointError(
            f"expected the metrics of {epochs} epochs in {directory / 'metrics.jsonl'}, got {len(rows)}"
        )
    return rows


def load_checkpoint(
    path: Path, device: torch.device | str, contents: bytes | None = None, *, holds: Any = Saved
) -> dict[str, Any]:
    """The contents of a checkpoint, which are plain types and tensors only: nothing in it is executed.

    Args:
        path: The file.
        device: Where its tensors go.
        contents: The bytes of the file, which then need not be at hand.
        holds: The type in `schemas` that it must fit.

    Raises:
        CheckpointError: No such file, a damaged one, or one of another program.
    """
    if contents is None and not path.is_file():
        raise CheckpointError(f"expected a checkpoint at {path}, got no such file")
    with explained(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's doubts about a foreign pickle, which it then refuses
        with open(path, "rb") if contents is None else io.BytesIO(contents) as file:
            size = file.seek(0, os.SEEK_END)
            _check_size(path, file, size)
            _verify(file)
            file.seek(0)
            state = torch.load(file, map_location=device, weights_only=True)
            _check_tensors(state, size)
        check(state, Saved)
    if state["format"] != FORMAT:
        raise CheckpointError(f"expected a {FORMAT!r} at {path}, got {state['format']!r}")
    with explained(path):
        check(state, holds)
    return state


def load_model(model: nn.Module, saved: dict[str, Any]) -> None:
    """`load_state_dict`, which by itself drops the imaginary parts of complex numbers.

    Raises:
        ValueError: They are the parameters of another model.
        RuntimeError: The same, in the words of PyTorch.
    """
    own = model.state_dict()
    for name, value in saved.items():
        if name in own and torch.is_tensor(value) and value.is_complex() and not own[name].is_complex():
            raise ValueError(f"complex numbers in {name}")
    model.load_state_dict(saved)


def _check_size(path: Path, file: BinaryIO, size: int) -> None:
    """Checks that all parts are in the file, and that they fit into memory.

    Raises:
        ValueError: The parts declare more bytes than there are in the file.
        CheckpointError: They do not fit into memory.
    """
    with zipfile.ZipFile(file) as parts:
        declared = sum(max(part.file_size, part.compress_size) for part in parts.infolist())
    if declared > size:
        raise ValueError(f"parts that declare {declared:,} bytes, in a file of {size:,}")
    try:
        check_fits(path, declared, f"parts of {declared:,} bytes")
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def _check_tensors(state: Any, size: int) -> None:
    """Checks that tensors have no more numbers than the file has.

    Steps of zero from number to number let a tensor declare any size, which it then takes when it is copied.

    Raises:
        ValueError: They have more.
    """
    left, seen, storages = [state], set(), {}
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list | tuple | set):
            left += value
        elif isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = max(storage.nbytes(), value.nbytes)
    declared = sum(storages.values())
    if declared > size:
        raise ValueError(f"tensors that declare {declared:,} bytes, in a file of {size:,}")


def _verify(file: BinaryIO) -> None:
    """Compares every part of the file with its CRC-32, which `torch.load` does not.

    Raises:
        ValueError: A part is another than was written, or compressed, which `torch.save` never does.
    """
    with zipfile.ZipFile(file) as parts:
        for part in parts.infolist():
            if part.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"a compressed part, {part.filename}")
        damaged = parts.testzip()
    if damaged is not None:
        raise ValueError(f"another checksum of its part {damaged} than was saved with it")


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns whatever a damaged or foreign file makes torch raise into one line."""
    with refused(CheckpointError, f"an undamaged checkpoint of this run at {path}"):
        yield


def save_atomically(state: dict[str, Any], path: Path) -> None:
    """`torch.save`, such that a kill at any moment leaves the old file or the new one.

    Raises:
        WriteError: It cannot be written.
    """
    with replacing(path) as file:
        torch.save(state, file)

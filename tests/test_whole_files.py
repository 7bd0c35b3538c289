"""Files that are whole or not there: whatever is written, and whatever the system refuses."""

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from pyrovae.runs.pictures import Latents
from pyrovae.runtime import locks
from pyrovae.runtime.whole_files import (
    WriteError,
    append_line,
    clear_temporary,
    is_new,
    replacing,
    save_figure,
    write_atomically,
)
from pyrovae.training.checkpoints import save_atomically

LARGE = torch.zeros(10_000)
WRITERS = {
    "text.json": lambda path: write_atomically(path, "x" * 10_000),
    "checkpoint.pt": lambda path: save_atomically({"large": LARGE}, path),
    "figure.png": lambda path: save_figure(Figure(figsize=(9, 9)), path, dpi=200),
    "latents.npz": lambda path: Latents(LARGE[:, None]).save(path),
    "metrics.jsonl": lambda path: append_line(path, "x" * 10_000),
}


@contextlib.contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file of this process may become larger, which is refused as a full disk is."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("size", [0, 1000])
def test_what_does_not_fit_is_one_line_and_leaves_what_was_there(tmp_path, name, size):
    path = tmp_path / name
    path.write_text("old")
    with room_for(size), pytest.raises(WriteError) as refused:
        WRITERS[name](path)
    assert str(refused.value) == f"expected to write {path}, got: file too large"
    assert not refused.value.of_place
    assert path.read_text()[:3] == "old"
    assert [other.name for other in tmp_path.iterdir()] == [name]
    WRITERS[name](path)


@pytest.mark.parametrize(
    "name", sorted(WRITERS.keys() - {"latents.npz"})
)  # which makes the folders that it needs
def test_a_place_that_is_not_there_is_one_line(tmp_path, name):
    with pytest.raises(WriteError, match="got: no such file or directory") as refused:
        WRITERS[name](tmp_path / "none" / name)
    assert refused.value.of_place


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "file"
    with replacing(path) as first, replacing(path) as second:
        first.write(b"first")
        second.write(b"second, and longer")
    assert path.read_bytes() == b"first"  # which was done last
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_of_the_caller_s_own_is_passed_on(tmp_path):
    with pytest.raises(RuntimeError, match="its own"), replacing(tmp_path / "file"):
        raise RuntimeError("its own")
    assert list(tmp_path.iterdir()) == []


def test_temporary_files_of_the_dead_are_cleared_and_those_in_use_stay(tmp_path):
    (tmp_path / ".checkpoint.pt.01234567.part").touch()
    (tmp_path / "checkpoint.pt.part").touch()  # of an earlier version
    (tmp_path / "film.part").touch()  # somebody's own
    with replacing(tmp_path / "file") as file:
        file.write(b"whole")
        clear_temporary(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "film.part"}
    clear_temporary(tmp_path / "none")


def test_whoever_writes_a_file_clears_what_the_dead_have_left_of_it(tmp_path):
    names = {".*.png.01234567.part", ".curves.png.01234567.part", ".*.png.of-mine.part"}
    for name in names:
        (tmp_path / name).touch()
    write_atomically(tmp_path / "*.png", "whole")
    assert {path.name for path in tmp_path.iterdir()} == names - {".*.png.01234567.part"} | {"*.png"}


def test_what_a_process_leaves_that_is_killed_early_is_as_good_as_new(tmp_path):
    def fill(*names: str) -> Path:
        place = tmp_path / str(len(list(tmp_path.iterdir())))
        place.mkdir()
        for name in names:
            path = place / name
            path.mkdir() if name.endswith("/") else (path.parent.mkdir(exist_ok=True), path.touch())
        return place

    left = ("config.json", "figures")
    assert is_new(fill(), left)
    assert is_new(fill(locks.NAME, ".config.json.0123abcd.part", "checkpoint.pt.part"), left)
    assert is_new(fill("config.json", "figures/"), left)
    assert not is_new(fill("config.json", "figures/"))
    assert not is_new(fill("config.json", "figures/curves.png"), left)
    assert not is_new(fill("metrics.jsonl"), left)
    assert not is_new(fill("holiday.part"), left)

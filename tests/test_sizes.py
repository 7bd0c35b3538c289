"""Files that declare more than there is: refused in one line that names them, before anything is allocated."""

import contextlib
import ctypes
import io
import json
import resource
import struct
import sys
import time
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from numpy.lib import format as npy
from PIL import Image

from benchmarks.faults.shared import Child
from pyrovae import runs
from pyrovae.cli.group import main
from pyrovae.data import folders, load_dataset
from pyrovae.data.arrays import _needed
from pyrovae.runs.config import Config
from pyrovae.runtime import sizes
from pyrovae.runtime.sizes import Declared, declared_arrays
from pyrovae.training import checkpoints
from pyrovae.training.checkpoints import load_checkpoint

LITTLE = 50_000_000  # bytes that a refused file may take


def header(shape: tuple[int, ...], descr: str = "|u1", fortran: bool = False) -> bytes:
    """The head of a `.npy` that declares this."""
    file = io.BytesIO()
    npy.write_array_header_1_0(file, {"descr": descr, "fortran_order": fortran, "shape": shape})
    return file.getvalue()


def npz(path: Path, *parts: tuple[str, bytes, int], method: int = zipfile.ZIP_DEFLATED) -> Path:
    """A `.npz` of parts: a name, how it begins, and how many zeros follow."""
    with zipfile.ZipFile(path, "w", method, compresslevel=1) as file:
        for name, head, zeros in parts:
            with file.open(name, "w", force_zip64=True) as stream:
                stream.write(head)
                for start in range(0, zeros, 2**24):
                    stream.write(bytes(min(2**24, zeros - start)))
    return path


def lying(path: Path, declared: int) -> Path:
    """A `.npz` whose directory declares a size that its compressed part does not have."""
    npz(path, ("images.npy", header((declared // 64, 8, 8)), 6400))
    contents = bytearray(path.read_bytes())
    place = contents.rindex(b"PK\x01\x02")
    contents[place + 24 : place + 28] = struct.pack("<I", min(declared, 2**32 - 2))
    path.write_bytes(contents)
    return path


def png(path: Path, side: int) -> Path:
    """A grey picture of this many pixels a side, which takes few bytes."""

    def chunk(kind: bytes, contents: bytes) -> bytes:
        return (
            struct.pack(">I", len(contents)) + kind + contents + struct.pack(">I", zlib.crc32(kind + contents))
        )

    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )
    return path


def sparse(path: Path, head: bytes, size: int) -> Path:
    """A file that declares its size by its end alone, and has no blocks on the disk between."""
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(size)
    return path


class Begun(Exception):
    """A file is read after all."""


def begin(*arguments, **settings):
    raise Begun


@pytest.fixture
def free(monkeypatch):
    """free(bytes): as much memory is free."""

    def set_to(number: int) -> None:
        monkeypatch.setattr(sizes, "free_memory", lambda: number)

    return set_to


def refused(path: Path, call=load_dataset) -> str:
    """What is said of a file that is refused, in one line, soon, and without much memory."""
    started = time.monotonic()
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="expected") as caught:
            call(str(path))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert peak < LITTLE
    assert time.monotonic() - started < 5
    return message


# Arrays


ARRAYS = {
    "images": [("images.npy", header((10_000_000, 28, 28)), 0)],
    "floats": [("images.npy", header((10_000_000, 28, 28), "<f8"), 0)],
    "labels": [("images.npy", header((6, 8, 8)), 384), ("labels.npy", header((10**11,), "<i8"), 0)],
    "an element": [("images.npy", header((10, 8, 8), "|V100000000"), 0)],
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_an_array_that_its_part_does_not_hold_is_refused(tmp_path, kind):
    message = refused(npz(tmp_path / "bomb.npz", *ARRAYS[kind]))
    assert "to hold plain numeric arrays, got: an array " in message
    assert " bytes in a part of " in message


def test_arrays_that_do_not_fit_are_refused_before_they_are_read(tmp_path, free, monkeypatch):
    free(60_000_000)
    path = npz(tmp_path / "bomb.npz", ("images.npy", header((20_000, 28, 28)), 20_000 * 28 * 28))
    assert path.stat().st_size < 200_000
    monkeypatch.setattr(np, "load", begin)
    assert refused(path) == (
        f"expected {path} to fit into memory, got 15,680,000 bytes of declared arrays, which take 0.13 GB "
        "where 0.06 GB are free: save its images alone as a .npy, which is read from the file batch by batch"
    )
    free(127_000_000)
    with pytest.raises(Begun):
        load_dataset(str(path))


def test_a_directory_that_lies_is_refused(tmp_path):
    assert "expected" in refused(lying(tmp_path / "bomb.npz", 2**32))


def test_a_header_that_declares_its_own_length_is_read_no_further_than_headers_go(tmp_path):
    head = npy.magic(2, 0) + struct.pack("<I", 2**31)
    path = npz(tmp_path / "bomb.npz", ("images.npy", head, 300_000_000))
    assert "to hold plain numeric arrays" in refused(path)


@pytest.mark.parametrize(
    ("parts", "method", "expected"),
    [
        (
            [("images.npy", header((6, 8, 8)), 384)] * 2,
            zipfile.ZIP_DEFLATED,
            "two arrays with the name 'images'",
        ),
        ([("images.npy", header((6, 8, 8)), 384)], zipfile.ZIP_LZMA, "that numpy has not compressed"),
        ([("images.npy", npy.magic(3, 0), 384)], zipfile.ZIP_DEFLATED, "a header of version 3.0"),
        ([("images.npy", header((-1, 8, 8)), 384)], zipfile.ZIP_DEFLATED, "an array of the shape (-1, 8, 8)"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_what_numpy_does_not_write_is_refused(tmp_path, parts, method, expected):
    assert expected in refused(npz(tmp_path / "bomb.npz", *parts, method=method))


def test_an_array_alone_takes_little_memory_whatever_its_size(tmp_path, free):
    """Whatever its number of images takes does count: their orders are in memory."""
    path = sparse(tmp_path / "large.npy", header((10**9, 1, 1)), 10**9 + 200)
    free(10**9)
    assert "1,000,000,000 bytes of declared arrays, which take 64." in refused(path)
    path = tmp_path / "columns.npy"
    np.save(path, np.asfortranarray(np.zeros((1000, 28, 28))))
    free(10**6)
    assert "to fit into memory" in refused(path)
    path = tmp_path / "images.npy"
    np.save(path, np.full((1000, 28, 28), 200, np.uint8))
    free(4 * 10**6)
    assert len(load_dataset(str(path)).train) == 800


# What is computed is what is allocated


def peak(work) -> int:
    """Bytes of main memory that a forked process takes for this at its peak, beyond what it began with."""

    def measure() -> None:
        with contextlib.suppress(AttributeError):  # of glibc alone
            ctypes.CDLL(None).malloc_trim(0)  # or what earlier tests have freed is used again
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = status("VmRSS")
        work()
        print("peak", status("VmHWM") - before)

    log = Path("peak.log")
    child = Child(measure, log)
    assert child.wait() == 0, child.said
    return int(child.said.split()[-1])


def status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells the peak of a process")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((20_000, 28, 28), np.uint8),
        ((7_000, 28, 28, 3), np.uint8),
        ((14_000, 28, 28), np.float32),
        ((5_000, 28, 28, 3), np.float32),
        ((14_000, 28, 28), np.float64),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else f"{len(value)}-d",
)
def test_the_memory_that_is_computed_is_what_reading_takes(tmp_path, monkeypatch, shape, dtype):
    monkeypatch.chdir(tmp_path)
    np.savez("images.npz", images=np.ones(shape, dtype) * dtype(200 if dtype is np.uint8 else 1))
    with open("images.npz", "rb") as file:
        needed = _needed(declared_arrays(file))
    load_dataset("images.npz")  # what is imported and cached once
    taken = peak(lambda: load_dataset("images.npz"))
    buffered = Path("images.npz").stat().st_size  # what is read may lie in a buffer besides
    assert 0.85 * needed < taken < 1.1 * needed + buffered + 8e6


# Pictures


def test_pillows_limit_is_an_error(tmp_path):
    over = png(tmp_path / "warned" / "a.png", 10_000)
    assert over.stat().st_size < 200
    assert f"expected an image in {over}, got: Image size (100000000 pixels) exceeds limit" in refused(
        over.parent
    )
    over = png(tmp_path / "refused" / "a.png", 20_000)
    assert f"expected an image in {over}, got: Image size (400000000 pixels) exceeds limit" in refused(
        over.parent
    )


def test_a_folder_is_refused_by_the_sum_of_what_its_pictures_declare(tmp_path, free, monkeypatch):
    for number in range(20):
        png(tmp_path / "many" / f"{number}.png", 1000)
    free(150_000_000)
    monkeypatch.setattr(folders, "_read_image", begin)
    assert refused(tmp_path / "many") == (
        f"expected {tmp_path / 'many'} to fit into memory, got 20 images that declare 20,000,000 pixels, which "
        "take 0.18 GB where 0.15 GB are free"
    )
    free(400_000_000)
    with pytest.raises(Begun):
        load_dataset(str(tmp_path / "many"))
    message = refused(tmp_path / "many", lambda path: load_dataset(path, image_size=2000))
    assert message.endswith(": lower the image size")


def test_coloured_pictures_take_more(tmp_path, free):
    (tmp_path / "one").mkdir()
    Image.new("RGB", (400, 400), "red").save(tmp_path / "one" / "a.png")
    Image.new("L", (400, 400), 200).save(tmp_path / "one" / "b.png")
    free(2 * 160_000 * 27 + 16 * 160_000 - 1)
    assert "2 images that declare 320,000 pixels" in refused(tmp_path / "one")


# Downloaded datasets


def test_files_of_a_dataset_are_refused_by_their_size(tmp_path, free):
    import torchvision.datasets.mnist  # noqa: F401  (takes memory of its own)

    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        sparse(raw / f"{name}-ubyte", struct.pack(">IIII", 2051, 10**9, 28, 28), 10**10)
    free(10**10)
    message = refused(raw, lambda _: load_dataset("mnist", data_dir=tmp_path))
    assert "files of 40,000,000,000 bytes, which take 320.00 GB where 10.00 GB are free" in message


def test_what_an_old_torchvision_has_left_is_not_read(tmp_path, mnist_dir):
    (tmp_path / "MNIST" / "processed").mkdir(parents=True)
    (tmp_path / "MNIST" / "raw").symlink_to(mnist_dir / "MNIST" / "raw")
    for name in ("training.pt", "test.pt"):
        torch.save(
            (torch.zeros(9, 28, 28, dtype=torch.uint8), torch.zeros(9)), tmp_path / "MNIST/processed" / name
        )
    assert len(load_dataset("mnist", data_dir=tmp_path, limit=(20, 20)).test) == 10_000


# Checkpoints


def saved(path: Path, **contents) -> Path:
    torch.save({"format": checkpoints.FORMAT} | contents, path)
    return path


def load(path: str) -> dict:
    return load_checkpoint(Path(path), "cpu")


def test_a_checkpoint_of_parts_that_overlap_is_refused(tmp_path):
    path = saved(tmp_path / "bomb.pt", zeros=torch.zeros(100_000))
    with zipfile.ZipFile(path) as file:
        large = max(file.infolist(), key=lambda part: part.file_size)
        file.filelist.append(large)
    with zipfile.ZipFile(path, "a") as file:
        for _ in range(1000):
            file.filelist.append(file.getinfo(large.filename))
        file._didModify = True
    assert "parts that declare 400," in refused(path, load)


def test_a_checkpoint_that_does_not_fit_is_refused_before_it_is_read(tmp_path, free, monkeypatch):
    path = saved(tmp_path / "large.pt", zeros=torch.zeros(100_000))
    free(100_000)
    monkeypatch.setattr(torch, "load", begin)
    assert f"expected {path} to fit into memory, got parts of 40" in refused(path, load)


@pytest.mark.parametrize("place", ["model", "list"])
def test_a_tensor_that_declares_more_than_its_file_holds_is_refused(tmp_path, place):
    wide = torch.zeros(1).expand(10**6, 10**6)
    path = saved(tmp_path / "bomb.pt", **{place: {"weight": wide} if place == "model" else [[wide]]})
    assert path.stat().st_size < 5000
    assert "tensors that declare 4,000,000,000,0" in refused(path, load)


def test_tensors_that_share_numbers_are_what_they_are(tmp_path):
    one = torch.arange(10_000.0)
    path = saved(tmp_path / "tied.pt", model=dict.fromkeys("abcdef", one) | {"view": one[5:]})
    assert load(str(path))["model"]["view"][0] == 5


def test_a_checkpoint_that_builds_lists_of_lists_is_not_walked_twice(tmp_path):
    lists = [1.0]
    for _ in range(60):
        lists = [lists, lists]
    assert load(str(saved(tmp_path / "nested.pt", lists=lists)))["format"] == checkpoints.FORMAT


# What is free


def test_the_least_of_what_system_groups_and_process_leave_is_free(tmp_path):
    assert 0 < sizes.free_memory() < 2**50
    group = tmp_path / "memory" / "jobs" / "one"
    group.mkdir(parents=True)
    (tmp_path / "member").write_text("4:memory:/jobs/one\n0::/nowhere\n")
    for folder, limit in ((group, 2**63 - 4096), (group.parent, 5000), (group.parent.parent, 9000)):
        (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
        (folder / "memory.usage_in_bytes").write_text("3000\n")
        (folder / "memory.stat").write_text("inactive_file 1\ntotal_inactive_file 500\n")
    assert sorted(sizes._of_groups(tmp_path, tmp_path / "member"))[:2] == [2500, 6500]
    (tmp_path / "unified").mkdir()
    (tmp_path / "member").write_text("0::/unified\n")
    for name, text in {"max": "max", "current": "3000", "stat": "inactive_file 500"}.items():
        (tmp_path / "unified" / f"memory.{name}").write_text(text)
    assert list(sizes._of_groups(tmp_path, tmp_path / "member")) == []
    (tmp_path / "unified" / "memory.max").write_text("4000")
    assert list(sizes._of_groups(tmp_path, tmp_path / "member")) == [1500]


@pytest.mark.skipif(sys.platform != "linux", reason="limits of a process are read from /proc")
def test_the_limit_of_a_process_counts(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (2**50, 2**50))
    [left] = sizes._of_process()
    assert 2**49 < left < 2**50
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert list(sizes._of_process()) == []


def test_a_header_says_what_is_stored(tmp_path):
    np.save(tmp_path / "a.npy", np.asfortranarray(np.zeros((3, 4), np.float16)))
    with open(tmp_path / "a.npy", "rb") as file:
        declared = Declared.of(file)
    assert (declared.shape, declared.dtype, declared.fortran, declared.nbytes) == ((3, 4), np.float16, True, 24)


def test_a_bomb_is_one_line_of_the_command_line(tmp_path, free):
    free(10**6)
    path = npz(tmp_path / "bomb.npz", ("images.npy", header((6000, 28, 28)), 6000 * 28 * 28))
    done = CliRunner().invoke(main, ["train", "-d", str(path)])
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(f"Error: expected {path} to fit into memory, got ")
    assert "network" not in done.stderr


# Models


@pytest.mark.parametrize(
    "settings", [{"hidden": (9, 5)}, {"network": "cnn", "channels": (4, 3)}], ids=["mlp", "cnn"]
)
@pytest.mark.parametrize("conditional", [False, True])
def test_the_weights_of_a_decoder_are_counted_without_making_them(settings, conditional):
    config = Config(**settings, latent_dim=3, conditional=conditional)
    decoder = config.make_vae((1, 8, 8), 17, 10).decoder
    made = sum(parameter.numel() for parameter in decoder.parameters())
    assert config.decoder_weights((1, 8, 8), 17, 10) == made


@pytest.mark.usefixtures("no_figures", "unchecked")
@pytest.mark.parametrize(
    ("place", "name", "value"),
    [
        ("config", "latent_dim", 2**31 - 1),
        ("config", "hidden", [2**31 - 1] * 2),
        ("data", "shape", [1, 2**30, 2**30]),
    ],
)
def test_settings_that_declare_more_weights_than_there_are_make_none(tmp_path, place, name, value):
    run, _ = runs.train(
        Config(limit=(16, 8), hidden=(4,), epochs=1, figure_epochs=(), compile="off"), out=tmp_path / "run"
    )
    contents = json.loads((run / "config.json").read_text())
    contents[place][name] = value
    (run / "config.json").write_text(json.dumps(contents))
    message = refused(run, runs.load)
    assert message.startswith("expected ")

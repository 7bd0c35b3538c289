"""Images that stay in their file: the same as in memory, with bounded memory, and no thread left over."""

import dataclasses
import os
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from pyrovae import runs
from pyrovae.data import Images, files, load_dataset
from pyrovae.data import datasets as data
from pyrovae.evaluation.bounds import evaluate, pca_squared_error, squared_error
from pyrovae.runs import assessment, pictures
from pyrovae.runs.config import Config
from pyrovae.runs.laboratory import Measurement
from pyrovae.training import loop as training
from pyrovae.training.checkpoints import read_metrics
from tests.rounding import nearly

LINUX = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")

# An image in a file starts elsewhere in memory, which may change how its terms are grouped. A log weight of up
# to 100 nats comes from sums of 64, 8, 2, 8 and 64 terms in turn. Their roundings add like a random walk, to
# 100 x 146 ** 0.5 x 6e-8 = 7e-5 nats, which is the relative error of a weight.
ROUNDING = 1e-4


@pytest.fixture
def always_on_disk(monkeypatch):
    """Every `.npy` stays in its file."""
    monkeypatch.setattr(files, "IN_MEMORY", 0)


@pytest.fixture
def saved(tmp_path):
    """saved(array, name) -> the `.npy` that holds it."""

    def save(array: np.ndarray, name: str = "images.npy") -> Path:
        np.save(tmp_path / name, array)
        return tmp_path / name

    return save


def noise(count: int = 50, *shape: int, dtype: str = "uint8") -> np.ndarray:
    values = np.random.default_rng(0).integers(
        0, 2 if dtype == "bool" else 256, size=(count, *(shape or (4, 3)))
    )
    return (values / 255).astype(dtype) if np.dtype(dtype).kind == "f" else values.astype(dtype)


def loaded_twice(file: Path, **options) -> tuple[data.Dataset, data.Dataset]:
    """In memory, and in their file."""
    in_memory = load_dataset(str(file), **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "IN_MEMORY", 0)
        return in_memory, load_dataset(str(file), **options)


def left(file: Path) -> Images:
    images = data.read_arrays(file).train
    assert images.on_disk
    return images


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("pyrovae-read")]


# The same as in memory


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 1), (5, 4, 3)])
@pytest.mark.parametrize("dtype", ["uint8", "bool", "float16", "float32", "float64", ">f4", "longdouble"])
def test_images_of_a_file_are_those_in_memory_to_the_last_bit(saved, shape, dtype):
    in_memory, from_file = loaded_twice(saved(noise(60, *shape, dtype=dtype)), limit=(40, None), held_out=7)
    assert from_file.shape == in_memory.shape
    chosen = torch.tensor([5, 0, 5, 3])
    for part in ("train", "validation", "test"):
        ours, theirs = getattr(from_file, part), getattr(in_memory, part)
        assert ours.on_disk
        assert not theirs.on_disk
        assert len(ours) == len(theirs)
        assert ours.pixels.nbytes == theirs.pixels.nbytes
        for index in (slice(None), slice(2, 4), slice(4, None, 2), slice(0), chosen, [1, 0], -1):
            assert torch.equal(ours.pixels[index], theirs.pixels[index])
        assert torch.equal(torch.cat(list(ours.pixels.split(3))), theirs.pixels)
        assert torch.equal(ours.subset(chosen)[:].pixels, theirs.subset(chosen).pixels)


def test_the_file_in_memory_is_that_of_an_npz(saved, tmp_path):
    """Whose checksums older runs hold."""
    array = noise(60)
    np.savez(tmp_path / "images.npz", images=array)
    of_npy, of_npz = load_dataset(str(saved(array))), load_dataset(str(tmp_path / "images.npz"))
    assert not of_npy.train.on_disk
    assert of_npy.checksum == of_npz.checksum
    for one, other in zip(*((d.train, d.validation, d.test) for d in (of_npy, of_npz)), strict=True):
        assert torch.equal(one.pixels, other.pixels)


@pytest.mark.parametrize("sizes", [[20, 20, 10], [1] * 50, [50], [7, 0, 43], [0], []])
@pytest.mark.parametrize("labelled", [True, False])
def test_batches_are_those_of_the_index(saved, sizes, labelled):
    array = noise()
    from_file = dataclasses.replace(left(saved(array)), labels=torch.arange(50) if labelled else None)
    indices = torch.randperm(50)[: sum(sizes)].split(sizes) if sizes else ()
    for images in (from_file, from_file[:]):
        batches = list(images.batches(indices))
        assert [len(batch) for batch in batches] == sizes
        for chosen, batch in zip(indices, batches, strict=True):
            assert torch.equal(batch.pixels, torch.from_numpy(array)[chosen].unsqueeze(1) / 255)
            assert torch.equal(batch.labels, chosen) if labelled else batch.labels is None
    assert not threads()


def test_no_more_is_read_ahead_than_may_be(saved, monkeypatch):
    images, read = left(saved(noise())), []
    monkeypatch.setattr(files.ArrayFile, "read", lambda file, rows, out: read.append(len(rows)))
    monkeypatch.setattr(files, "MOST_AHEAD", 3 * 4 * 12 * 2)  # three batches of two images
    with closing(images.batches(torch.arange(50).split(2))) as batches:
        next(batches)
    assert 1 <= len(read) <= 4


def test_nothing_is_read_to_split(saved, always_on_disk, monkeypatch):
    monkeypatch.setattr(files.ArrayFile, "read", lambda *args: pytest.fail("something was read"))
    assert len(load_dataset(str(saved(noise()))).train) == 40


def test_only_what_is_used_decides_whether_it_stays_in_the_file(saved, monkeypatch):
    file = saved(noise(200, 8, 8))
    monkeypatch.setattr(files, "IN_MEMORY", 100 * 64 * 4)
    assert load_dataset(str(file)).train.on_disk
    assert not load_dataset(str(file), limit=(60, 20)).train.on_disk


def test_arrays_in_the_order_of_columns_are_read_into_memory(saved, always_on_disk):
    array = noise(60)
    columns, rows = (
        load_dataset(str(saved(a, f"{n}.npy"))) for n, a in enumerate([np.asfortranarray(array), array])
    )
    assert not columns.train.on_disk
    assert torch.equal(columns.train.pixels, rows.train[:].pixels)


def test_pixels_go_to_the_device_as_they_are_read(saved):
    images = left(saved(noise())).to("meta")
    assert images.on_disk
    assert images.pixels.device == images[:3].pixels.device == torch.device("meta")
    assert next(images.batches(torch.arange(6).split(2))).pixels.device == torch.device("meta")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_on_the_gpu_are_those_of_the_index(saved):
    images = left(saved(noise(500, 28, 28)))
    indices = torch.randperm(500).cuda().split(16)
    for chosen, batch in zip(indices, images.to("cuda").batches(indices), strict=True):
        assert torch.equal(batch.pixels.cpu(), images[chosen.cpu()].pixels)


# Threads and faults


@pytest.mark.parametrize("taken", [0, 1, 4])
def test_closing_early_leaves_no_thread(saved, taken):
    with closing(left(saved(noise())).batches(torch.arange(50).split(2))) as batches:
        for _ in range(taken):
            next(batches)
        assert bool(threads()) == (taken > 0)
    assert not threads()


def test_a_fault_in_the_loop_leaves_no_thread(saved):
    images = left(saved(noise()))
    with pytest.raises(KeyboardInterrupt), closing(images.batches(torch.arange(50).split(2))) as batches:  # noqa: PT012
        next(batches)
        raise KeyboardInterrupt
    assert not threads()


def test_a_fault_in_a_thread_surfaces(saved, monkeypatch):
    images, read = left(saved(noise())), files.ArrayFile.read

    def fail(file, rows, out):
        if 30 in rows:
            raise OSError("the disk is gone")
        read(file, rows, out)

    monkeypatch.setattr(files.ArrayFile, "read", fail)
    done = []
    with pytest.raises(OSError, match="the disk is gone"):
        done.extend(len(batch) for batch in images.batches(torch.arange(50).split(2)))
    assert not threads()


def test_a_file_that_became_shorter_is_one_line(saved):
    file = saved(noise(5000, 8, 8))
    images = left(file)
    os.truncate(file, 5000)
    for read in (
        lambda: images[-3:],
        lambda: list(images.batches([torch.tensor([4999])])),
        lambda: images.checksum(),
    ):
        with pytest.raises(
            files.ChangedFileError, match=r"expected .*images.npy of at least 320,128 bytes.*, got 5,000: leave"
        ):
            read()


def test_a_file_that_was_deleted_is_still_read(saved):
    array = noise()
    file = saved(array)
    images = left(file)
    file.unlink()
    assert torch.equal(images[:].pixels, torch.from_numpy(array).unsqueeze(1) / 255)


SPOILED = {
    "above 1": (np.full((50, 4, 3), 0.5), 1.5, "from 0.5 to 1.5"),
    "below 0": (np.full((50, 4, 3), 0.5), -0.5, "from -0.5 to 0.5"),
    "not a number": (np.full((50, 4, 3), 0.5), np.nan, r"values that are not numbers \(nan\)"),
    "other grey levels": (np.zeros((50, 4, 3), np.uint8), 17, "grey levels up to 255 .* got up to 17"),
}


@pytest.mark.parametrize("place", [0, 20, 49])
@pytest.mark.parametrize("kind", SPOILED)
def test_a_bad_value_is_found_wherever_it_is(saved, monkeypatch, kind, place):
    array, value, message = SPOILED[kind]
    monkeypatch.setattr(files, "CHUNK", 7 * array[0].nbytes)
    array = array.copy()
    array[place, 1, 2] = value
    with pytest.raises(ValueError, match=message):
        left(saved(array))


def test_the_grey_levels_of_black_images_may_be_any(saved):
    assert left(saved(np.zeros((50, 4, 3), np.uint8)))


# Checksums


def test_the_checksum_tells_every_image_and_which_are_used(saved, always_on_disk, monkeypatch):
    array = noise()
    other = array.copy()
    other[41, 0, 0] ^= 1
    first, changed = saved(array), saved(other, "other.npy")
    sums = [
        load_dataset(str(file), **options).checksum
        for file, options in [
            (first, {}),
            (changed, {}),
            (first, {"limit": (20, None), "seed": 0}),
            (first, {"limit": (20, None), "seed": 1}),
            (first, {"held_out": 2}),
        ]
    ]
    assert len(set(sums)) == len(sums)
    monkeypatch.setattr(files, "CHUNK", 100)
    assert load_dataset(str(first)).checksum == sums[0]


# Runs


TINY = {
    "hidden": (8,),
    "epochs": 1,
    "batch_size": 16,
    "limit": (70, 20),
    "figure_epochs": (1,),
    "latent_dim": 2,
}


def trained(file: Path, out: Path) -> Path:
    return runs.train(Config(**TINY, dataset=str(file)), out=out)[0]


@pytest.fixture
def run(saved, always_on_disk, tmp_path, no_figures) -> Path:
    return trained(saved(noise(200, 8, 8)), tmp_path / "run")


def test_a_run_on_a_file_is_pictured(saved, always_on_disk, tmp_path):
    run = trained(saved(noise(200, 8, 8)), tmp_path / "run")
    assert (run / "figures" / "latent.png").exists()


def test_a_run_on_a_file_is_continued_and_refuses_other_data(run, saved):
    _, result = runs.resume(run, changes={"epochs": 2})
    assert [row["epoch"] for row in result.history] == [1, 2]
    array = noise(200, 8, 8)
    array[0, 0, 0] ^= 1
    saved(array)
    with pytest.raises(runs.RunError, match="expected the data"):
        runs.resume(run, changes={"epochs": 3})


def in_memory_too(monkeypatch, function):
    """What it gives of images in their file, and of the same in memory."""
    ours = function()
    monkeypatch.setattr(files, "IN_MEMORY", 2**30)
    return ours, function()


@pytest.mark.parametrize("told", [True, False], ids=["a write", "a change without a word"])
def test_images_that_change_while_they_train_stop_the_run_before_they_are_saved(
    saved, always_on_disk, tmp_path, no_figures, monkeypatch, told
):
    array = noise(60, 8, 8)
    file = saved(array)
    config = Config(dataset=str(file), epochs=3, batch_size=16, hidden=(8,), figure_epochs=())
    whole, _ = runs.train(config, out=tmp_path / "whole")
    if not told:
        monkeypatch.setattr(files.ArrayFile, "_stamp", lambda _: (0, 0, 0))

    def write(at: int, images: np.ndarray):
        def finish(trainer, started):
            if trainer.progress.epoch == at:
                np.save(file, images)
            original(trainer, started)

        monkeypatch.setattr(training.Trainer, "_finish_epoch", finish)

    original = training.Trainer._finish_epoch
    write(1, 255 - array)
    with pytest.raises(runs.StoppedError, match=r"expected .*images.npy unchanged .*: put back what it was"):
        runs.train(config, out=tmp_path / "run")
    assert len(read_metrics(tmp_path / "run")) == (1 if told else 2)  # or else when the run would end
    with pytest.raises(runs.RunError, match="expected the data that"):
        runs.resume(tmp_path / "run")
    np.save(file, array)
    if told:
        write(1, array)  # written to, but the same
        runs.resume(tmp_path / "run")
        state, expected = (torch.load(run / "best.pt")["model"] for run in (tmp_path / "run", whole))
        assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_evaluation_is_as_in_memory(run, monkeypatch):
    vae = runs.load(run)
    examination = assessment.Examination(particles=8, ais=2, ais_steps=4)
    assert examination.of_run(run).latents.probes == "no labels"
    ours, theirs = in_memory_too(
        monkeypatch, lambda: examination.of_vae(vae, runs.read_config(run)[0].make_dataset())
    )
    assert dataclasses.asdict(ours) == nearly(theirs, ROUNDING)


@pytest.mark.parametrize("split", pictures.SPLITS)
def test_codes_are_as_in_memory(run, monkeypatch, split):
    ours, theirs = in_memory_too(monkeypatch, lambda: pictures.encode(run, split=split))
    assert len(ours.mean) > 0
    torch.testing.assert_close(ours.mean, theirs.mean, rtol=ROUNDING, atol=ROUNDING)
    torch.testing.assert_close(ours.scale, theirs.scale, rtol=ROUNDING, atol=ROUNDING)


def test_measures_of_a_file_are_those_in_memory(run):
    dataset, vae = runs.read_config(run)[0].make_dataset(), runs.load(run)
    assert dataset.train.on_disk
    for measure in (
        lambda images: dataclasses.asdict(evaluate(vae, images, batch_size=9)),
        lambda images: squared_error(vae, images, batch_size=9),
        lambda images: pca_squared_error(images, dataset.test, 2),
    ):
        assert measure(dataset.train) == nearly(measure(dataset.train[:]), ROUNDING)
    laboratory = Measurement(estimators=("elbo",), particles=(1,), draws=16, batch_size=4)
    ours, theirs = (
        laboratory.of_vae(vae, dataclasses.replace(dataset, validation=images)).rows[0]
        for images in (dataset.validation, dataset.validation[:])
    )
    assert ours.tr_cov == nearly(theirs.tr_cov, ROUNDING)


PICTURES = {
    "reconstruct": lambda run: pictures.reconstruct(run),
    "reconstruct all": lambda run: pictures.reconstruct(run, split="all", images=4),
    "interpolate": lambda run: pictures.interpolate(run, between=(3, 1)),
    "latent": lambda run: pictures.latent(run, split="train", limit=7),
    "latent of all": lambda run: pictures.latent(run, split="all"),
    "manifold": lambda run: pictures.manifold(run, steps=3),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_of_a_file(run, name):
    assert PICTURES[name](run).axes


def test_runs_on_a_file_side_by_side(run, tmp_path):
    config, _ = runs.read_config(run)
    other, _ = runs.train(dataclasses.replace(config, seed=1, limit=None), out=tmp_path / "other")
    again, _ = runs.train(dataclasses.replace(config, seed=2, limit=None), out=tmp_path / "again")
    errors = pictures.reconstruction_errors(other, again)
    assert set(errors) == {"other", "again", "PCA, 2 components"}
    with pytest.raises(ValueError, match="expected runs on the same images"):
        pictures.reconstruction_errors(run, other)


# Memory


MEASURE = """
import sys, torch
from pathlib import Path
from pyrovae import data
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
torch.set_num_threads(1)
before = peak()
dataset = data.load_dataset(sys.argv[1])
assert dataset.train.on_disk and dataset.checksum
for batch in dataset.train.batches(torch.randperm(len(dataset.train))[:10_000].split(100)):
    assert len(batch) == 100
print(peak() - before)
"""


@LINUX
def test_memory_stays_bounded_whatever_the_size_of_the_file(saved):
    """400 MB, of which all is read in order and 10,000 images at random, in 60 MB."""
    file = saved(np.full((1, 64, 64), 255, dtype=np.uint8))
    header = {"descr": "|u1", "fortran_order": False, "shape": (100_000, 64, 64)}
    with open(file, "wb") as out:
        np.lib.format.write_array_header_1_0(out, header)
        out.write(bytes([255]))
        out.truncate(out.tell() + 100_000 * 64 * 64 - 1)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 100

"""Datasets: splits that share no image, every accepted format, and one line for everything else."""

import dataclasses
import gzip
import pickle
import re
import struct
import zlib
from http.client import IncompleteRead
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pyrovae import runs
from pyrovae.data import DATASETS, Dataset, Images, load_dataset
from pyrovae.runs.config import Config
from pyrovae.runs.laboratory import Measurement

FAMILIES = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST"}
RAW_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def splits(dataset: Dataset) -> tuple[Images, Images, Images]:
    return dataset.train, dataset.validation, dataset.test


def pairs(images: Images) -> list[tuple[bytes, int]]:
    """Each image with its label, in an order that depends on neither's place."""
    return sorted((p.numpy().tobytes(), int(y)) for p, y in zip(images.pixels, images.labels, strict=True))


def numbered(count: int, shape: tuple[int, ...] = (2, 2)) -> dict[str, np.ndarray]:
    """Images that are all different: image k holds k, in base 256, a white pixel, and is labelled k."""
    k = np.arange(count)
    images = np.zeros((count, *shape), dtype=np.uint8)
    images.reshape(count, -1)[:, :2] = np.stack([k // 256, k % 256], axis=1)
    images.reshape(count, -1)[:, -1] = 255
    return {"images": images, "labels": k}


def numbers(images: Images) -> list[int]:
    """The inverse of `numbered`, once the labels are seen to be those of the pixels."""
    k = (images.pixels.flatten(1)[:, :2] * 255).round().long() @ torch.tensor([256, 1])
    assert torch.equal(k, images.labels)
    return k.tolist()


@pytest.fixture
def numbered_file(tmp_path) -> str:
    np.savez(tmp_path / "numbered.npz", **numbered(2000))
    return str(tmp_path / "numbered.npz")


def check_one_line(name: str | Path, *, naming: str = "", **options) -> str:
    """Loading raises a ValueError of one line that names the file; gives that line."""
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the line is checked here
        load_dataset(str(name), **options)
    assert len(str(raised.value).splitlines()) == 1
    assert (naming or str(name)) in str(raised.value)
    return str(raised.value)


def test_digits_are_those_of_scikit_learn_on_their_17_grey_levels():
    from sklearn.datasets import load_digits

    dataset, source = load_dataset("digits"), load_digits()
    pixels = torch.cat([images.pixels for images in splits(dataset)])
    labels = torch.cat([images.labels for images in splits(dataset)])
    grey = torch.from_numpy(source.images / 16).float().unsqueeze(1)
    assert [len(images) for images in splits(dataset)] == [1437, 180, 180]
    assert pairs(Images(pixels, labels)) == pairs(Images(grey, torch.from_numpy(source.target)))
    assert torch.equal(pixels.unique(), torch.arange(17) / 16)
    assert (dataset.shape, dataset.levels) == ((1, 8, 8), 17)


@settings(max_examples=30)
@given(count=st.integers(3, 400), test_count=st.integers(0, 20))
def test_splits_are_disjoint_and_cover(tmp_path_factory, count, test_count):
    arrays = numbered(count + test_count)
    file = tmp_path_factory.mktemp("data") / "images.npz"
    given_test = {f"test_{k}": v[count:] for k, v in arrays.items()} if test_count else {}
    np.savez(file, **{k: v[:count] for k, v in arrays.items()}, **given_test)
    dataset = load_dataset(str(file))
    assert min(len(images) for images in splits(dataset)) > 0
    assert sorted(k for images in splits(dataset) for k in numbers(images)) == list(range(count + test_count))
    if test_count:
        assert numbers(dataset.test) == list(range(count, count + test_count))


@pytest.mark.parametrize("held_out", [1, 30])
def test_another_validation_size_leaves_the_test_images_as_they_are(numbered_file, held_out):
    default, other = load_dataset(str(numbered_file)), load_dataset(str(numbered_file), held_out=held_out)
    assert len(other.validation) == held_out
    assert torch.equal(other.test.pixels, default.test.pixels)
    assert sum(map(len, splits(other))) == sum(map(len, splits(default)))
    with pytest.raises(ValueError, match="expected more than"):
        load_dataset(str(numbered_file), held_out=10_000)


def test_splits_do_not_depend_on_the_seed(numbered_file):
    first, second = (load_dataset(numbered_file, seed=seed) for seed in (0, 1))
    assert first.checksum == second.checksum
    for one, other in zip(splits(first), splits(second), strict=True):
        assert numbers(one) == numbers(other)


@pytest.mark.parametrize(("limit", "sizes"), [((500, 100), (500, 100)), ((500, None), (500, 200))])
def test_limited_subsets_depend_on_the_seed_and_stay_in_their_split(numbered_file, limit, sizes):
    whole = load_dataset(numbered_file)
    first, again, other = (load_dataset(numbered_file, limit=limit, seed=seed) for seed in (0, 0, 1))
    assert (len(first.train), len(first.validation)) == sizes
    assert numbers(first.train) == numbers(again.train)
    assert set(numbers(first.train)) != set(numbers(other.train))
    assert first.checksum == again.checksum != other.checksum
    for limited, full in zip(splits(first), splits(whole), strict=True):
        assert set(numbers(limited)) <= set(numbers(full))
    assert numbers(first.test) == numbers(whole.test)


def test_the_seed_is_0_where_none_is_given(numbered_file):
    default, first = (load_dataset(numbered_file, limit=(50, 20), **seed) for seed in ({}, {"seed": 0}))
    assert numbers(default.train) == numbers(first.train)
    assert numbers(default.validation) == numbers(first.validation)


def test_what_is_held_out_is_the_same_for_every_run_for_ever(numbered_file):
    """The first of one permutation for test, the next for validation: else runs could not be compared."""
    order = torch.randperm(2000, generator=torch.Generator().manual_seed(0)).tolist()
    dataset = load_dataset(numbered_file)
    assert numbers(dataset.test) == order[:200]
    assert numbers(dataset.validation) == order[200:400]
    assert numbers(dataset.train) == order[400:]


def test_no_more_than_5000_are_held_out_of_each_kind(tmp_path):
    np.save(tmp_path / "many.npy", np.zeros((50_010, 1, 1), dtype=bool))
    dataset = load_dataset(str(tmp_path / "many.npy"))
    assert [len(images) for images in splits(dataset)] == [40_010, 5000, 5000]


@pytest.mark.parametrize(("count", "sizes"), [(3, [1, 1, 1]), (14, [12, 1, 1]), (16, [12, 2, 2])])
def test_a_tenth_is_held_out_of_each_kind_and_one_at_least(tmp_path, count, sizes):
    np.savez(tmp_path / "few.npz", **numbered(count))
    assert [len(images) for images in splits(load_dataset(str(tmp_path / "few.npz")))] == sizes


@pytest.mark.parametrize(("count", "held_out", "works"), [(10, 8, True), (10, 9, False)])
def test_one_image_at_least_is_left_to_train_on(tmp_path, count, held_out, works):
    np.savez(tmp_path / "few.npz", **numbered(count))
    if works:
        dataset = load_dataset(str(tmp_path / "few.npz"), held_out=held_out)
        assert [len(images) for images in splits(dataset)] == [1, 8, 1]
    else:
        message = check_one_line(tmp_path / "few.npz", held_out=held_out)
        assert message.endswith("got 10: with 1 for test and 9 for validation, none are left to train on")


def test_classes_are_one_more_than_the_largest_label_of_any_split():
    images = [Images(torch.zeros(2, 1, 1, 1), torch.tensor(y)) for y in ([0, 1], [4, 0], [2, 2])]
    assert Dataset(*images, levels=2).classes == 5
    assert Dataset(*images[::-1], levels=2).classes == 5
    assert Dataset(*images[:2], images[2].without_labels(), levels=2).classes == 0
    negative = Images(torch.zeros(2, 1, 1, 1), torch.tensor([0, -1]))
    assert Dataset(*images[:2], negative, levels=2).classes == 0


def test_checksums_are_those_of_the_bytes_of_training_then_validation():
    pixels, labels = torch.rand(6, 1, 2, 3), torch.tensor([3, 1, 4, 1, 5, 9])
    train, validation, test = (Images(pixels[s], labels[s]) for s in (slice(3), slice(3, 5), slice(5, 6)))
    dataset = Dataset(train, validation, test, levels=2)
    assert dataset.checksum == zlib.crc32(pixels[:5].numpy().tobytes())
    assert dataset.label_checksum == zlib.crc32(labels[:5].numpy().tobytes())
    assert Dataset(train.without_labels(), validation, test, levels=2).label_checksum is None
    assert train.checksum(before=7) == zlib.crc32(pixels[:3].numpy().tobytes(), 7)


def test_a_limit_above_the_number_of_images_takes_them_all(numbered_file):
    dataset = load_dataset(numbered_file, limit=(10**6, 10**6))
    assert (len(dataset.train), len(dataset.validation)) == (1600, 200)


@pytest.mark.parametrize("suffix", [".npz", ".npy"])
@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 1), (5, 4, 3)])
@pytest.mark.parametrize("dtype", ["uint8", "bool", "float32", "float64"])
def test_arrays_of_every_dtype_and_shape(tmp_path, suffix, shape, dtype):
    grid = np.random.default_rng(0).integers(0, 2 if dtype == "bool" else 256, size=(20, *shape))
    array = (grid / 255).astype(dtype) if dtype.startswith("float") else grid.astype(dtype)
    file = tmp_path / f"images{suffix}"
    if suffix == ".npz":
        np.savez(file, images=array)
    else:
        np.save(file, array)
    dataset = load_dataset(str(file))
    pixels = torch.cat([images.pixels for images in splits(dataset)])
    expected = torch.from_numpy(grid.reshape(20, 5, 4, -1)).movedim(-1, 1) / (1 if dtype == "bool" else 255)
    assert (dataset.shape, pixels.dtype) == ((shape[2] if len(shape) == 3 else 1, 5, 4), torch.float32)
    assert dataset.train.labels is None
    torch.testing.assert_close(pixels.flatten(1).sort(0).values, expected.float().flatten(1).sort(0).values)


def save(**arrays):
    return lambda path: np.savez(path, **arrays)


def grey(*shape: int) -> np.ndarray:
    return np.full(shape or (6, 4, 4), 0.5, dtype=np.float32)


def spoiled(value: float) -> np.ndarray:
    array = grey()
    array[3, 2, 1] = value
    return array


def truncated(path: Path) -> None:
    np.savez(path, images=grey())
    path.write_bytes(path.read_bytes()[:-40])


class Bomb:
    """Unpickled, it leaves a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def bomb(path: Path) -> None:
    array = np.empty(6, dtype=object)
    array[:] = [Bomb(path.parent / "executed")] * 6
    np.savez(path, images=array)


BAD_ARRAYS = {
    "wrong key": save(data=grey()),
    "unknown key": save(images=grey(), extra=grey()),
    "no key": save(),
    "2-d": save(images=grey(6, 16)),
    "5-d": save(images=grey(6, 4, 4, 1, 1)),
    "zero images": save(images=grey(0, 4, 4)),
    "zero height": save(images=grey(6, 0, 4)),
    "channels first": save(images=grey(6, 3, 8, 8)),
    "uint8 on another scale": save(images=(np.arange(20 * 4 * 4) % 17).reshape(20, 4, 4).astype(np.uint8)),
    "too few images": save(images=grey(2, 4, 4)),
    "nan": save(images=spoiled(np.nan)),
    "inf": save(images=spoiled(np.inf)),
    "above 1": save(images=spoiled(1.5)),
    "below 0": save(images=spoiled(-0.01)),
    "int64": save(images=np.ones((6, 4, 4), dtype=np.int64)),
    "complex": save(images=grey().astype(complex)),
    "text": save(images=np.full((6, 4, 4), "a")),
    "labels of wrong length": save(images=grey(), labels=np.arange(5)),
    "labels of wrong shape": save(images=grey(), labels=np.arange(6)[:, None]),
    "labels of wrong dtype": save(images=grey(), labels=np.zeros(6)),
    "test images of another shape": save(images=grey(), test_images=grey(3, 5, 5)),
    "test labels alone": save(images=grey(), test_labels=np.arange(6)),
    "object array": bomb,
    "truncated": truncated,
    "not a zip": lambda path: path.write_bytes(b"PK\x03\x04 and no more"),
    "text file": lambda path: path.write_text("images"),
    "empty file": lambda path: path.touch(),
}


@pytest.mark.parametrize("kind", BAD_ARRAYS)
def test_a_bad_npz_is_one_line(tmp_path, kind):
    BAD_ARRAYS[kind](tmp_path / "bad.npz")
    check_one_line(tmp_path / "bad.npz")
    assert not (tmp_path / "executed").exists()


WAYS_OUT = {
    "channels first": (grey(6, 3, 8, 8), "move channels to the end with numpy.moveaxis(images, 1, -1)"),
    "five channels": (grey(6, 8, 8, 5), "got shape (6, 8, 8, 5): choose some with images[..., :3]"),
    "a matrix": (grey(6, 16), "got shape (6, 16): reshape to (-1, height, width)"),
    "from -1 to 1": (
        2 * spoiled(0.75) - 1 - 0.5,
        "from -0.5 to 0: rescale pixels in [-1, 1] by (pixels + 1) / 2",
    ),
    "rounded": (spoiled(1.0000001), "got values from 0.5 to 1.0000001192092896: clip to [0, 1]"),
    "standardised": (spoiled(-2.5), "from -2.5 to 0.5: undo the standardisation, pixels * std + mean"),
    "floats to 255": (spoiled(255), "from 0.5 to 255: divide by the grey level of white, such as 255"),
    "nan": (spoiled(np.nan), "got values that are not numbers (nan): replace or leave out these images"),
    "inf": (spoiled(-np.inf), "got infinite values: replace or leave out these images"),
    "16 bits": (np.full((6, 4, 4), 999, np.uint16), "got uint16: save images / the grey level of white"),
    "zeros and ones": (
        np.ones((6, 4, 4), np.uint8),
        "got up to 1, which is black: if 1 is white, multiply by 255",
    ),
    "17 levels": (np.full((6, 4, 4), 16, np.uint8), "which is black: if 16 is white, save images / 16"),
    "31 levels": (np.full((6, 4, 4), 31, np.uint8), "which is black: if 31 is white, save images / 31"),
}


@pytest.mark.parametrize("suffix", ["npz", "npy"])
@pytest.mark.parametrize("kind", WAYS_OUT)
def test_the_way_out_is_that_of_the_fault(tmp_path, kind, suffix):
    array, way_out = WAYS_OUT[kind]
    file = tmp_path / f"bad.{suffix}"
    np.savez(file, images=array) if suffix == "npz" else np.save(file, array)
    assert way_out in check_one_line(file)


def test_the_least_largest_grey_level_is_32(tmp_path):
    np.savez(tmp_path / "dark.npz", images=np.full((6, 4, 4), 32, np.uint8))
    assert len(load_dataset(str(tmp_path / "dark.npz")).train) == 4


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros(6), "expected 6 integer labels in {}, got float64 of shape (6,): save labels.astype(int)"),
        (np.zeros(6, bool), "got bool of shape (6,): save labels.astype(int)"),
        (np.eye(6), "got float64 of shape (6, 6)"),
        (np.full(6, 2**63, np.uint64), "expected labels below 2**63 in {}, got 9223372036854775808"),
    ],
)
def test_wrong_labels_say_what_to_save(tmp_path, labels, message):
    file = tmp_path / "bad.npz"
    np.savez(file, images=grey(), labels=labels)
    assert check_one_line(file).endswith(message.format(file))


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int32", "uint64"])
def test_labels_of_every_integer_type_are_kept(tmp_path, dtype):
    labels = np.arange(6).astype(dtype)
    np.savez(tmp_path / "images.npz", images=np.stack([grey(4, 4) * k / 6 for k in range(6)]), labels=labels)
    for images in splits(load_dataset(str(tmp_path / "images.npz"))):
        assert torch.equal((images.pixels[:, 0, 0, 0] * 12).round().long(), images.labels)


@pytest.mark.parametrize("name", ["images.NPZ", "images.Npy"])
def test_a_suffix_may_be_in_capitals(tmp_path, name):
    with open(tmp_path / name, "wb") as file:
        np.savez(file, images=grey()) if name.endswith("Z") else np.save(file, grey())
    assert len(load_dataset(str(tmp_path / name)).train) == 4


# Classes


def labelled(labels: list[int], named: int | None = None) -> Dataset:
    parts = torch.tensor(labels).split([len(labels) - 2, 1, 1])
    return Dataset(*(Images(torch.zeros(len(y), 1, 2, 2), y) for y in parts), levels=256, named=named)


@pytest.mark.parametrize("labels", [[0, 1, 2, 1], [2, 1, 0, 2], [0, 0, 0, 0], [-1, 5, 9, 0], [3, 2, 1, 0]])
def test_labels_that_number_the_classes_are_taken(labels):
    labelled(labels).check_classes()


@pytest.mark.parametrize(
    ("labels", "count"), [([5, 900, 5, 5], 2), ([0, 2, 2, 0], 2), ([1, 2, 3, 1], 3), ([1] * 4, 1)]
)
def test_labels_with_gaps_number_no_classes(labels, count):
    message = (
        f"expected labels that number the classes from 0 on, for a conditional VAE, got {count} labels up to "
    )
    message += f"{max(labels)}: number them by numpy.unique(labels, return_inverse=True)[1]"
    with pytest.raises(ValueError, match=re.escape(message)):
        labelled(labels).check_classes()
    labelled(np.unique(labels, return_inverse=True)[1].tolist()).check_classes()


def test_a_limit_leaves_no_gap_that_the_source_has_not(tmp_path):
    """Of 100 classes, few images see a few."""
    k = np.arange(200)
    np.savez(tmp_path / "many.npz", images=np.zeros((200, 2, 2)), labels=k % 100)
    dataset = load_dataset(str(tmp_path / "many.npz"), limit=(5, 5))
    assert dataset.named == 100
    dataset.check_classes()
    np.savez(tmp_path / "gaps.npz", images=np.zeros((200, 2, 2)), labels=2 * (k % 100))
    with pytest.raises(ValueError, match="got 100 labels up to 19"):
        load_dataset(str(tmp_path / "gaps.npz")).check_classes()


@pytest.mark.parametrize("labels", [[5, 900], [0, 2_000_000_000]])
def test_a_conditional_run_of_labels_with_gaps_is_one_line(tmp_path, labels):
    """And asks for no memory for classes that there are not."""
    np.savez(tmp_path / "gaps.npz", images=np.zeros((20, 2, 2)), labels=np.array(labels * 10))
    config = Config(dataset=str(tmp_path / "gaps.npz"), conditional=True, hidden=(2,), epochs=1)
    for call in (lambda: runs.train(config, out=tmp_path / "run"), lambda: Measurement().of_config(config)):
        with pytest.raises(ValueError, match="expected labels that number the classes from 0 on"):
            call()
    assert not (tmp_path / "run").exists()
    dataset = config.make_dataset()
    assert dataclasses.replace(config, conditional=False).make_vae_for(dataset).classes == 0


@pytest.mark.parametrize("content", [b"", b"0.5 0.5", b"\x93NUMPY\x01\x00", pickle.dumps([0.5])])
def test_a_bad_npy_is_one_line(tmp_path, content):
    (tmp_path / "bad.npy").write_bytes(content)
    check_one_line(tmp_path / "bad.npy")


def test_a_pickle_is_never_executed(tmp_path):
    (tmp_path / "bad.npy").write_bytes(pickle.dumps(Bomb(tmp_path / "executed")))
    check_one_line(tmp_path / "bad.npy")
    assert not (tmp_path / "executed").exists()
    pickle.loads((tmp_path / "bad.npy").read_bytes())
    assert (tmp_path / "executed").exists(), "the test's own pickle is harmless"


@settings(max_examples=200)
@given(cut=st.floats(0, 1), place=st.floats(0, 1), byte=st.integers(0, 255), compressed=st.booleans())
def test_a_damaged_npz_is_read_or_is_one_line(tmp_path_factory, cut, place, byte, compressed):
    file = tmp_path_factory.getbasetemp() / "damaged.npz"
    (np.savez_compressed if compressed else np.savez)(file, images=grey())
    content = bytearray(file.read_bytes())
    content[int(place * (len(content) - 1))] = byte
    file.write_bytes(content[: int((0.5 + cut) * len(content))])
    try:
        load_dataset(str(file))
    except ValueError:
        check_one_line(file)


@pytest.mark.parametrize("name", ["imagenet", "missing.npz", "missing/", "notes.txt"])
def test_an_unknown_name_is_one_line_that_lists_the_known_ones(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").touch()
    message = check_one_line(name)
    assert all(known in message for known in DATASETS)


def picture(file: Path, grey_level: int = 100, *, mode: str = "L", size: tuple[int, int] = (6, 5)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, grey_level if mode == "L" else (grey_level, 0, 255)).save(file)


@pytest.mark.parametrize(("modes", "channels"), [(["L"] * 4, 1), (["RGB"] * 4, 3), (["L", "RGB"] * 2, 3)])
def test_folder_of_images(tmp_path, modes, channels):
    for k, mode in enumerate(modes):
        picture(tmp_path / f"{k}.png", 40 * k, mode=mode)
    dataset = load_dataset(str(tmp_path))
    pixels = torch.cat([images.pixels for images in splits(dataset)])
    assert dataset.shape == (channels, 5, 6)
    assert sorted((pixels[:, 0, 0, 0] * 255).round().tolist()) == [0, 40, 80, 120]
    if channels == 3:  # a grey picture among colours has its level in every channel
        assert sorted((pixels[:, 2, 0, 0] * 255).round().tolist()) == sorted(
            255 if mode == "RGB" else 40 * k for k, mode in enumerate(modes)
        )
    assert dataset.train.labels is None


def test_subfolders_are_classes(tmp_path):
    for k in range(12):
        picture(tmp_path / "abc"[k % 3] / f"{k}.jpg", 80 * (k % 3))
    dataset = load_dataset(str(tmp_path))
    for images in splits(dataset):
        assert ((images.pixels[:, 0, 0, 0] * 255 / 80).round().long() == images.labels).all()


@pytest.mark.parametrize("side", [1, 3, 20])
def test_image_size_gives_squares(tmp_path, side):
    for k in range(4):
        picture(tmp_path / f"{k}.png", size=(6 + k, 5))
    assert load_dataset(str(tmp_path), image_size=side).shape == (1, side, side)


@pytest.mark.parametrize("side", [0, -3])
def test_bad_image_size_is_one_line(tmp_path, side):
    check_one_line(tmp_path, image_size=side)


@pytest.mark.parametrize("name", ["digits", "numbered.npz"])
def test_image_size_is_for_folders_only(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("digits").mkdir()
    np.savez("numbered.npz", **numbered(10))
    check_one_line(name, image_size=4)


def sixteen_bits(file: Path) -> None:
    Image.fromarray(np.linspace(0, 65535, 30).reshape(5, 6).astype(np.uint16)).save(file)


def half(file: Path) -> None:
    picture(file)
    file.write_bytes(file.read_bytes()[:50])


BAD_PICTURES = {
    "text": lambda file: file.write_text("no picture"),
    "empty": lambda file: file.touch(),
    "half": half,
    "another size": lambda file: picture(file, size=(7, 5)),
    "16 bits, which would be clipped to 8": sixteen_bits,
}


@pytest.mark.parametrize("kind", BAD_PICTURES)
def test_a_bad_picture_is_one_line_that_names_it(tmp_path, kind):
    for k in range(4):
        picture(tmp_path / f"{k}.png")
    BAD_PICTURES[kind](tmp_path / "bad.png")
    check_one_line(tmp_path, naming=str(tmp_path / "bad.png"))


@pytest.mark.parametrize("files", [[], ["notes.txt"], ["1.png", "2.png"]])
def test_a_folder_without_enough_pictures_is_one_line(tmp_path, files):
    for file in files:
        picture(tmp_path / file) if file.endswith("png") else (tmp_path / file).touch()
    check_one_line(tmp_path)


def idx(array: np.ndarray) -> bytes:
    """The file format of MNIST: a magic number, the sizes, the bytes."""
    return struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def raw_files(tmp_path):
    """raw_files(name) -> the folder where small files in the layout of that dataset lie."""

    def write(name: str) -> Path:
        raw = tmp_path / FAMILIES[name] / "raw"
        raw.mkdir(parents=True)
        arrays = numbered(40, shape=(28, 28))
        for part, chosen in (("train", slice(30)), ("t10k", slice(30, None))):
            (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(arrays["images"][chosen]))
            (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(arrays["labels"][chosen].astype(np.uint8)))
        return raw

    return write


@pytest.fixture
def offline(monkeypatch):
    """offline(error): whatever is downloaded raises this."""
    import torchvision.datasets.mnist as module

    def refuse(error: BaseException) -> None:
        def download(*args, **kwargs):
            raise error

        monkeypatch.setattr(module, "download_and_extract_archive", download)

    return refuse


@pytest.mark.parametrize("name", FAMILIES)
def test_files_that_are_there_are_read_and_not_downloaded(tmp_path, raw_files, offline, name):
    raw_files(name)
    offline(pytest.fail.Exception("a download was attempted"))
    dataset = load_dataset(name, data_dir=tmp_path)
    assert [len(images) for images in splits(dataset)] == [27, 3, 10]
    assert sorted(numbers(dataset.train) + numbers(dataset.validation)) == list(range(30))
    assert numbers(dataset.test) == list(range(30, 40))
    assert (dataset.shape, dataset.levels) == ((1, 28, 28), 256)


def test_the_data_directory_is_that_of_the_environment(tmp_path, raw_files, monkeypatch):
    raw_files("mnist")
    monkeypatch.setenv("PYROVAE_DATA", str(tmp_path))
    assert len(load_dataset("mnist").test) == 10


@pytest.mark.parametrize(
    "error",
    [
        URLError("no route to host"),
        RuntimeError("File not found\nor corrupted"),
        ConnectionResetError(104, "reset"),
        PermissionError(13, "denied"),
        IncompleteRead(b"half"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_failed_download_says_what_to_put_where_and_what_to_use_instead(tmp_path, offline, name, error):
    offline(error)
    message = check_one_line(name, naming=str(tmp_path / FAMILIES[name] / "raw"), data_dir=tmp_path)
    assert all(file in message for file in (*RAW_FILES, "digits"))


DAMAGES = {
    "empty": lambda content: b"",
    "magic number alone": lambda content: content[:4],
    "header alone": lambda content: content[:16],
    "half": lambda content: content[: len(content) // 2],
    "one byte short": lambda content: content[:-1],
    "one byte more": lambda content: content + b"\0",
    "compressed": gzip.compress,
    "text": lambda content: b"<html>Not found</html>",
    "unknown type": lambda content: b"\0\0\x0a" + content[3:],
    "floats": lambda content: b"\0\0\x0d" + content[3:],
    "too many dimensions": lambda content: content[:3] + b"\x04" + content[4:],
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", RAW_FILES)
def test_a_damaged_raw_file_is_one_line(tmp_path, raw_files, file, damage):
    raw = raw_files("mnist")
    (raw / file).write_bytes(DAMAGES[damage]((raw / file).read_bytes()))
    check_one_line("mnist", naming=str(raw), data_dir=tmp_path)


def test_labels_of_other_images_are_one_line(tmp_path, raw_files):
    raw = raw_files("mnist")
    (raw / "train-labels-idx1-ubyte").write_bytes((raw / "t10k-labels-idx1-ubyte").read_bytes())
    check_one_line("mnist", naming=str(raw), data_dir=tmp_path)


@pytest.mark.parametrize(("name", "mean"), [("mnist", 0.1307), ("fashion-mnist", 0.2860)])
def test_the_real_files(mnist_dir, name, mean):
    """The means are the published ones, by which these data are normalised everywhere."""
    if not (mnist_dir / FAMILIES[name] / "raw" / RAW_FILES[0]).exists():
        pytest.skip(f"needs {FAMILIES[name]}")
    dataset = load_dataset(name, data_dir=mnist_dir)
    assert [len(images) for images in splits(dataset)] == [55_000, 5_000, 10_000]
    training = torch.cat([dataset.train.pixels, dataset.validation.pixels])
    assert training.mean().item() == pytest.approx(mean, abs=5e-5)
    assert dataset.train.labels.unique().tolist() == list(range(10))

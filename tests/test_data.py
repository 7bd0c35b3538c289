"""Datasets: splits that share no image, every accepted format, and one line for everything else."""

import gzip
import pickle
import struct
from http.client import IncompleteRead
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pyrovae.data import DATASETS, Dataset, Images, load_dataset

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
        picture(tmp_path / f"{k}.png", k, mode=mode)
    dataset = load_dataset(str(tmp_path))
    pixels = torch.cat([images.pixels for images in splits(dataset)])
    assert dataset.shape == (channels, 5, 6)
    assert sorted((pixels[:, 0, 0, 0] * 255).round().tolist()) == [0, 1, 2, 3]
    if channels == 3:  # a grey picture among colours has its level in every channel
        assert sorted((pixels[:, 2, 0, 0] * 255).round().tolist()) == sorted(
            255 if mode == "RGB" else k for k, mode in enumerate(modes)
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

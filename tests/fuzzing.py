"""Files that are malformed at random, and the doors at which the package reads them.

A mutation changes one file of a run, a data set or a recipe: its values, or its bytes. Then the file is read as
a user would have it read. What may follow is success, or one line that says what is wrong.
"""

import io
import json
import math
import pickle
import random
import shutil
import sys
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from click.testing import CliRunner

from pyrovae import runs
from pyrovae.cli.group import main
from pyrovae.data import load_dataset
from pyrovae.runs import assessment, laboratory
from pyrovae.runs import sweeps as sweep
from pyrovae.runs.assessment import Examination
from pyrovae.runs.config import Config
from pyrovae.runs.laboratory import Measurement
from pyrovae.runs.sweeps import cells

OUTSIDE = "outside_of_every_run"  # a module that no file may have imported
NESTED: Any = []
for _ in range(60):
    NESTED = [NESTED]
VALUES = [
    *(None, True, False, 0, -1, 1, 7, 2.5, -0.0, 1e-300, 1e308, math.nan, math.inf, -math.inf),
    *(2**31, 2**63, 2**64, -(2**63), 10**30, 10**400),
    *("", "x", "1", "\0", "é", "x" * 5000, "../..", "digits", f"{OUTSIDE}:Part"),
    *([], {}, [1], [1, 2, 3], [None], ["x"], [[]], {"a": 1}, {"": None}, NESTED),
]
DTYPES = (
    "?",
    "i1",
    "u1",
    "<i4",
    ">i8",
    "u8",
    "f2",
    ">f4",
    "f8",
    "g",
    "c8",
    "U3",
    "S3",
    "M8[s]",
    "V4",
    "O",
    "i4,f4",
)


class Executed(BaseException):  # which no reader turns into a line
    """A file was unpickled with what it says is to be called, or it had a module imported."""


class Bomb:
    """What no reader may unpickle."""

    def __reduce__(self):
        return _explode, ()


def _explode() -> None:
    raise Executed("unpickled")


class Watch:
    """Finds no module, but says that one was looked for."""

    def find_spec(self, name: str, path=None, target=None) -> None:
        if name.startswith(OUTSIDE):
            raise Executed(f"imported {name}")


# Mutations of values


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container within a value, with every key or index in it."""
    found = []
    if isinstance(value, dict | list):
        for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
            found += [(value, key), *places(inner)]
    return found


def mutated(value: Any, generator: random.Random, others: list[Any] = VALUES) -> Any:
    """A value in which one thing is another, is missing, or is added."""
    value = plain(value)
    if generator.random() < 0.03 or not places(value):
        return plain(generator.choice(others))
    for _ in range(generator.choice([1, 1, 1, 2, 3])):
        container, key = generator.choice(places(value) or [([0], 0)])
        act = generator.choice(["other", "other", "other", "delete", "add", "nest", "text", "negative", "key"])
        if act == "delete":
            del container[key]
        elif act == "add" and isinstance(container, dict):
            container["foreign"] = plain(generator.choice(others))
        elif act == "key" and isinstance(container, dict):
            container[generator.choice(["", "x", "é", "epochs"])] = container.pop(key)
        elif act == "nest":
            container[key] = generator.choice([[container[key]], {"x": container[key]}])
        elif act == "text":
            container[key] = str(container[key])
        elif act == "negative" and isinstance(container[key], int | float):
            container[key] = -container[key]
        else:
            container[key] = plain(generator.choice(others))
    return value


def plain(value: Any) -> Any:
    """A copy, of dictionaries and lists that can be changed."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def as_toml(value: Any) -> str:
    """A value as TOML writes it, which has no null."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {as_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(as_toml, value)) + "]"
    if isinstance(value, float):
        return repr(value)
    return '"none"' if value is None else json.dumps(value, ensure_ascii=False)


def as_recipe(values: dict[str, Any]) -> bytes:
    return "".join(f"{json.dumps(name)} = {as_toml(value)}\n" for name, value in values.items()).encode()


# Mutations of bytes


def damaged(contents: bytes, generator: random.Random) -> bytes:
    """Bytes of which some are flipped, missing, inserted or repeated."""
    found, at = bytearray(contents), generator.randrange(len(contents) + 1)
    act = generator.choice(["flip", "flip", "cut", "insert", "utf-8", "repeat", "noise", "zeros"])
    if act == "flip" and contents:
        for _ in range(generator.choice([1, 4, 32])):
            found[generator.randrange(len(found))] ^= 1 << generator.randrange(8)
    elif act == "cut":
        del found[at:]
    elif act == "utf-8":
        found[at:at] = generator.choice([b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\0", b"\xef\xbb\xbf"])
    elif act == "repeat":
        found[at:at] = found[: generator.randrange(1, 200)]
    elif act == "zeros":
        found[at : at + generator.randrange(1, 200)] = bytes(generator.randrange(200))
    else:
        place = slice(at, at) if act == "insert" else slice(None)
        found[place] = generator.randbytes(generator.randrange(300))
    return bytes(found)


def npy(array: np.ndarray, generator: random.Random) -> bytes:
    """An array as a `.npy`, perhaps with another header."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    contents = file.getvalue()
    if generator.random() < 0.3:
        return contents
    size = int.from_bytes(contents[8:10], "little")
    shapes = (
        "()",
        "(-1, 4, 4)",
        "(40, 4)",
        "(2**40, 4, 4)",
        "(1000000000000, 4, 4)",
        "(40, 4, 4, 0)",
        "(4.0,)",
        "None",
    )
    header = {
        "descr": generator.choice(
            [*(repr(each) for each in DTYPES), "[('a', '<f4')]", "('<f4', (2, 2))", "3", "None"]
        ),
        "fortran_order": generator.choice(["True", "False", "3", "'x'"]),
        "shape": generator.choice([*shapes, str(array.shape)]),
    }
    if generator.random() < 0.2:
        del header[generator.choice(list(header))]
    text = "{" + ", ".join(f"{name!r}: {value}" for name, value in header.items()) + "}\n"
    text = generator.choice([text, text, text, "[" * 500 + "\n", "__import__('os')\n", "x" * 70_000])[
        : 2**16 - 1
    ]
    version = bytes([generator.choice([0, 1, 1, 1, 2, 9]), 0])
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text.encode() + contents[10 + size :]


def array(generator: random.Random) -> np.ndarray:
    """An array, which may be none of images."""
    dtype = np.dtype(generator.choice(DTYPES))
    shape = generator.choice(
        [(), (40,), (40, 4), (40, 4, 4), (40, 4, 4, 3), (0, 4, 4), (40, 4, 4, 9), (1,) * 9]
    )
    made = np.zeros(shape, dtype=dtype, order=generator.choice("CF"))
    if dtype.kind in "fiu" and made.size:
        made.flat[0] = generator.choice([0, 1, 2, math.nan, math.inf]) if dtype.kind == "f" else 100
    return np.full(shape, Bomb()) if dtype.kind == "O" else made


def npz(generator: random.Random) -> bytes:
    """A `.npz` of some arrays."""
    file, images = io.BytesIO(), np.random.default_rng(0).random((40, 4, 4))
    kind = generator.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    names = "images", "labels", "test_images", "test_labels", "foreign", "../images", " "
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", kind) as parts:
        warnings.simplefilter("ignore")  # of names that are there twice
        for name in ("images", *generator.choices(names, k=generator.randrange(3))):
            chosen = generator.choice([images, array(generator), np.arange(40), np.full(40, -1)])
            parts.writestr(f"{name}{generator.choice(['.npy', '.npy', '.npy', ''])}", npy(chosen, generator))
    return file.getvalue()


TENSORS = [
    torch.zeros(()),
    torch.zeros(3),
    torch.zeros(3, 3),
    torch.full((2,), math.nan),
    torch.zeros(3, dtype=torch.int64),
    torch.zeros(3, dtype=torch.complex64),
    torch.zeros(3, dtype=torch.bool),
    torch.zeros(5056, dtype=torch.uint8),
    torch.zeros(0),
    torch.zeros(3).to_sparse(),
    torch.zeros(1).expand(1000),
]


def checkpoint(state: dict[str, Any], generator: random.Random) -> bytes:
    """A checkpoint of other contents."""
    file = io.BytesIO()
    changed = mutated(state, generator, [*VALUES, *TENSORS, *TENSORS])
    if generator.random() < 0.05:
        changed = {"format": state["format"], "model": Bomb()}
    torch.save(changed, file)
    return file.getvalue()


# Doors


@dataclass(frozen=True)
class Door:
    """A kind of file, and how it is read.

    Attributes:
        file: Its name in the workplace.
        make: Gives other contents, from those that there were.
        read: Reads it in a workplace.
    """

    file: str
    make: Callable[[bytes, random.Random], bytes]
    read: Callable[[Path], Any]


def call(*words: str | Path) -> None:
    """The command line, in this process.

    Raises:
        ValueError: It ended with one line.
        AssertionError: It ended otherwise than with success or with one line.
    """
    result = CliRunner().invoke(main, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    lines = [line for line in result.stderr.splitlines() if not line.startswith("Warning: ")]
    assert result.exit_code in (0, 1, 2), f"exit code {result.exit_code}"
    assert len(lines) == (result.exit_code > 0), lines
    if lines:
        assert lines[0].startswith("Error: "), lines
        raise ValueError(lines[0])


def resume(place: Path) -> None:
    """Reads all that a run continues from, and goes on for an epoch."""
    call("train", "--resume", place / "run", "-e", "3", "--quiet")


def of_json(contents: bytes, generator: random.Random) -> bytes:
    return json.dumps(mutated(json.loads(contents), generator)).encode()


def of_line(contents: bytes, generator: random.Random) -> bytes:
    lines = contents.splitlines()
    number = generator.randrange(len(lines))
    lines[number] = of_json(lines[number], generator)
    return b"\n".join([*lines, b""])


def of_recipe(contents: bytes, generator: random.Random) -> bytes:
    changed = mutated(cells.tomllib.loads(contents.decode()), generator)
    return as_recipe(changed if isinstance(changed, dict) else {"train": changed})


def of_state(contents: bytes, generator: random.Random) -> bytes:
    return checkpoint(torch.load(io.BytesIO(contents), weights_only=True), generator)


def of_pickle(contents: bytes, generator: random.Random) -> bytes:
    return pickle.dumps(generator.choice([Bomb(), [Bomb()], {"images": Bomb()}]))


def read_results(place: Path) -> None:
    found = assessment.read(place / "run")
    if found is not None:
        assessment.table(found)


def read_variance(place: Path) -> None:
    found = laboratory.read(place / "run" / "variance-1")
    for comparison in found.values() if isinstance(found, dict) else [found]:
        laboratory.table(comparison)


def read_sweep(place: Path) -> None:
    sweep.Sweep(place / "sweep", sweep.Recipe(({"seed": 1}, {"seed": 2}), {"epochs": 1}))


def read_curves(place: Path) -> None:
    call("curves", place / "run", "-o", place / "curves.svg")


DOORS = {
    "settings": Door("run/config.json", of_json, resume),
    "settings of a model": Door("run/config.json", of_json, lambda place: runs.load(place / "run")),
    "metrics": Door("run/metrics.jsonl", of_line, resume),
    "metrics of curves": Door("run/metrics.jsonl", of_line, read_curves),
    "checkpoint": Door("run/checkpoint.pt", of_state, resume),
    "best": Door("run/best.pt", of_state, lambda place: runs.load(place / "run")),
    "evaluation": Door("run/evaluation.json", of_json, read_results),
    "variance": Door("run/variance-1/variance.json", of_json, read_variance),
    "recipe": Door("recipe.toml", of_recipe, lambda place: sweep.read_recipe(str(place / "recipe.toml"))),
    "sweep": Door("sweep/sweep.json", of_json, read_sweep),
    "npz": Door("images.npz", lambda _, g: npz(g), lambda place: load_dataset(str(place / "images.npz"))),
    "npy": Door(
        "images.npy", lambda _, g: npy(array(g), g), lambda place: load_dataset(str(place / "images.npy"))
    ),
    "images": Door(
        "pictures/1.png", damaged, lambda place: load_dataset(str(place / "pictures"), image_size=4)
    ),
}


def prepare(place: Path) -> None:
    """A run of a small data set with its results, a recipe, a sweep, and data of every kind."""
    from PIL import Image

    images = np.random.default_rng(0).random((40, 4, 4))
    np.savez(place / "images.npz", images=images, labels=np.arange(40) % 2)
    np.save(place / "images.npy", images)
    (place / "pictures").mkdir()
    for number in range(12):
        Image.fromarray((255 * images[number]).astype(np.uint8)).save(place / "pictures" / f"{number}.png")
    settings = {"limit": (20, 10), "hidden": (3,), "batch_size": 10, "figure_epochs": (), "compile": "off"}
    recipe = {"train": {"lr": 0.01, "hidden": [3]}, "over": {"seed": [1, 2]}, "variants": [{}, {"epochs": 3}]}
    (place / "recipe.toml").write_bytes(as_recipe(recipe))
    run, _ = runs.train(Config(dataset=str(place / "images.npz"), epochs=2, **settings), out=place / "run")
    assessment.write(run, Examination(particles=2, limit=4).of_run(run))
    (run / "variance-1").mkdir()
    found = Measurement(estimators=("elbo", "iwae"), particles=(1, 2), draws=16, batch_size=2).of_run(run)
    (run / "variance-1" / "variance.json").write_text(json.dumps(found.to_json()))
    read_sweep(place)


def attempt(place: Path, number: int, seed: int = 0) -> str:
    """Makes the mutation of this number in a copy of a prepared place, and reads the file.

    Returns:
        What went wrong; "" where the file was read or refused in one line.
    """
    generator = random.Random(f"{seed}/{number}")
    name = list(DOORS)[number % len(DOORS)]
    door, work = DOORS[name], place.with_name(f"{place.name}-mutated")
    shutil.copytree(place, work, dirs_exist_ok=False)
    path, watch = work / door.file, Watch()
    contents = path.read_bytes()
    kind = generator.choices(["values", "bytes", "pickle", "directory", "missing"], [12, 6, 1, 0.3, 0.3])[0]
    sys.meta_path.insert(0, watch)
    try:
        if kind in ("directory", "missing"):
            path.unlink()
            if kind == "directory":
                path.mkdir()
        else:
            make = {"values": door.make, "bytes": damaged, "pickle": of_pickle}[kind]
            path.write_bytes(make(contents, generator))
        before = set(sys.modules)
        door.read(work)
        outside = {module for module in set(sys.modules) - before if module.startswith(OUTSIDE)}
        assert not outside, outside
    except ValueError as error:
        said = str(error)
        return "" if said.strip() and "\n" not in said else f"{number}, {name}, {kind}: several lines: {said!r}"
    except BaseException as error:
        return f"{number}, {name}, {kind}: {type(error).__name__}: {error}"
    finally:
        sys.meta_path.remove(watch)
        shutil.rmtree(work)
    return ""

"""Hands small files to the command line that declare far more than they hold, and measures what they take.

    python benchmarks/faults/bombs.py [--images N] [--limit GB]

A file must be refused in one line that names it, with exit code 2, in seconds and with little memory. Each is
read by a process of its own, which may take no more memory than the limit, so that a failure harms nobody.
"""

import io
import resource
import struct
import time
import zipfile
import zlib
from pathlib import Path

import click
import torch
from numpy.lib import format as npy
from shared import TINY, Child, command, prepare, report, workplace

from pyrovae.training.checkpoints import load_checkpoint, save_atomically

SECONDS, MEGABYTES = 5.0, 100


def header(shape: tuple[int, ...]) -> bytes:
    """How a `.npy` of bytes begins."""
    file = io.BytesIO()
    npy.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.getvalue()


def archive(path: Path, head: bytes, zeros: int) -> Path:
    """A compressed `.npz` with one array, which goes on with so many zeros."""
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file,
        file.open("images.npy", "w", force_zip64=True) as stream,
    ):
        stream.write(head)
        for start in range(0, zeros, 2**24):
            stream.write(bytes(min(2**24, zeros - start)))
    return path


def picture(path: Path, side: int) -> Path:
    """A `.png` that declares this many pixels a side, and holds none."""
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    path.parent.mkdir(exist_ok=True)
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for kind, contents in ((b"IHDR", head), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")):
            file.write(struct.pack(">I", len(contents)) + kind + contents)
            file.write(struct.pack(">I", zlib.crc32(kind + contents)))
    return path


def made(place: Path, images: int) -> dict[str, tuple[str, Path]]:
    """By name, the command that reads a bomb, and the file that it must name."""
    (place / "many").mkdir()
    for number in range(600):
        picture(place / "many" / f"{number}.png", 9000)
    columns = place / "columns.npz"
    bombs = {
        f"{images:,} images in a .npz": archive(
            place / "images.npz", header((images, 28, 28)), images * 28 * 28
        ),
        "an array that is not there": archive(columns, header((10**8, 28, 28)), 100),
        "a header of 2 GB": archive(place / "header.npz", npy.magic(2, 0) + struct.pack("<I", 2**31), 2**31),
        "a picture of 100,000,000 pixels": picture(place / "large" / "a.png", 10_000),
        "600 pictures of 81,000,000 pixels": place / "many",
    }
    found = {
        name: (f"train --limit 64/32 -d {path.parent if path.suffix == '.png' else path}", path)
        for name, path in bombs.items()
    }
    run = place / "run"
    child = Child(command(f"train --quiet {TINY} -o", run), place / "log")
    assert child.wait() == 0, child.said
    state = load_checkpoint(run / "best.pt", "cpu")
    for name, tensor in state["model"].items():
        state["model"][name] = torch.zeros(1).expand(10**5, 10**5) if tensor.dim() == 2 else tensor
    save_atomically(state, run / "best.pt")
    return found | {"a checkpoint of 40 GB in each layer": (f"sample {run}", run / "best.pt")}


def taken(words: str, path: Path, log: Path, limit: int) -> tuple[str, float, float]:
    """What is wrong, "" for nothing; seconds; and megabytes at the peak beyond those at the beginning."""

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        command(words)()

    started = time.monotonic()
    child, least, most = Child(work, log), None, 0
    while child.poll() is None:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{child.pid}/status").read_text().splitlines())
        if "VmRSS" in status:
            now = int(status["VmRSS"].split()[0]) / 1024
            least, most = least or now, max(most, now)
        time.sleep(0.005)
    seconds, megabytes = time.monotonic() - started, most - (least or 0)
    said = child.said
    fine = child.code == 2 and said.count("\n") == 1 and str(path) in said
    if fine and seconds < SECONDS and megabytes < MEGABYTES:
        return "", seconds, megabytes
    return f"exit code {child.code}: {said.strip()[-300:]}", seconds, megabytes


@click.command()
@click.option("--images", default=6_000_000, show_default=True, help="Declared by the largest of the arrays.")
@click.option("--limit", default=12.0, show_default=True, help="Memory of a process, in GB.")
def main(images: int, limit: float) -> None:
    prepare()
    failures = []
    with workplace() as place:
        bombs = made(place, images)
        for name, (words, path) in bombs.items():
            failure, seconds, megabytes = taken(words, path, place / "log", int(limit * 1e9))
            size = path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.iterdir())
            print(f"{name} ({size / 1e6:.2f} MB): {seconds:.2f} s, {megabytes:,.0f} MB")
            failures += [f"{name}: {failure}"] if failure else []
    report("bombs", len(bombs), failures)


if __name__ == "__main__":
    main()

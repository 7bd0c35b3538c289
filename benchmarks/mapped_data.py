"""Training on a `.npy` that stays in its file: peak resident memory, and seconds per epoch beside memory.

    python benchmarks/mapped_data.py [--gigabytes G] [--dtype uint8|float32] [--folder DIR] [--images N]

It writes noise of the given size to a file, trains a 784-400-20 VAE on it for one epoch in a process of its
own, as `train` would, and prints the most memory that was resident at once, as the kernel counts it, with
what the libraries take. Then it trains on some of the images, in their file and in memory by turns, in one
process with one thread. Times are medians; the ratio is the median over rounds of the throughput from the
file over that in memory. The file is in the page cache by then, if there is room. It is deleted at the end.
"""

import json
import math
import multiprocessing
import platform
import resource
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import pyro
import torch

from pyrovae import Config, Images, data, fit
from pyrovae.data import files

CONFIG = Config(binarize="soft", hidden=(400,), activation="softplus", latent_dim=20, scale_head="exp")
CHUNK = 10_000  # images written at a time


def write(path: Path, gigabytes: float, dtype: str) -> int:
    """A file of so many bytes of noise; gives the number of images."""
    count = math.ceil(gigabytes * 1e9 / (784 * np.dtype(dtype).itemsize))
    generator = np.random.default_rng(0)
    with open(path, "wb") as file:
        header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (count, 28, 28)}
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, count, CHUNK):
            shape = min(CHUNK, count - start), 28, 28
            if dtype == "uint8":
                generator.integers(0, 256, shape, dtype=np.uint8).tofile(file)
            else:
                generator.random(shape, dtype=np.float32).tofile(file)
    return count


def resident() -> float:
    """The most memory that this process had resident at once, in GB."""
    try:  # of this program alone: what getrusage says begins with the parent's
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e9
    except OSError:
        unit = 1 if platform.system() == "Darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def train_once(path: Path, batch_size: int) -> dict[str, float]:
    """One epoch on the file, whatever its size; peaks of memory in GB, and seconds."""
    torch.set_num_threads(1)
    peaks = {"imported": resident()}
    files.IN_MEMORY = 0
    started = time.perf_counter()
    dataset = replace(CONFIG, dataset=str(path)).make_dataset()
    dataset.checksum  # noqa: B018 - a run begins with it
    peaks |= {"loaded": resident(), "loading_seconds": time.perf_counter() - started}
    vae = CONFIG.make_vae(dataset.shape, dataset.levels)
    history = fit(vae, dataset.train, dataset.validation, epochs=1, batch_size=batch_size, quiet=True).history
    return peaks | {"trained": resident(), "seconds": history[0]["seconds"]}


def seconds(images: Images, batch_size: int) -> float:
    vae = CONFIG.make_vae(images.shape, 256)
    started = time.perf_counter()
    fit(vae, images, images[:1], epochs=1, batch_size=batch_size, quiet=True)
    return time.perf_counter() - started


@click.command()
@click.option("--gigabytes", default=0.1, show_default=True, help="Size of the file.")
@click.option("--dtype", type=click.Choice(["uint8", "float32"]), default="uint8", show_default=True)
@click.option("--folder", default=None, help="Where to write the file.  [default: the system's]")
@click.option("--images", default=60_000, show_default=True, help="Images whose epochs are timed.")
@click.option("--batch-size", default=128, show_default=True)
@click.option("--repeats", default=5, show_default=True, help="Interleaved rounds; 0 to measure memory alone.")
@click.option("--json", "json_file", default=None, help="Write all numbers to this file.")
def main(
    gigabytes: float,
    dtype: str,
    folder: str | None,
    images: int,
    batch_size: int,
    repeats: int,
    json_file: str | None,
) -> None:
    """Measure memory and time of training on images that stay in their file."""
    torch.set_num_threads(1)
    versions = {"torch": torch.__version__, "pyro": pyro.__version__, "python": platform.python_version()}
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        path = Path(temporary) / "images.npy"
        count = write(path, gigabytes, dtype)
        click.echo(f"{versions}, one thread")
        click.echo(f"{count:,} images, {path.stat().st_size / 1e9:.2f} GB of {dtype}, batches of {batch_size}")
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            once = pool.submit(train_once, path, batch_size).result()
        click.echo(
            f"peak resident memory: {once['trained']:.2f} GB ({once['imported']:.2f} after imports, "
            f"{once['loaded']:.2f} after loading); loading and checksum {once['loading_seconds']:.1f} s, "
            f"epoch {once['seconds']:.1f} s"
        )
        from_file = data.read_arrays(path).train.subset(torch.randperm(count)[:images])
        contestants = {"from file": from_file, "in memory": from_file[:]}
        seconds(from_file[: 20 * batch_size], batch_size)  # imports and allocations, once
        rounds = [
            {name: seconds(contestants[name], batch_size) for name in sorted(contestants, reverse=k % 2 == 1)}
            for k in range(repeats)
        ]
        if rounds:
            for name in contestants:
                click.echo(f"{name:<10}{statistics.median(times[name] for times in rounds):>8.2f} s/epoch")
            ratio = statistics.median(times["in memory"] / times["from file"] for times in rounds)
            click.echo(f"throughput from file / in memory: {ratio:.2f}")
    if json_file:
        with open(json_file, "w") as file:
            json.dump({"versions": versions, "images": count, "once": once, "seconds": rounds}, file, indent=1)


if __name__ == "__main__":
    main()

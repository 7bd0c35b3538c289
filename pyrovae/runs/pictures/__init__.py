"""A trained run in, matplotlib Figures out; and its latent codes, for use elsewhere.

In every function these mean the same:

run          A run directory.
which        "best", the parameters with the best validation objective, or "last".
device       Where the VAE works; results come back to the CPU. Images go through it in batches.
split        "train", "validation", "test", or "all" of the source's images in the source's order. By
             default "validation"; with `data`, "all".
data         Images in place of the run's own: whatever `load_dataset` reads, of the run's image shape. A
             folder's images are resized and cropped to it where it is square.
data_dir     Where downloaded datasets lie; the run's own place if None.
trust        Whether to import foreign code that the run names, a guide of one's own, and so to run it.

Each raises RunError or CheckpointError for a run that is none or is damaged, and ValueError for an argument
out of range.

Example:
    >>> from pyrovae import Config, train
    >>> run, _ = train(Config(epochs=1, limit=(64, 32)), out="runs/first")
    >>> save(interpolate(run, between=(3, 7)), path_for(run, "interpolate"))
    >>> encode(run, split="test").mean.shape
    torch.Size([180, 2])
"""

from pyrovae.runs.pictures.batches import BATCH, MOST
from pyrovae.runs.pictures.codes import Latents, encode, latent
from pyrovae.runs.pictures.comparisons import reconstruction_errors, side_by_side
from pyrovae.runs.pictures.decoded import interpolate, manifold, reconstruct, sample, straight, traversals
from pyrovae.runs.pictures.files import MOST_PIXELS, SUFFIXES, VECTORS, path_for, save, writing
from pyrovae.runs.pictures.histories import curves, history
from pyrovae.runs.pictures.images import SPLITS, images_of

__all__ = [
    "BATCH",
    "MOST",
    "MOST_PIXELS",
    "SPLITS",
    "SUFFIXES",
    "VECTORS",
    "Latents",
    "curves",
    "encode",
    "history",
    "images_of",
    "interpolate",
    "latent",
    "manifold",
    "path_for",
    "reconstruct",
    "reconstruction_errors",
    "sample",
    "save",
    "side_by_side",
    "straight",
    "traversals",
    "writing",
]

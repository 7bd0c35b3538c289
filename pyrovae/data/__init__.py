"""Images, the datasets that they come from, and the readers of these."""

from pyrovae.data.arrays import LEAST_GREY, PER_IMAGE, read_arrays
from pyrovae.data.datasets import (
    HELD_OUT,
    MOST_HELD_OUT,
    SPLIT_SEED,
    Dataset,
    load_dataset,
    read_source,
    small_in_memory,
)
from pyrovae.data.files import IN_MEMORY, ChangedFileError
from pyrovae.data.folders import DataWarning, read_folder
from pyrovae.data.images import Images, Source
from pyrovae.data.sources import (
    DATASETS,
    default_data_dir,
    read_digits,
    read_fashion_mnist,
    read_kmnist,
    read_mnist,
)

__all__ = [
    "DATASETS",
    "HELD_OUT",
    "IN_MEMORY",
    "LEAST_GREY",
    "MOST_HELD_OUT",
    "PER_IMAGE",
    "SPLIT_SEED",
    "ChangedFileError",
    "DataWarning",
    "Dataset",
    "Images",
    "Source",
    "default_data_dir",
    "load_dataset",
    "read_arrays",
    "read_digits",
    "read_fashion_mnist",
    "read_folder",
    "read_kmnist",
    "read_mnist",
    "read_source",
    "small_in_memory",
]

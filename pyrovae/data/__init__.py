"""Images, and the datasets that they come from."""

from pyrovae.data.datasets import DATASETS, Dataset, Images, load_dataset
from pyrovae.data.folders import DataWarning

__all__ = ["DATASETS", "DataWarning", "Dataset", "Images", "load_dataset"]

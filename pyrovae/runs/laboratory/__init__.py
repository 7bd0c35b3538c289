"""The variance laboratory: estimators compared on a trained run, a fresh one, along one, or on a test-bed.

It leaves a directory with `variance.json`, `variance.csv` and `variance.png`.
"""

from pyrovae.runs.laboratory.files import directory_for, read, results_directory, write
from pyrovae.runs.laboratory.measurements import TESTBEDS, Measurement
from pyrovae.runs.laboratory.tables import FEW_DRAWS, notes, rows, table, title

__all__ = [
    "FEW_DRAWS",
    "TESTBEDS",
    "Measurement",
    "directory_for",
    "notes",
    "read",
    "results_directory",
    "rows",
    "table",
    "title",
    "write",
]

"""Grids of training runs: one run directory for each cell, continued after a kill, summed up in a table.

sweep.json      the cells: what each sets, beside what they share
cells/          each cell's settings as a recipe, and what its process printed
<cell>/         its run directory
.lock           held by the process that runs the sweep (see `locks`)
results.csv     the table: mean and spread over seeds; results.md the same for reading
curves.png      validation ELBO of all runs over epochs
"""

from pyrovae.runs.sweeps.cells import (
    MOST_CELLS,
    Recipe,
    Settings,
    SweepError,
    grid,
    name_of,
    read_recipe,
    recipes,
    without_repeats,
)
from pyrovae.runs.sweeps.sweeps import ORPHANED, Sweep
from pyrovae.runs.sweeps.tables import METRICS, to_markdown

__all__ = [
    "METRICS",
    "MOST_CELLS",
    "ORPHANED",
    "Recipe",
    "Settings",
    "Sweep",
    "SweepError",
    "grid",
    "name_of",
    "read_recipe",
    "recipes",
    "to_markdown",
    "without_repeats",
]

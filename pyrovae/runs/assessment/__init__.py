"""The verdict on a trained run: its test images' evidence, what its latents hold, as JSON and as a table."""

from pyrovae.runs.assessment.doubts import FEW
from pyrovae.runs.assessment.examinations import ENCODED, MADE_WITH, PROBED, Examination
from pyrovae.runs.assessment.files import read, write
from pyrovae.runs.assessment.results import Annealing, Assessment, Average, Bounds, Latents, Weighing
from pyrovae.runs.assessment.tables import remarks, rows, table, title

__all__ = [
    "ENCODED",
    "FEW",
    "MADE_WITH",
    "PROBED",
    "Annealing",
    "Assessment",
    "Average",
    "Bounds",
    "Examination",
    "Latents",
    "Weighing",
    "read",
    "remarks",
    "rows",
    "table",
    "title",
    "write",
]

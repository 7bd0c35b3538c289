"""The file in a run that holds its evaluation."""

import json
from pathlib import Path

from pyrovae.runs.assessment.results import Assessment
from pyrovae.runs.directories import RunError
from pyrovae.runtime.schemas import refused
from pyrovae.runtime.whole_files import write_atomically


def write(run: Path, found: Assessment) -> Path:
    """Writes `evaluation.json` in the run, and gives its path."""
    path = run / "evaluation.json"
    write_atomically(path, json.dumps(found.to_json(), indent=2) + "\n")
    return path


def read(run: Path) -> Assessment | None:
    """The run's `evaluation.json`; None if it has none.

    Raises:
        RunError: It is damaged, or of another version.
    """
    path = run / "evaluation.json"
    if not path.exists():
        return None
    with refused(RunError, f"what evaluate writes in {path}", "; evaluate again"):
        return Assessment.from_json(json.loads(path.read_bytes()))

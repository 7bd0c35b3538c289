"""Files that are malformed at random are read, or refused in one line: the first few of 10,000 mutations.

`python benchmarks/faults/malformed.py` makes them all.
"""

from pathlib import Path

import pytest

from pyrovae.runs import pictures
from tests import fuzzing

MUTATIONS, PARTS = 300, 6  # all, and the tests that share them


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyrovae.runs.training.draw_figures", lambda *args: None)
        place = tmp_path_factory.mktemp("fuzzing") / "made"
        place.mkdir()
        fuzzing.prepare(place)
        return place


@pytest.fixture(autouse=True)
def _undrawn(monkeypatch):
    monkeypatch.setattr("pyrovae.runs.training.draw_figures", lambda *args: None)
    monkeypatch.setattr(pictures, "save", lambda *args: None)  # the driver draws them


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("part", range(PARTS))
def test_no_malformed_file_is_a_traceback(made, part):
    failures = [fuzzing.attempt(made, number) for number in range(part, MUTATIONS, PARTS)]
    assert not list(filter(None, failures))


def test_what_executes_a_file_or_leaves_a_traceback_is_found(made, monkeypatch):
    """The fuzzer can fail."""
    monkeypatch.setitem(fuzzing.DOORS, "npz", fuzzing.Door("images.npz", fuzzing.of_pickle, _unpickle))
    number = list(fuzzing.DOORS).index("npz")
    assert "Executed: unpickled" in "".join(
        fuzzing.attempt(made, number + len(fuzzing.DOORS) * k) for k in range(5)
    )


def _unpickle(place: Path) -> None:
    import pickle

    pickle.loads((place / "images.npz").read_bytes())

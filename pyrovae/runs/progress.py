"""The progress bar of what takes long and is no training."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from pyrovae.evaluation.chunks import Progress


@contextmanager
def progress_bar(*, quiet: bool, unit: str = "it") -> Iterator[Progress]:
    """Shows a bar, and gives the function that moves it: called with what is done, the total, and a name.

    Args:
        quiet: Whether to show nothing.
        unit: The name of one step.
    """
    interval = 0.2 if os.isatty(2) else 10
    with tqdm(unit=unit, disable=quiet, dynamic_ncols=True, mininterval=interval, delay=0.5) as bar:

        def progress(done: int, total: int, what: str) -> None:
            bar.total = total
            bar.set_description(what, refresh=False)
            bar.update(done - bar.n)

        yield progress

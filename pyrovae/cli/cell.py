"""`python -m pyrovae.cli.cell`: the command line for a cell of a sweep, which ends when the sweep does.

The sweep holds the other end of the standard input. When that closes before the cell is done, the sweep has
ended, by SIGKILL perhaps. The cell then sends itself a SIGTERM, upon which it saves its state. A pipe works
on every system, whereas Linux's PR_SET_PDEATHSIG would fire already when the thread that started the cell ends.
"""

import os
import signal
import threading

from pyrovae.cli.group import main


def watch(pipe: int = 0) -> None:
    """Starts a thread that ends this process by SIGTERM when the pipe is closed at its other end."""

    def wait() -> None:
        while os.read(pipe, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="pyrovae-sweep", daemon=True).start()


if __name__ == "__main__":
    watch()
    main()

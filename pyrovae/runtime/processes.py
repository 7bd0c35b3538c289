"""Programs that a sweep runs: told to stop when it is, waited for, and ended when it is no more."""

import signal
import subprocess
from collections.abc import Mapping, Sequence
from typing import IO


class Processes:
    """Child processes of several threads."""

    def __init__(self):
        self.running: set[subprocess.Popen] = set()
        self.stopped: signal.Signals | None = None

    def run(self, command: Sequence[str], log: IO[str], environment: Mapping[str, str]) -> int:
        """Runs a program to its end.

        Its standard input stays open as long as this process lives, from which it can tell when that ends.

        Args:
            log: Where what it prints goes.

        Returns:
            Its exit code, or minus the number of the signal that ended it.
        """
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env=environment
        )
        self.running.add(process)
        if self.stopped is not None:  # it came after the loop in `stop`
            process.send_signal(self.stopped)
        try:
            return process.wait()
        finally:
            self.running.discard(process)
            process.stdin.close()

    def stop(self, number: signal.Signals) -> None:
        """Sends every process a signal, also those that are just being started; from a signal handler, too."""
        self.stopped = number
        for process in list(self.running):
            process.send_signal(number)

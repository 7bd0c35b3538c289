"""Signals that end a run in an orderly way: noted when they come, acted on when the state is whole."""

import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from pyrovae.runtime import distributed

IMPATIENT = 2.0  # seconds after the first signal from which a second Ctrl-C acts at once


class Interrupted(KeyboardInterrupt):
    """Work was stopped by a signal, in order.

    Attributes:
        number: The signal.
    """

    def __init__(self, number: signal.Signals):
        super().__init__(number)
        self.number = number


class DeferredSignals:
    """While entered, SIGINT and SIGTERM are only noted, in `received`, also by those that this is entered in.

    One request to stop may come as several signals: a supervisor sends one to every process, and a launcher
    passes on the one that it got. Therefore further signals change nothing, with one exception: a Ctrl-C that
    comes IMPATIENT seconds after the first signal acts as it would without this.

    Args:
        on_signal: Called by the signal handler with the first signal.
    """

    received: signal.Signals | None = None

    def __init__(self, on_signal: Callable[[signal.Signals], Any] = lambda number: None):
        self.agreement = distributed.Agreement()
        self.on_signal = on_signal
        self.first = 0.0
        self.previous: dict[signal.Signals, Any] = {}

    def stop(self, *, soon: bool = False) -> bool:
        """Whether any process has received one; every process must ask, and all get the same answer.

        Args:
            soon: It may be the answer to the last time of asking, which costs no waiting.
        """
        agree = self.agreement.soon if soon else self.agreement.now
        number = agree(self.received or 0)
        if number:
            self._learn(signal.Signals(number), self.first or time.monotonic())
        return bool(number)

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self._note)
            for outer in self._outer():
                self.received, self.first = outer.received, outer.first
        return self

    def _note(self, number, frame):
        if self.received is None:
            self._learn(signal.Signals(number), time.monotonic())
            self.on_signal(self.received)
        elif number == signal.SIGINT and time.monotonic() > self.first + IMPATIENT:
            self._act(signal.SIGINT)

    def _act(self, number: signal.Signals) -> None:
        """Has a signal do what it did before this was entered."""
        handler = self.previous[number]
        if callable(handler):
            handler(number, None)
        else:
            signal.signal(number, handler)
            signal.raise_signal(number)

    def __exit__(self, *exc):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _learn(self, number: signal.Signals, first: float) -> None:
        self.received, self.first = number, first
        for outer in self._outer():
            outer._learn(number, first)

    def _outer(self) -> list["DeferredSignals"]:
        owners = [getattr(handler, "__self__", None) for handler in self.previous.values()]
        return [owner for owner in owners if isinstance(owner, DeferredSignals)]


class StoppingSignals(DeferredSignals):
    """While entered, the first SIGINT or SIGTERM acts as ever, and later ones are taken as the same request.

    If a `DeferredSignals` within this notes a first one, that counts too, so that no later signal cuts off the
    last words of the program.
    """

    def __init__(self):
        super().__init__(self._act)

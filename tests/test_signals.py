"""Signals to stop: noted, however many come, and acted on when it is time."""

import signal

import pytest

from pyrovae.runtime import signals
from pyrovae.runtime.signals import DeferredSignals, StoppingSignals


def test_a_supervisor_s_and_a_launcher_s_signals_are_one_request():
    seen = []
    with DeferredSignals(seen.append) as noted:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(number)
    assert noted.received == signal.SIGTERM
    assert seen == [signal.SIGTERM]


def test_a_second_ctrl_c_acts_at_once_unless_it_comes_with_the_first(monkeypatch):
    with DeferredSignals() as noted:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        monkeypatch.setattr(signals, "IMPATIENT", 0.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert noted.received == signal.SIGINT


def test_a_first_signal_of_a_program_acts_and_those_after_it_do_not():
    with StoppingSignals():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)


def test_nothing_cuts_off_the_last_words_of_a_program_that_was_told_to_stop():
    before = signal.getsignal(signal.SIGTERM)
    with StoppingSignals():
        with DeferredSignals() as noted:
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # would end the tests
        with DeferredSignals():
            pass
        signal.raise_signal(signal.SIGTERM)
    assert noted.received == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_one_within_another_knows_what_that_has_noted():
    with DeferredSignals() as outer:
        with DeferredSignals() as first:
            pass
        assert first.received is outer.received is None
        signal.raise_signal(signal.SIGTERM)
        with DeferredSignals() as second:
            assert second.received == signal.SIGTERM


def test_those_that_one_is_entered_in_know_what_it_learns(monkeypatch):
    with StoppingSignals() as outermost, DeferredSignals() as outer, DeferredSignals() as inner:
        monkeypatch.setattr(inner.agreement, "now", lambda number: signal.SIGTERM)  # another process got it
        assert inner.stop()
        assert inner.received == outer.received == outermost.received == signal.SIGTERM
        monkeypatch.setattr(signals, "IMPATIENT", 0.0)
        with pytest.raises(KeyboardInterrupt):  # at once, however many there are
            signal.raise_signal(signal.SIGINT)


def test_the_previous_handler_is_restored_and_used():
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *args: seen.append("mine"))
    try:
        with StoppingSignals():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == ["mine", "mine"]

"""The command line."""

from pyrovae.cli.group import SUMMARIES, LazyGroup, main

__all__ = ["SUMMARIES", "LazyGroup", "main"]

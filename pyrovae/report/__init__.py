"""A run as one HTML page."""

from pyrovae.report.page import report

__all__ = ["report"]

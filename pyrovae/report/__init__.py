"""A run as one HTML page: `page` puts it together from sections, which the other modules make."""

from pyrovae.report.elements import DPI, Fact, Picture, Section, Table
from pyrovae.report.page import SECTIONS, SUFFIXES, path_for, report, save
from pyrovae.report.subjects import Subject
from pyrovae.report.words import NONE, TIMES

__all__ = [
    "DPI",
    "NONE",
    "SECTIONS",
    "SUFFIXES",
    "TIMES",
    "Fact",
    "Picture",
    "Section",
    "Subject",
    "Table",
    "path_for",
    "report",
    "save",
]

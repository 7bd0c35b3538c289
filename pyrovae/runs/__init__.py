"""Runs: their settings and directories, sweeps and recipes, and what is pictured and measured of them."""

from pyrovae.runtime.lazily import lazily

_NAMES_OF = {
    "training": ["train", "resume", "load", "is_complete", "StoppedError"],
    "config": ["Config"],
    "directories": ["read_config"],
    "sweeps": ["Recipe", "Sweep", "read_recipe", "recipes"],
    "assessment": ["Examination", "Assessment"],
    "laboratory": ["Measurement"],
}
__getattr__, __dir__, __all__ = lazily(__name__, _NAMES_OF)

"""Runs: their settings and directories, sweeps and recipes, and what is pictured and measured of them."""

from pyrovae.runtime.lazily import lazily

_NAMES_OF = {
    "training": ["train", "resume", "StoppedError", "MAY_CHANGE"],
    "loading": ["load"],
    "drawing": ["samples", "is_complete", "PICTURED", "ENCODED", "LAST_FIGURE", "MOST_ROWS", "GRID_SIDE"],
    "config": ["Config"],
    "directories": ["RunError", "admit", "new_directory", "read_config"],
    "sweeps": ["Recipe", "Sweep", "read_recipe", "recipes"],
    "assessment": ["Examination", "Assessment"],
    "laboratory": ["Measurement"],
}
__getattr__, __dir__, __all__ = lazily(__name__, _NAMES_OF)

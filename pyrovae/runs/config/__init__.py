"""One frozen dataclass that names a run, and the objects it stands for.

Each field is also an option of `pyrovae train`, and a key of a run's `config.json`.
"""

from pyrovae.runs.config.checks import GUIDE_SETTINGS
from pyrovae.runs.config.configs import PARTS, Config
from pyrovae.runs.config.options import flag, option, spelled
from pyrovae.runs.config.settings import COMPILE, LONG

__all__ = ["COMPILE", "GUIDE_SETTINGS", "LONG", "PARTS", "Config", "flag", "option", "spelled"]

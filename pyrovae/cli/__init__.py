"""The command line: click only. A module for each command, but for the pictures, parses, calls and prints."""

from pyrovae.cli.group import MODULES, SUMMARIES, LazyGroup, main
from pyrovae.runtime.lazily import lazily

_NAMES_OF = {module: [] for module in MODULES.values()} | {"messages": ["EXIT_FAILED", "EXIT_WRONG_CALL"]}
for _command, _module in MODULES.items():
    _NAMES_OF[_module].append(f"{_command.replace('-', '_')}_command")
__getattr__, __dir__, __all__ = lazily(__name__, _NAMES_OF)
__all__ += ["SUMMARIES", "LazyGroup", "main"]

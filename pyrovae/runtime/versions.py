"""The versions of the packages that a result was made with, with or without installed distributions."""

import platform
from collections.abc import Sequence
from importlib import import_module, metadata

from pyrovae import __version__

MODULES = {"pyro-ppl": "pyro", "scikit-learn": "sklearn"}  # where a distribution's name is not its module's
UNKNOWN = "unknown"


def version_of(distribution: str) -> str:
    """The version of a package, as its metadata or else its module states it.

    A copied or vendored package has no metadata. The version of pyrovae is always the one of the code that
    runs, because the metadata may belong to another copy.

    Returns:
        The version, or "unknown" where neither the metadata nor the module states one.

    Example:
        >>> version_of("no-such-package")
        'unknown'
    """
    if distribution == "pyrovae":
        return __version__
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        pass
    try:
        module = import_module(MODULES.get(distribution, distribution))
    except ImportError:
        return UNKNOWN
    return str(getattr(module, "__version__", UNKNOWN))


def recorded(distributions: Sequence[str]) -> dict[str, str]:
    """The versions of Python and of these packages, by name, for the record of a result."""
    return {"python": platform.python_version()} | {name: version_of(name) for name in distributions}

"""Makes the names of `pyrovae` known to the reference.

`pyrovae` imports its names when they are first used, so its source does not show them.
"""

import griffe

import pyrovae


class PublicNames(griffe.Extension):
    """Adds each class and function that `pyrovae` offers to the package as an alias."""

    def on_package(self, *, pkg: griffe.Module, **kwargs) -> None:
        """Adds the aliases, once the package has been read."""
        for name in pyrovae.__all__:
            module = getattr(getattr(pyrovae, name), "__module__", None)
            if module and name not in pkg.members:
                pkg.set_member(name, griffe.Alias(name, target=f"{module}.{name}", parent=pkg))

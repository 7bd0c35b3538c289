"""What programs refer to, found by reading their code: modules, settings, generators, and where each stands.

A walk starts at some functions and follows what their code names: closures, globals, defaults,
`functools.partial`, bound methods, containers and attributes. Of an object, only those attributes count that
some code on the way reads or sets, so that the counters of a training loop that lives beside a model are left
alone. The walk is bounded, and code can reach things in ways that cannot be read (`getattr` by a computed
name, functions written in C). Whoever needs completeness must check results as well.
"""

from pyrovae.programs.references.found import References
from pyrovae.programs.references.places import Place, Snapshot, is_plain, same

__all__ = ["Place", "References", "Snapshot", "is_plain", "same"]

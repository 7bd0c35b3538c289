"""Errors that know which setting they are about."""

from typing import Any


class FieldError(ValueError):
    """A setting, or an argument of a function, has a wrong value.

    The command line names its option in place of the field. Errors of more than one setting have no field.

    Attributes:
        field: The name with which the message goes on after "expected", or None.

    Example:
        >>> FieldError("expected seed >= 0, got -1", field="seed").about("--seed")
        'expected --seed >= 0, got -1'
    """

    def __init__(self, *arguments: Any, field: str | None = None):
        super().__init__(*arguments)
        self.field = field

    def about(self, name: str) -> str:
        """The message with another name in place of the field's."""
        return str(self).replace(f"expected {self.field}", f"expected {name}", 1)

"""Fields of config dataclasses, with their meaning and limits."""

from dataclasses import field
from typing import Any


def option(default: Any, help: str, **limits: Any) -> Any:
    """A dataclass field with its meaning and any of the limits at_least, above, at_most, below, choices.

    A list or dict as default is copied for every instance.
    """
    metadata = {"help": help, **limits}
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)

"""Fields of config dataclasses, with their meaning, their limits, and what they are read with."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Condition:
    """What must hold for an option to be read.

    Attributes:
        keys: of other options, or names of groups, of which any one must be so.
        values: that these may have, or entries that may be chosen.
        is_excluding: whether they must have none of ``values`` instead.
    """

    keys: tuple[str, ...]
    values: tuple[Any, ...]
    is_excluding: bool = False

    def __str__(self) -> str:
        sign, values = (
            " other than " if self.is_excluding else "=",
            " or ".join(map(as_argument, self.values)),
        )
        return " or ".join(f"{key}{sign}{values}" for key in self.keys)


def as_argument(value: Any) -> str:
    """A value as one would write it on the command line."""
    if value is None:
        return "null"
    if value == "":
        return "''"
    return str(value).lower() if isinstance(value, bool) else str(value)


def where(key: str, *values: Any) -> Condition:
    """Read where a key has one of the values, or one of the entries of a group is chosen."""
    return Condition((key,), values)


def unless(*keys: str, equal: Any) -> Condition:
    """Read unless all of these keys have the value."""
    return Condition(keys, (equal,), is_excluding=True)


def option(default: Any, help: str, *read: Condition, **limits: Any) -> Any:
    """A dataclass field with its meaning and any of the limits at_least, above, at_most, below, choices.

    A list or dict as default is copied for every instance.

    Args:
        read: what must hold, all of it, for the option to be read.
        limits: see above; and ``off``, a value that asks for nothing, which may be given where nothing is read.
    """
    metadata = {"help": help, "read": read, **limits}
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def read_with(*read: Condition) -> dict[str, Any]:
    """Metadata of a field that is a section: what must hold for any of its options to be read."""
    return {"read": read}

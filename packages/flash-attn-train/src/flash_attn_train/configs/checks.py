"""Checks of a config against the schema: types, ranges, and what must fit together."""

from __future__ import annotations

import dataclasses
import difflib
import operator
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from flash_attn_train.configs.fit import check_together
from flash_attn_train.configs.option import Condition
from flash_attn_train.configs.schema import TrainConfig
from flash_attn_train.errors import ConfigError

_TYPE_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
}


@dataclasses.dataclass(frozen=True)
class Option:
    """One leaf of the schema."""

    key: str
    type: Any
    default: Any
    metadata: Mapping[str, Any]


def describe_type(annotation: Any) -> str:
    """The type in words, e.g. ``a whole number or null``."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe_type(part) for part in arguments)
    if origin is list:
        return "a list of " + describe_type(arguments[0])
    if origin is dict:
        return "a mapping"
    if dataclasses.is_dataclass(annotation):
        return "{" + ", ".join(field.name for field in dataclasses.fields(annotation)) + "}"
    return _TYPE_NAMES[annotation]


def options(
    schema: Any = TrainConfig, prefix: str = "", read: tuple[Condition, ...] = ()
) -> Iterator[Option]:
    """Every leaf option in order, with dotted keys: of a config, or of a config class with its default variants.

    Args:
        prefix: of the keys.
        read: conditions of the section that ``schema`` is, which come before those of each option.
    """
    hints = typing.get_type_hints(schema if isinstance(schema, type) else type(schema))
    for item in dataclasses.fields(schema):
        annotation = hints[item.name]
        if dataclasses.is_dataclass(annotation):
            section = typing.cast(Callable, item.default_factory)() if isinstance(schema, type) else None
            chosen = getattr(schema, item.name) if section is None else type(section)
            yield from options(chosen, f"{prefix}{item.name}.", (*read, *item.metadata.get("read", ())))
        else:
            factory = item.default_factory
            default = item.default if factory is dataclasses.MISSING else factory()
            metadata = {**item.metadata, "read": (*read, *item.metadata["read"])}
            yield Option(prefix + item.name, annotation, default, metadata)


def flatten(config: TrainConfig) -> dict[str, Any]:
    """Dotted key -> value, and section -> name of its class for those with variants."""
    flat: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        section = getattr(config, item.name)
        if dataclasses.is_dataclass(section) and type(section).__bases__ != (object,):
            flat[item.name] = type(section).__name__
    for option in options(config):
        value = get_value(config, option.key)
        flat[option.key] = [_plain(element) for element in value] if isinstance(value, list) else value
    return flat


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # type: ignore[arg-type]


def get_value(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config


def unknown_key(key: str, known: list[str]) -> ConfigError:
    """The error for a key that the schema does not have, with the nearest one that it has."""
    section, _, name = key.rpartition(".")
    # A right name in the wrong section ("n_layer", "trainer.lr") is nearer than a similar spelling, and a name in the
    # right section nearer than one elsewhere.
    same_name = [other for other in known if other.split(".")[-1] == name]
    same_section = [other for other in known if section and other.startswith(f"{section}.")]
    nearest = same_name or difflib.get_close_matches(key, same_section or known, n=1, cutoff=0.0)
    topic = section.split(".")[0] if same_section else "all"
    return ConfigError(
        f"unknown config key {key!r}: the nearest valid name is {nearest[0]!r}. `flash-attn-train --help={topic}` "
        f"lists {'those of this section' if same_section else 'all of them'}."
    )


def wrong_type(key: str, got: Any, annotation: Any) -> ConfigError:
    return ConfigError(f"{key}: got {got!r} ({type(got).__name__}), expected {describe_type(annotation)}.")


def check_config(config: TrainConfig) -> None:
    """Raises :class:`ConfigError` unless every value has its type, is in range, and fits the others."""
    for option in options(config):
        value = get_value(config, option.key)
        if not _has_type(value, option.type):
            raise wrong_type(option.key, value, option.type)
        if value is not None:
            _check_limits(option, value)
    check_together(config)


def _has_type(value: Any, annotation: Any) -> bool:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(_has_type(value, part) for part in arguments)
    if origin is list:
        return isinstance(value, list) and all(_has_type(element, arguments[0]) for element in value)
    if origin is dict:
        return isinstance(value, dict)
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, annotation)


_LIMITS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "at_least": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "at_most": ("at most", operator.le),
    "below": ("below", operator.lt),
    "choices": ("one of", lambda value, limit: value in limit),
}


def _check_limits(option: Option, value: Any) -> None:
    for name, (_, holds) in _LIMITS.items():
        if name in option.metadata and not holds(value, option.metadata[name]):
            raise ConfigError(f"{option.key}: got {value!r}, expected {describe_limits(option)}.")


def describe_limits(option: Option) -> str:
    """Type and range in words, e.g. ``a number or null, above 0.0 and at most 1.0``."""
    if "choices" in option.metadata:
        return "one of " + ", ".join(map(str, option.metadata["choices"]))
    limits = [
        f"{words} {option.metadata[name]}" for name, (words, _) in _LIMITS.items() if name in option.metadata
    ]
    return ", ".join([describe_type(option.type), *([" and ".join(limits)] if limits else [])])

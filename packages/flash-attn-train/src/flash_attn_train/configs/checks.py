"""Checks of a config against the schema: known keys, types, ranges, and what must fit together."""

from __future__ import annotations

import dataclasses
import difflib
import operator
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

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
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " or ".join(describe_type(part) for part in typing.get_args(annotation))
    if typing.get_origin(annotation) is list:
        return "a list of " + describe_type(typing.get_args(annotation)[0])
    return _TYPE_NAMES[annotation]


def options(schema: type = TrainConfig, prefix: str = "") -> Iterator[Option]:
    """Every leaf option of the schema in order, with dotted keys."""
    hints = typing.get_type_hints(schema)
    for item in dataclasses.fields(schema):
        annotation = hints[item.name]
        if dataclasses.is_dataclass(annotation):
            yield from options(typing.cast(type, annotation), f"{prefix}{item.name}.")
        else:
            factory = item.default_factory
            default = item.default if factory is dataclasses.MISSING else factory()
            yield Option(prefix + item.name, annotation, default, item.metadata)


def flatten(config: TrainConfig) -> dict[str, Any]:
    """Dotted key -> value."""
    return {option.key: get_value(config, option.key) for option in options()}


def get_value(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config


def unknown_key(key: str, known: list[str]) -> ConfigError:
    """The error for a key that the schema does not have, with the nearest one that it has."""
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    # A right name in the wrong section ("n_layer", "trainer.lr") is nearer than a similar spelling.
    same_name = [name for name in known if name.split(".")[-1] == key.split(".")[-1]]
    return ConfigError(
        f"unknown config key {key!r}: the nearest valid name is {(same_name or nearest)[0]!r}. "
        "`flash-attn-train --help` lists all of them."
    )


def wrong_type(key: str, got: Any, annotation: Any) -> ConfigError:
    return ConfigError(f"{key}: got {got!r} ({type(got).__name__}), expected {describe_type(annotation)}.")


def check_config(config: TrainConfig) -> None:
    """Raises :class:`ConfigError` unless every value has its type, is in range, and fits the others."""
    for option in options():
        value = get_value(config, option.key)
        if not _has_type(value, option.type):
            raise wrong_type(option.key, value, option.type)
        if value is not None:
            _check_limits(option, value)
    _check_together(config)


def _has_type(value: Any, annotation: Any) -> bool:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return any(_has_type(value, part) for part in typing.get_args(annotation))
    if typing.get_origin(annotation) is list:
        return isinstance(value, list) and all(_has_type(v, typing.get_args(annotation)[0]) for v in value)
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
        return "one of " + ", ".join(option.metadata["choices"])
    limits = [
        f"{words} {option.metadata[name]}" for name, (words, _) in _LIMITS.items() if name in option.metadata
    ]
    return ", ".join([describe_type(option.type), *([" and ".join(limits)] if limits else [])])


def _check_together(config: TrainConfig) -> None:
    model, scheduler = config.model, config.scheduler
    if model.d_model % model.n_head:
        raise ConfigError(
            f"model.d_model: got {model.d_model}, expected a multiple of model.n_head ({model.n_head}); "
            "change one of the two."
        )
    if model.n_head_kv is not None and model.n_head % model.n_head_kv:
        raise ConfigError(
            f"model.n_head_kv: got {model.n_head_kv}, expected a divisor of model.n_head ({model.n_head})."
        )
    decay_steps = scheduler.decay_steps or config.trainer.max_steps
    if scheduler.warmup_steps is not None and scheduler.warmup_steps > decay_steps:
        raise ConfigError(
            f"scheduler.warmup_steps: got {scheduler.warmup_steps}, expected at most {decay_steps}, the "
            "length of the schedule (scheduler.decay_steps, or trainer.max_steps where that is null)."
        )

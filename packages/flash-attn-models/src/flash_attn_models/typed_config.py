"""What the typed configs of all families share: how they are made of named fields, and what a field may be."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from flash_attn_models.errors import bad_argument, did_you_mean

Config = TypeVar("Config")
Preset = TypeVar("Preset")


def config_of(cls: type[Config], fields: Mapping[str, Any]) -> Config:
    """The config, a dataclass, with these fields. Unknown and missing names are refused, with the nearest valid one."""
    declared = dataclasses.fields(cls)  # type: ignore[arg-type]
    valid = [field.name for field in declared]
    for name in fields:
        if name not in valid:
            raise bad_argument(
                cls.__name__,
                f"unknown field {name!r}{did_you_mean(name, valid)}",
                f"only the fields {', '.join(valid)}",
                f"correct or remove {name!r}",
            )
    required = [field.name for field in declared if field.default is dataclasses.MISSING]
    missing = [name for name in required if name not in fields]
    if missing:
        raise bad_argument(
            cls.__name__,
            f"no {', '.join(missing)}",
            f"at least the fields {', '.join(required)}",
            "add what is missing",
        )
    return cls(**fields)


def preset_of(presets: Mapping[str, Preset], size: str) -> Preset:
    """The preset of that name; others are refused, with the nearest valid one."""
    if size not in presets:
        raise bad_argument(
            "size",
            repr(size),
            f"one of {', '.join(map(repr, presets))}{did_you_mean(size, presets)}",
            "choose one of these",
        )
    return presets[size]


def is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)

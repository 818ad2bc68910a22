"""What a saved config says that is not said by default."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flash_attn_train.configs import TrainConfig
from flash_attn_train.configs.store import SCHEMAS


def config_changes(saved: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (value, default) of what differs, from the content of a ``config.yaml``.

    Defaults are those of the config classes. A section with variants is compared with the one that has its keys.
    Keys that no class has (any more) come with the default None.
    """
    changes: dict[str, tuple[Any, Any]] = {}
    defaults = dataclasses.asdict(TrainConfig())
    for name, value in saved.items():
        if isinstance(value, Mapping):
            variants = SCHEMAS.get(name, {}).values()
            matching = [v for v in variants if {f.name for f in dataclasses.fields(v)} == set(value)]
            default = dataclasses.asdict(matching[0]()) if matching else defaults.get(name, {})
        else:
            default = defaults.get(name)
        changes |= _differences(name, value, default)
    return changes


def _differences(key: str, value: Any, default: Any) -> dict[str, tuple[Any, Any]]:
    if isinstance(value, Mapping) and isinstance(default, Mapping) and default:
        changes: dict[str, tuple[Any, Any]] = {}
        for name, part in value.items():
            changes |= _differences(f"{key}.{name}", part, default.get(name))
        return changes
    return {} if value == default else {key: (value, default)}

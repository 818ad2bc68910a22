"""Options that are set and that nothing reads, which is an error: what is asked for must happen.

Each option, or its section, says what it is read with (:mod:`flash_attn_train.configs.option`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from flash_attn_train.configs.checks import Option, get_value, options
from flash_attn_train.configs.data import DATA
from flash_attn_train.configs.image_data import IMAGE_DATA
from flash_attn_train.configs.model import MODELS
from flash_attn_train.configs.option import Condition, as_argument
from flash_attn_train.configs.schema import TrainConfig
from flash_attn_train.configs.task import TASKS
from flash_attn_train.errors import ConfigError

_GROUPS: dict[str, Mapping[str, type]] = {"task": TASKS, "model": MODELS, "data": {**DATA, **IMAGE_DATA}}


def check_read(config: TrainConfig, given: Collection[str] = ()) -> None:
    """Raises :class:`ConfigError` for an option that is set and that the run does not read.

    Set is what differs from its default where the chosen task, model or data do not read it. Where it is another
    option that keeps it from being read, such as ``callbacks.ema.enabled=false``, that may be meant for a while: then
    only what is in ``given`` counts.

    Args:
        given: keys of the command line.
    """
    for option, failing in _unread(config):
        value, is_asked = get_value(config, option.key), is_given(option.key, given)
        if "off" in option.metadata and option.metadata["off"] == value:
            continue
        for condition, actual in failing:
            if is_asked or (_is_choice(condition) and value != option.default):
                found = " and ".join(f"{key}={as_argument(got)}" for key, got in actual.items())
                more = (
                    ""
                    if is_asked
                    else "; where an experiment sets it, choose another one, or experiment=none"
                )
                raise ConfigError(
                    f"{option.key}: got {as_argument(value)}, which nothing reads with {found}; it is for "
                    f"{condition}. Leave it out{more}."
                )


def reset_unread(config: TrainConfig) -> None:
    """Puts options that the chosen task, model and data do not read back to their defaults, in place."""
    for option, failing in _unread(config):
        if any(_is_choice(condition) for condition, _ in failing):
            path, _, name = option.key.rpartition(".")
            setattr(get_value(config, path) if path else config, name, option.default)


def is_given(key: str, given: Collection[str]) -> bool:
    """Whether the key is among these, or an entry of the mapping that it is."""
    return key in given or any(other.startswith(f"{key}.") for other in given)


def _unread(config: TrainConfig) -> Iterator[tuple[Option, list[tuple[Condition, dict[str, Any]]]]]:
    """Options of which conditions do not hold: these, each with what its keys are instead."""
    found = list(options(config))
    actual = {option.key: get_value(config, option.key) for option in found}
    actual |= {group: _entry(group, getattr(config, group)) for group in _GROUPS}
    for option in found:
        failing = []
        for condition in option.metadata["read"]:
            # A section's condition on one of its options is not for that option. What the chosen variants do not have
            # keeps nothing from being read.
            values = {key: actual[key] for key in condition.keys if key != option.key and key in actual}
            if (
                all((value in condition.values) == condition.is_excluding for value in values.values())
                and values
            ):
                failing.append((condition, values))
        if failing:
            yield option, failing


def _is_choice(condition: Condition) -> bool:
    return condition.keys[0] in _GROUPS


def _entry(group: str, section: Any) -> str | None:
    return next((name for name, schema in _GROUPS[group].items() if schema is type(section)), None)

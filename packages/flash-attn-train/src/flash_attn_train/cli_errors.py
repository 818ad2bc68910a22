"""What Hydra and OmegaConf find wrong, in this package's words: key, got, expected."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from flash_attn_train.configs.checks import describe_type, unknown_key, wrong_type
from flash_attn_train.configs.store import all_options, every_option, mappings
from flash_attn_train.errors import ConfigError


def translated(error: Exception, values: dict[str, Any]) -> ConfigError:
    """The error for one that composing raised.

    Args:
        values: key -> value, of the command line.
    """
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError, InterpolationResolutionError

    place = re.match(r"In '([^']+)'", str(error))
    file = f"{place[1]}.yaml: " if place and place[1] != "train" else ""
    known = {option.key: option for option in every_option()}
    for cause in _chain(error):
        key = (getattr(cause, "full_key", None) or "").split("[")[0]
        if isinstance(cause, InterpolationResolutionError):
            return ConfigError(
                f"{file}{key}: {_first_line(cause)}; expected no '${{', or the name of another key in it. Write "
                "'\\${' for the characters themselves."
            )
        if isinstance(cause, (ConfigKeyError, ConfigAttributeError)):
            given = re.search(r"Could not override '([^']+)'", str(error))
            return _unknown(cause, key, file, given[1] if given else key)
        if key in known and key in values:
            return wrong_type(key, values[key], known[key].type)
        if key in known:
            return ConfigError(
                f"{file}{key}: {_first_line(cause)}; expected {describe_type(known[key].type)}."
            )
    return ConfigError(f"{file}{error}")


def not_in_variant(key: str) -> ConfigError:
    """The error for a key that only other variants of its section have."""
    group = key.split(".")[0]
    field = ".".join(key.split(".")[:2]) if key.startswith(mappings()) else key
    having = [
        section.split(".")[1]
        for section, found in all_options()
        if section.startswith(f"{group}.") and field in (option.key for option in found)
    ]
    return ConfigError(
        f"{key}: the chosen {group} has no such key; expected {group}= one that is made of "
        f"{' or '.join(having)}."
    )


def _unknown(cause: BaseException, key: str, file: str, given: str) -> ConfigError:
    """For a key that there is not. ``given`` is the one on the command line, of which it may be a part."""
    keys = [option.key for option in every_option()]
    if key in keys:
        return ConfigError(f"{file}{not_in_variant(key)}")
    if given in keys:  # a list of mappings, one of which has another key
        return ConfigError(
            f"{given}: {_first_line(cause)}. `flash-attn-train --help={given}` shows what it takes."
        )
    if key in ("experiment", "mode"):
        return ConfigError(
            f"{file}expected '# @package _global_' as its first line, since it sets values of several sections."
        )
    return ConfigError(f"{file}{unknown_key(key, keys)}")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__  # Hydra hides the causes of what it finds in files


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]

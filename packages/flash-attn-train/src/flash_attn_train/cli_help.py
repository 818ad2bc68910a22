"""What ``flash-attn-train --help`` prints: usage and sections, or with ``--help=SECTION`` the options of one."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence
from pathlib import Path

from flash_attn_train.configs.checks import Option, describe_limits, unknown_key
from flash_attn_train.configs.option import as_argument
from flash_attn_train.configs.schema import TrainConfig
from flash_attn_train.configs.store import DEFAULTS, SCHEMAS, all_options, entries

_WIDTH = 110
_INTRODUCTION = """\
Pretrain a model: language models on text, BERT, vision transformers.

usage: flash-attn-train [experiment=NAME] [GROUP=NAME ...] [key=value ...]
       flash-attn-train [...] --print-config
       flash-attn-train --help[=SECTION] | --version

examples:
  flash-attn-train experiment=quickstart
  flash-attn-train experiment=quickstart data.path=my_texts/ model.n_layer=6 trainer.max_steps=2000
  flash-attn-train experiment=owt/gpt2s trainer.devices=8
  flash-attn-train experiment=quickstart resume=true
  flash-attn-train experiment=owt/gpt2s mode=smoke

--print-config shows the config that the rest of the command line makes; --config-dir=FOLDER adds groups of one's own,
such as FOLDER/experiment/mine.yaml."""


def help_text(topic: str = "", folders: Sequence[Path] = ()) -> str:
    """Help on everything in short (""), on a section ("model", "model.gpt"), a key ("model.n_layer"), or "all".

    Args:
        topic: see above.
        folders: with more groups, see :func:`flash_attn_train.configs.store.compose`.

    Raises:
        ConfigError: there is no such topic.
    """
    if not topic:
        return _overview(folders)
    if topic == "all":
        return "\n\n".join([_overview(folders), *(_section(*found) for found in all_options())])
    parts = []
    if topic in SCHEMAS:
        parts.append(_group(topic, folders))
    for name, found in all_options():
        if name and topic in (name, name.split(".")[0]):
            parts.append(_section(name, found))
        elif chosen := tuple(option for option in found if option.key == topic):
            parts.append(_section(name, chosen))
    if not parts:
        raise unknown_key(
            topic, [*SCHEMAS, *_sections(), *(o.key for _, found in all_options() for o in found)]
        )
    return "\n\n".join(parts)


def show_default(option: Option) -> str:
    """The default as one would write it on the command line."""
    return as_argument(option.default)


def _overview(folders: Sequence[Path]) -> str:
    groups = [_group(group, folders) for group in SCHEMAS]
    sections = [
        textwrap.fill(f"  {name:<31}{meaning}", _WIDTH, subsequent_indent=" " * 33)
        for name, meaning in _sections().items()
    ]
    return "\n".join(
        [
            _INTRODUCTION,
            "",
            "groups, with the default first (experiment is also called preset):",
            *groups,
            "",
            "sections of options; --help=SECTION shows them, --help=all all of them:",
            *sections,
            "",
            "options of no section:",
            *_lines(all_options()[0][1]),
        ]
    )


def _group(group: str, folders: Sequence[Path]) -> str:
    default = DEFAULTS[group]
    names = [default, *(name for name in entries(group, folders) if name != default)]
    return textwrap.fill(
        f"{group}: " + ", ".join(names),
        _WIDTH,
        initial_indent="  ",
        subsequent_indent="      ",
        break_on_hyphens=False,
        break_long_words=False,
    )


def _sections() -> dict[str, str]:
    """Name -> meaning, of sections such as "trainer" and of variants such as "model.gpt"."""
    plain = {item.name: item.type for item in dataclasses.fields(TrainConfig)}
    meanings = {}
    for name, _ in all_options():
        section, _, variant = name.partition(".")
        schema = SCHEMAS[section][variant] if variant else plain.get(section)
        if schema is not None:
            meanings[name] = " ".join((schema.__doc__ or "").replace("``", "").split())
    return meanings


def _section(name: str, found: Sequence[Option]) -> str:
    heading = f"{name}: {_sections()[name]}" if name else "options of no section:"
    return "\n".join([*textwrap.wrap(heading, _WIDTH, subsequent_indent="  "), *_lines(found)])


def _lines(found: Sequence[Option]) -> list[str]:
    lines = []
    for option in found:
        lines.append(f"  {option.key}={show_default(option)}")
        read = [
            f"for {condition}" for condition in option.metadata["read"] if option.key not in condition.keys
        ]
        limits = "; ".join([describe_limits(option), *read])
        lines.append(f"      {option.metadata['help']} [{limits}]")
    return lines

"""Rotary frequencies in Hugging Face configs: ``rope_theta`` and ``rope_scaling`` (transformers 4), or
``rope_parameters`` (5)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flash_attn_models.gpt.config import GPTConfig
from flash_attn_models.gpt.hugging_face.config_fields import unsupported
from flash_attn_models.gpt.rotary_scaling import RotaryScaling

_ORIGINAL = "original_max_position_embeddings"
_SHARE = "partial_rotary_factor"
ROPE_FIELDS = frozenset({"rope_theta", "rope_scaling", "rope_parameters", _ORIGINAL, _SHARE})
_DEFAULT_BASE = 10000.0
_KINDS = ("linear", "dynamic", "yarn", "llama3", "longrope")


@dataclass(frozen=True)
class Rope:
    """What a config says of rotary positions.

    Attributes:
        base: of the frequencies.
        scaling: of the frequencies.
        share: of each head that rotates.
    """

    base: float
    scaling: RotaryScaling | None
    share: float


def rope_from(
    fields: Mapping[str, Any],
    max_seqlen: object,
    *,
    base_field: str = "rope_theta",
    share_field: str | None = None,
    share: float = 1.0,
) -> Rope:
    """Read all fields that have to do with it.

    Args:
        fields: contents of ``config.json``.
        max_seqlen: its context.
        base_field, share_field: where transformers 4 keeps base and share of this family (None: whole heads only).
        share: the family's default.
    """
    base = fields.get(base_field)
    share = fields.get(share_field, share) if share_field else share
    scaling = None
    for field in ("rope_scaling", "rope_parameters"):
        rope = _given(field, fields.get(field))
        base = rope.pop("rope_theta", base)
        given_share = rope.pop(_SHARE, share)
        if share_field is None and given_share != 1.0:
            raise unsupported(field, fields[field], f"{_SHARE} 1.0, because this family rotates whole heads")
        share = given_share
        old_kind = rope.pop("type", "default")
        kind = rope.pop("rope_type", old_kind)
        if kind == "default":
            if rope:
                raise unsupported(
                    field, fields[field], f"only rope_theta and rope_type, not {', '.join(rope)}"
                )
            continue
        if kind == "su":
            kind = "longrope"  # its first name
        if fields.get(_ORIGINAL) is not None:  # some configs have it beside the others
            rope.setdefault(_ORIGINAL, fields[_ORIGINAL])
        scaling = _scaling_from(field, fields[field], kind, rope, max_seqlen)
    if fields.get(_SHARE, share) not in (None, share):
        why = "other fields say so" if share_field else "this family rotates whole heads"
        raise unsupported(_SHARE, fields[_SHARE], f"{share}, because {why}")
    return Rope(_DEFAULT_BASE if base is None else base, scaling, share)


def _given(field: str, value: object) -> dict[str, Any]:
    """What is said in one of the dictionaries."""
    if not isinstance(value, Mapping | None):
        raise unsupported(field, value, "an object of parameters, or null")
    return {name: given for name, given in (value or {}).items() if given is not None}


def _scaling_from(
    field: str, given: object, kind: object, parameters: dict[str, Any], max_seqlen: object
) -> RotaryScaling:
    if kind not in _KINDS:
        raise unsupported(
            field, given, f"rope_type 'default' or one of {', '.join(map(repr, _KINDS))}, not {kind!r}"
        )
    original = parameters.pop(_ORIGINAL, None)
    if kind == "yarn":
        parameters.pop("finetuned", None)  # of YaRN's authors: whether weights were trained with it
    if kind == "dynamic":
        if original not in (None, max_seqlen):
            raise unsupported(
                field, given, f"original_max_position_embeddings {max_seqlen}, the config's context"
            )
    elif kind != "linear":  # which divides positions, wherever pretraining ended
        parameters["original_max_seqlen"] = max_seqlen if original is None else original
    try:
        return RotaryScaling.from_dict({"kind": kind, **parameters})
    except ValueError as error:
        raise unsupported(field, given, f"the parameters that {kind!r} has ({error})") from error


def rope_to(config: GPTConfig, *, share: bool = False) -> dict[str, Any]:
    """The fields that transformers 5, and in families that rotate whole heads transformers 4, read.

    Args:
        config: with rotary positions.
        share: whether the family may rotate a part of each head.
    """
    scaling: dict[str, Any] = {"rope_type": "default"}
    if config.rotary_scaling is not None:
        scaling = config.rotary_scaling.parameters()
        if config.rotary_scaling.kind == "dynamic":
            scaling.pop(_ORIGINAL, None)  # it is the context
    if share:
        scaling["partial_rotary_factor"] = share_of(config)
    fields: dict[str, Any] = {
        "rope_parameters": {**scaling, "rope_theta": config.rotary_base},
        "rope_theta": config.rotary_base,
    }
    if config.rotary_scaling is not None:
        fields["rope_scaling"] = scaling
    return fields


def share_of(config: GPTConfig) -> float:
    """The share of a head that rotates, such that ``int(head_dim * share)`` is exactly what the config has."""
    share = config.num_rotary_dims / config.head_dim
    while int(config.head_dim * share) < config.num_rotary_dims:
        share = math.nextafter(share, 2.0)
    return share


def rope_checks(config: GPTConfig) -> dict[str, tuple[bool, str]]:
    """Conditions on rotary fields, for ``find_obstacles``."""
    scaling = config.rotary_scaling
    fits = (
        scaling is None
        or scaling.kind != "dynamic"
        or scaling.original_max_seqlen in (None, config.max_seqlen)
    )
    return {"rotary_scaling": (fits, "'dynamic' without original_max_seqlen")}

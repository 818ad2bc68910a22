"""How the frequencies of rotary positions are rescaled for a longer context, as a part of the config."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flash_attn_ops.rotary import Scaling, from_hugging_face

from flash_attn_models.errors import bad_argument, did_you_mean

# Kind to the fields that it needs, and to those that it may have.
_FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ("original_max_seqlen",)),
    "yarn": (
        ("factor", "original_max_seqlen"),
        ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
    ),
    "llama3": (("factor", "original_max_seqlen", "low_freq_factor", "high_freq_factor"), ()),
    "longrope": (("original_max_seqlen", "short_factor", "long_factor"), ("factor", "attention_factor")),
}
_LISTS = ("short_factor", "long_factor")


@dataclass(frozen=True, kw_only=True)
class RotaryScaling:
    """Which scaling of ``flash_attn_ops.rotary``, with its parameters; None where a kind has its default or no such.

    Attributes:
        kind: "linear", "dynamic", "yarn", "llama3" or "longrope". All are the same for every length of an input:
            "dynamic" is fixed for inputs as long as the context, which changes nothing up to ``original_max_seqlen``;
            "longrope" likewise has its long factors if the context is longer than that, and its short ones otherwise.
        factor: how much longer the context became; "longrope" takes the ratio of the contexts for it if it is None.
        original_max_seqlen: context of pretraining; needed by "yarn", "llama3" and "longrope", and by "dynamic" the
            context that it starts from (None: the config's, so that nothing changes).
        low_freq_factor, high_freq_factor: of "llama3".
        beta_fast, beta_slow, attention_factor, mscale, mscale_all_dim, truncate: of "yarn".
        short_factor, long_factor: of "longrope", a number for each pair of dimensions; it has attention_factor too.

    Raises ValueError, naming the field, for a missing one, or one that the kind does not have.
    """

    kind: str
    factor: float | None = None
    original_max_seqlen: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name in _LISTS:
            if isinstance(getattr(self, name), list):  # from JSON; a tuple keeps the config hashable
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.kind not in _FIELDS:
            hint = did_you_mean(self.kind, _FIELDS) if isinstance(self.kind, str) else ""
            raise self._reject("kind", f"one of {', '.join(map(repr, _FIELDS))}{hint}", "choose one of these")
        needed, optional = _FIELDS[self.kind]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "kind":
                continue
            if field.name in needed and value is None:
                raise self._reject(field.name, f"a value, which {self.kind!r} needs", f"give {field.name}")
            if value is None:
                continue
            if field.name not in needed + optional:
                raise self._reject(
                    field.name, f"None, since {self.kind!r} has no such parameter", f"leave {field.name} out"
                )
            if field.name == "truncate":
                if not isinstance(value, bool):
                    raise self._reject("truncate", "True or False", "give truncate as a bool")
            elif field.name in _LISTS:
                if not isinstance(value, tuple) or not value or not all(map(_is_positive, value)):
                    raise self._reject(
                        field.name, "positive, finite numbers, one for each pair", f"change {field.name}"
                    )
            elif not _is_positive(value):
                raise self._reject(field.name, "a positive, finite number", f"change {field.name}")

    def _reject(self, name: str, expected: str, fix: str) -> ValueError:
        return bad_argument(f"RotaryScaling.{name}", repr(getattr(self, name)), expected, fix)

    def to_dict(self) -> dict[str, Any]:
        """The fields that are not None, as plain values that JSON can hold."""
        fields = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return {name: list(value) if name in _LISTS else value for name, value in fields.items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> RotaryScaling:
        """The scaling with these fields; unknown names are refused."""
        valid = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in valid:
                raise bad_argument(
                    "RotaryScaling",
                    f"unknown field {name!r}{did_you_mean(name, valid)}",
                    f"only the fields {', '.join(valid)}",
                    f"correct or remove {name!r}",
                )
        if "kind" not in fields:
            raise bad_argument(
                "RotaryScaling", "no kind", f"one of {', '.join(map(repr, _FIELDS))}", "add it"
            )
        return cls(**fields)

    def parameters(self) -> dict[str, Any]:
        """The same in the words of Hugging Face's ``rope_parameters``, without its base."""
        their_names = {"kind": "rope_type", "original_max_seqlen": "original_max_position_embeddings"}
        return {their_names.get(name, name): value for name, value in self.to_dict().items()}

    def build(self, max_seqlen: int) -> Scaling | None:
        """The frequencies' scaling for inputs of up to ``max_seqlen`` tokens."""
        return from_hugging_face(self.parameters(), max_positions=max_seqlen)


def _is_positive(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, (int, float)) and 0 < value < math.inf

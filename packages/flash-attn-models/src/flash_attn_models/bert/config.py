"""The shape of a BERT model: one typed, validated dataclass."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flash_attn_models.errors import bad_argument, did_you_mean
from flash_attn_models.typed_config import config_of, is_int, is_number, preset_of

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")


@dataclass(frozen=True, kw_only=True)
class BertConfig:
    """Architecture of a BERT encoder. The defaults are BERT's own.

    Source: Devlin et al. 2018, arXiv:1810.04805.

    Sizes:
        vocab_size: number of token ids.
        max_seqlen: longest sequence in tokens. Longer inputs are refused.
        n_layer, n_head, d_model: depth, heads, width.
        d_inner: width inside the MLP; None is 4 d_model.
        n_token_types: kinds of segments ("token types").

    Architecture:
        activation: "gelu", "gelu_tanh", "relu" or "silu", of the MLPs and of the masked-LM head.
        norm_eps: of the norms.

    Training:
        dropout: after the embedding, the attention and the MLP.
        attn_dropout: of the attention probabilities.
        initializer_range: standard deviation of the initial weights.

    Tokens:
        pad_token_id: its embedding starts at zero and gets no gradient as an input. Which tokens are padding is
            said by the attention mask alone.
        bos_token_id, eos_token_id: kept for others; the model does not use them.

    Raises ValueError, naming the field, for values that do not make a model.
    """

    vocab_size: int
    max_seqlen: int
    n_layer: int
    n_head: int
    d_model: int
    d_inner: int | None = None
    n_token_types: int = 2
    activation: str = "gelu"
    norm_eps: float = 1e-12
    dropout: float = 0.1
    attn_dropout: float = 0.1
    initializer_range: float = 0.02
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_head

    @property
    def inner_dim(self) -> int:
        """Width inside the MLP."""
        return 4 * self.d_model if self.d_inner is None else self.d_inner

    def __post_init__(self) -> None:
        for name in ("vocab_size", "max_seqlen", "n_layer", "n_head", "d_model", "n_token_types"):
            self._check_size(name)
        if self.d_inner is not None:
            self._check_size("d_inner")
        if self.d_model % self.n_head != 0:
            raise self._reject("d_model", f"a multiple of n_head={self.n_head}", "change d_model or n_head")
        if self.activation not in ACTIVATIONS:
            hint = did_you_mean(self.activation, ACTIVATIONS) if isinstance(self.activation, str) else ""
            raise self._reject(
                "activation", f"one of {', '.join(map(repr, ACTIVATIONS))}{hint}", "choose one of these"
            )
        for name in ("dropout", "attn_dropout"):
            value = getattr(self, name)
            if not is_number(value) or not 0.0 <= value < 1.0:
                raise self._reject(
                    name, "a probability in [0, 1)", f"give {name} as the share that is dropped, such as 0.1"
                )
        for name in ("norm_eps", "initializer_range"):
            value = getattr(self, name)
            if not is_number(value) or not 0.0 < value < math.inf:
                raise self._reject(name, "a positive, finite number", f"change {name}")
        self._check_token_ids()

    def _reject(self, name: str, expected: str, fix: str) -> ValueError:
        return bad_argument(f"BertConfig.{name}", repr(getattr(self, name)), expected, fix)

    def _check_size(self, name: str) -> None:
        value = getattr(self, name)
        if not is_int(value) or value <= 0:
            raise self._reject(name, "a positive integer", f"give {name} as a whole number of at least 1")

    def _check_token_ids(self) -> None:
        # Lists come from JSON; a tuple keeps the config hashable.
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            several = name == "eos_token_id" and isinstance(value, tuple)
            ids = value if several else () if value is None else (value,)
            if not all(is_int(token) and 0 <= token < self.vocab_size for token in ids):
                raise self._reject(
                    name,
                    f"a token id in [0, vocab_size={self.vocab_size}), or None",
                    f"change {name} or vocab_size",
                )

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values that JSON can hold; ``from_dict`` restores an equal config."""
        fields = dataclasses.asdict(self)
        if isinstance(self.eos_token_id, tuple):
            fields["eos_token_id"] = list(self.eos_token_id)
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> BertConfig:
        """The config with these fields. Unknown and missing names are refused, with the nearest valid one."""
        return config_of(cls, fields)

    @classmethod
    def bert(cls, size: str = "base", **changes: Any) -> BertConfig:
        """BERT by size, uncased vocabulary: "tiny" (4M), "mini" (11M), "small" (29M), "medium" (41M), "base"
        (110M), "large" (340M); ``changes`` replace fields.

        Changing vocab_size also drops pad_token_id, which belongs to the original vocabulary.
        Sources: arXiv:1810.04805 (base, large), Turc et al. 2019, arXiv:1908.08962 (the smaller ones).
        """
        n_layer, n_head, d_model = preset_of(_SIZES, size)
        preset: dict[str, Any] = {"vocab_size": 30522, "max_seqlen": 512, "pad_token_id": 0}
        if "vocab_size" in changes:
            del preset["pad_token_id"]
        return cls.from_dict({**preset, "n_layer": n_layer, "n_head": n_head, "d_model": d_model, **changes})


# n_layer, n_head, d_model
_SIZES = {
    "tiny": (2, 2, 128),
    "mini": (4, 4, 256),
    "small": (4, 8, 512),
    "medium": (8, 8, 512),
    "base": (12, 12, 768),
    "large": (24, 16, 1024),
}

"""The shape of a GPT model: one typed, validated dataclass for GPT-2, LLaMA and what lies between."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flash_attn_models.errors import bad_argument, did_you_mean

ACTIVATIONS = ("gelu_tanh", "gelu", "relu", "swiglu")
NORMS = ("layer_norm", "rms_norm")
POSITIONS = ("learned", "rotary")

# LLaMA rounds its gated width, 8/3 of the model width, up to a multiple of this.
_GATED_WIDTH_MULTIPLE = 256
_DEFAULT_ROTARY_BASE = 10000.0


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Architecture of a decoder-only language model. The defaults are those of GPT-2.

    Sizes:
        vocab_size: number of token ids.
        max_seqlen: context length in tokens. Longer inputs are refused.
        n_layer, n_head, d_model: depth, query heads, width of the residual stream.
        n_head_kv: key/value heads; None is n_head (multi-head), 1 is multi-query, between is grouped-query.
        d_head: width of one head; None is d_model / n_head.
        d_inner: width inside the MLP; None is 4 d_model, or for "swiglu" 8/3 d_model rounded up to a multiple
            of 256 (as in LLaMA).

    Architecture:
        activation: "gelu_tanh", "gelu", "relu", or "swiglu" (gated: value * silu(gate)).
        norm, norm_eps: "layer_norm" or "rms_norm", before each sublayer and after the last.
        position: "learned" (added to the embedding) or "rotary" (applied to queries and keys).
        rotary_base: base of the rotary frequencies ("theta").
        rotary_dim: how many leading dimensions of a head rotate; None is all of them.
        rotary_interleaved: pairs are neighbours (as in GPT-J) instead of halves (as in GPT-NeoX and LLaMA).
        qkv_bias, out_bias, mlp_bias: biases of the attention input, attention output, and MLP projections.
        tie_embeddings: the output projection is the token embedding.

    Training:
        dropout: after the attention and the MLP, and unless ``embedding_dropout`` is given the embedding.
        embedding_dropout: after the embedding; None is ``dropout``.
        attn_dropout: of the attention probabilities.
        initializer_range: standard deviation of the initial weights.

    Tokens:
        bos_token_id, eos_token_id, pad_token_id: special ids. ``generate`` stops at ``eos_token_id`` (one id
            or several) and fills finished rows with ``pad_token_id``. The model itself does not use them.

    Raises ValueError, naming the field, for values that do not make a model, and for options that would have
    no effect (rotary options with learned positions).
    """

    vocab_size: int
    max_seqlen: int
    n_layer: int
    n_head: int
    d_model: int
    n_head_kv: int | None = None
    d_head: int | None = None
    d_inner: int | None = None
    activation: str = "gelu_tanh"
    norm: str = "layer_norm"
    norm_eps: float = 1e-5
    position: str = "learned"
    rotary_base: float = _DEFAULT_ROTARY_BASE
    rotary_dim: int | None = None
    rotary_interleaved: bool = False
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    tie_embeddings: bool = True
    dropout: float = 0.0
    embedding_dropout: float | None = None
    attn_dropout: float = 0.0
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    # Optional sizes, resolved: derived and not stored, so that dataclasses.replace() does not keep old ones.

    @property
    def num_heads_kv(self) -> int:
        """Key/value heads."""
        return self.n_head if self.n_head_kv is None else self.n_head_kv

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_head if self.d_head is None else self.d_head

    @property
    def inner_dim(self) -> int:
        """Width inside the MLP."""
        if self.d_inner is not None:
            return self.d_inner
        if self.activation == "swiglu":
            return math.ceil(8 * self.d_model / 3 / _GATED_WIDTH_MULTIPLE) * _GATED_WIDTH_MULTIPLE
        return 4 * self.d_model

    @property
    def num_rotary_dims(self) -> int:
        """How many dimensions of each head rotate; 0 with learned positions."""
        if self.position != "rotary":
            return 0
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """All ids that end a sequence."""
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "max_seqlen", "n_layer", "n_head", "d_model"):
            self._check_size(name)
        for name in ("n_head_kv", "d_head", "d_inner", "rotary_dim"):
            if getattr(self, name) is not None:
                self._check_size(name)
        for name, valid in (("activation", ACTIVATIONS), ("norm", NORMS), ("position", POSITIONS)):
            self._check_choice(name, valid)
        for name in ("rotary_interleaved", "qkv_bias", "out_bias", "mlp_bias", "tie_embeddings"):
            self._check_bool(name)
        self._check_heads()
        self._check_rotary()
        self._check_probability("dropout")
        self._check_probability("attn_dropout")
        if self.embedding_dropout is not None:
            self._check_probability("embedding_dropout")
        self._check_positive("norm_eps")
        self._check_positive("rotary_base")
        self._check_positive("initializer_range")
        self._check_token_ids()

    def _reject(self, name: str, expected: str, fix: str) -> ValueError:
        return bad_argument(f"GPTConfig.{name}", repr(getattr(self, name)), expected, fix)

    def _check_size(self, name: str) -> None:
        value = getattr(self, name)
        if not _is_int(value) or value <= 0:
            raise self._reject(name, "a positive integer", f"give {name} as a whole number of at least 1")

    def _check_choice(self, name: str, valid: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in valid:
            hint = did_you_mean(value, valid) if isinstance(value, str) else ""
            raise self._reject(
                name, f"one of {', '.join(map(repr, valid))}{hint}", f"choose one of these for {name}"
            )

    def _check_bool(self, name: str) -> None:
        if not isinstance(getattr(self, name), bool):
            raise self._reject(name, "True or False", f"give {name} as a bool")

    def _check_heads(self) -> None:
        if self.d_head is None and self.d_model % self.n_head != 0:
            raise self._reject(
                "d_model", f"a multiple of n_head={self.n_head}", "change d_model or n_head, or give d_head"
            )
        if self.n_head % self.num_heads_kv != 0:
            raise self._reject(
                "n_head_kv",
                f"a divisor of n_head={self.n_head}",
                "make n_head a multiple of n_head_kv: each key/value head serves equally many query heads",
            )

    def _check_rotary(self) -> None:
        if self.position == "rotary":
            if self.num_rotary_dims > self.head_dim or self.num_rotary_dims % 2 != 0:
                raise bad_argument(
                    "GPTConfig.rotary_dim",
                    self.num_rotary_dims,
                    f"an even number of at most the head dimension, {self.head_dim}",
                    "change rotary_dim, or the head dimension (d_head, or d_model / n_head)",
                )
            return
        ignored = {"rotary_dim": None, "rotary_base": _DEFAULT_ROTARY_BASE, "rotary_interleaved": False}
        for name, default in ignored.items():
            if getattr(self, name) != default:
                raise self._reject(
                    name,
                    f"its default, {default}, since position={self.position!r} has no rotary embedding",
                    f"set position='rotary' or leave {name} out",
                )

    def _check_probability(self, name: str) -> None:
        value = getattr(self, name)
        if not _is_number(value) or not 0.0 <= value < 1.0:
            raise self._reject(
                name, "a probability in [0, 1)", f"give {name} as the share that is dropped, such as 0.1"
            )

    def _check_positive(self, name: str) -> None:
        value = getattr(self, name)
        if not _is_number(value) or not 0.0 < value < math.inf:
            raise self._reject(name, "a positive, finite number", f"change {name}")

    def _check_token_ids(self) -> None:
        # Lists come from JSON and from configuration files; a tuple keeps the config hashable.
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            ids = self.eos_token_ids if name == "eos_token_id" else () if value is None else (value,)
            if not all(_is_int(token) and 0 <= token < self.vocab_size for token in ids):
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
    def from_dict(cls, fields: Mapping[str, Any]) -> GPTConfig:
        """The config with these fields. Unknown and missing names are refused, with the nearest valid one."""
        _check_field_names(fields)
        required = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
        missing = [name for name in required if name not in fields]
        if missing:
            raise bad_argument(
                "GPTConfig",
                f"no {', '.join(missing)}",
                f"at least the fields {', '.join(required)}",
                "add what is missing",
            )
        return cls(**fields)

    @classmethod
    def gpt2(cls, size: str = "small", **changes: Any) -> GPTConfig:
        """GPT-2: "small" (124M), "medium" (355M), "large" (774M), "xl" (1.5B); ``changes`` replace fields.

        Changing vocab_size also drops the special token ids, which belong to GPT-2's vocabulary. Dropout is
        0 here; GPT-2 itself was trained with 0.1 everywhere.
        Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", table 2.
        """
        return _from_preset(_GPT2_SIZES, size, _GPT2_COMMON, changes)

    @classmethod
    def llama(cls, size: str = "llama2-7b", **changes: Any) -> GPTConfig:
        """LLaMA by name: "tinyllama-1.1b", "llama2-7b", "llama2-13b", "llama3-8b"; ``changes`` replace
        fields.

        Changing vocab_size also drops the special token ids, which belong to the original vocabulary.
        Sources: arXiv 2307.09288 (LLaMA 2), 2407.21783 (LLaMA 3), 2401.02385 (TinyLlama).
        """
        return _from_preset(_LLAMA_SIZES, size, _LLAMA_COMMON, changes)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_field_names(fields: Mapping[str, Any]) -> None:
    valid = [f.name for f in dataclasses.fields(GPTConfig)]
    for name in fields:
        if name not in valid:
            raise bad_argument(
                "GPTConfig",
                f"unknown field {name!r}{did_you_mean(name, valid)}",
                f"only the fields {', '.join(valid)}",
                f"correct or remove {name!r}",
            )


def _from_preset(
    sizes: Mapping[str, Mapping[str, Any]], size: str, common: Mapping[str, Any], changes: Mapping[str, Any]
) -> GPTConfig:
    if size not in sizes:
        raise bad_argument(
            "size",
            repr(size),
            f"one of {', '.join(map(repr, sizes))}{did_you_mean(size, sizes)}",
            "choose one of these",
        )
    preset = {**common, **sizes[size]}
    if "vocab_size" in changes:  # another vocabulary has other special tokens
        preset = {
            name: value for name, value in preset.items() if name not in ("bos_token_id", "eos_token_id")
        }
    return GPTConfig.from_dict({**preset, **changes})


_GPT2_COMMON = {"vocab_size": 50257, "max_seqlen": 1024, "bos_token_id": 50256, "eos_token_id": 50256}
_GPT2_SIZES: dict[str, dict[str, Any]] = {
    "small": {"n_layer": 12, "n_head": 12, "d_model": 768},
    "medium": {"n_layer": 24, "n_head": 16, "d_model": 1024},
    "large": {"n_layer": 36, "n_head": 20, "d_model": 1280},
    "xl": {"n_layer": 48, "n_head": 25, "d_model": 1600},
}

_LLAMA_COMMON = {
    "vocab_size": 32000,
    "activation": "swiglu",
    "norm": "rms_norm",
    "position": "rotary",
    "qkv_bias": False,
    "out_bias": False,
    "mlp_bias": False,
    "tie_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA_SIZES: dict[str, dict[str, Any]] = {
    "tinyllama-1.1b": {
        "max_seqlen": 2048,
        "n_layer": 22,
        "n_head": 32,
        "n_head_kv": 4,
        "d_model": 2048,
        "d_inner": 5632,
    },
    "llama2-7b": {"max_seqlen": 4096, "n_layer": 32, "n_head": 32, "d_model": 4096, "d_inner": 11008},
    "llama2-13b": {"max_seqlen": 4096, "n_layer": 40, "n_head": 40, "d_model": 5120, "d_inner": 13824},
    "llama3-8b": {
        "vocab_size": 128256,
        "max_seqlen": 8192,
        "n_layer": 32,
        "n_head": 32,
        "n_head_kv": 8,
        "d_model": 4096,
        "d_inner": 14336,
        "rotary_base": 500000.0,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
}

"""The shape of a GPT model: one typed, validated dataclass for all decoder families."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flash_attn_models.errors import bad_argument, did_you_mean
from flash_attn_models.gpt import presets
from flash_attn_models.gpt.rotary_scaling import RotaryScaling
from flash_attn_models.typed_config import config_of, is_int, is_number, preset_of

ACTIVATIONS = ("gelu_tanh", "gelu", "relu", "swiglu")
NORMS = ("layer_norm", "rms_norm")
POSITIONS = ("learned", "rotary", "alibi")

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
        prenorm: True; False puts the norms behind each residual addition, and there is none at the end (OPT-350M).
        parallel_block: attention and MLP read the same input, and both are added to it (GPT-NeoX, GPT-J, Falcon).
        tied_norm: the two branches of a parallel block share one norm.
        qk_norm: queries and keys are normalised over each head, by ``norm``, before rotation (Qwen3).
        d_embedding: width of the token embedding and of the head's input if it is another than d_model, with a
            projection each (OPT-350M).
        qkv_bias, out_bias, mlp_bias, head_bias: biases of the attention input, attention output, MLP and vocabulary
            projections.
        tie_embeddings: the output projection is the token embedding.
        normalize_head: each row of the output projection is scaled to length 1 (Baichuan 2).
        embedding_scale, logit_scale: factors of the token embedding, and of the logits (BTLM).

    Positions:
        position: "learned" (added to the embedding), "rotary" (applied to queries and keys) or "alibi" (a penalty on
            distance, added to the scores).
        position_offset: rows of the learned position table in front of that of position 0 (OPT has 2).
        rotary_base: base of the rotary frequencies ("theta").
        rotary_dim: how many leading dimensions of a head rotate; None is all of them.
        rotary_interleaved: pairs are neighbours (as in GPT-J) instead of halves (as in GPT-NeoX and LLaMA).
        rotary_scaling: rescaled rotary frequencies, as a ``RotaryScaling`` or a mapping of its fields; None is none.
        alibi_scaled: ALiBi is multiplied by the factor of the scores too, as in Falcon.

    Attention:
        window: each token sees this many last ones, itself among them; None is all of them.
        window_first_layer: layers before this one have no window.
        window_layers: for each layer, whether it has the window, in place of ``window_first_layer`` and for what that
            cannot say; what it can is kept as that, and ``window_layers`` is None then.
        softmax_scale: factor of the scores; None is 1 / sqrt(head width).
        softmax_scale_by_layer: the factor is divided by the number of the layer, 1 for the first.
        softcap: scores become ``softcap * tanh(score / softcap)``; None is off.
        sinks: each head has one more logit in its softmax, a parameter, without a value (as in GPT-OSS).
        conv_width: width of a causal depthwise convolution over queries, keys and values (3 in Primer); None is none.

    Training:
        dropout: after the attention and the MLP, and unless ``embedding_dropout`` is given the embedding.
        embedding_dropout: after the embedding; None is ``dropout``.
        attn_dropout: of the attention probabilities.
        residual_in_fp32: the residual stream is float32 in a model in 16 bits, and under autocast. False: it has the
            dtype of the weights, or autocast's, which is half the memory traffic of norms.
        initializer_range: standard deviation of the initial weights.

    Tokens:
        bos_token_id, eos_token_id, pad_token_id: special ids. ``generate`` stops at ``eos_token_id`` (one id
            or several) and fills finished rows with ``pad_token_id``. The model itself does not use them.

    Raises ValueError, naming the field, for values that do not make a model, and for options that would have
    no effect (such as rotary options without rotary positions).
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
    rotary_scaling: RotaryScaling | None = None
    position_offset: int = 0
    alibi_scaled: bool = False
    window: int | None = None
    window_first_layer: int = 0
    window_layers: tuple[bool, ...] | None = None
    softmax_scale: float | None = None
    softmax_scale_by_layer: bool = False
    softcap: float | None = None
    sinks: bool = False
    conv_width: int | None = None
    qk_norm: bool = False
    prenorm: bool = True
    parallel_block: bool = False
    tied_norm: bool = False
    d_embedding: int | None = None
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    head_bias: bool = False
    tie_embeddings: bool = True
    normalize_head: bool = False
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    dropout: float = 0.0
    embedding_dropout: float | None = None
    attn_dropout: float = 0.0
    residual_in_fp32: bool = False
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
        """How many dimensions of each head rotate; 0 without rotary positions."""
        if self.position != "rotary":
            return 0
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    @property
    def embedding_dim(self) -> int:
        """Width of the token embedding and of the input of the output projection."""
        return self.d_model if self.d_embedding is None else self.d_embedding

    def window_of(self, layer: int) -> int | None:
        """How many last tokens a token sees in this layer; None is all."""
        has_window = (
            layer >= self.window_first_layer if self.window_layers is None else self.window_layers[layer]
        )
        return self.window if has_window else None

    def softmax_scale_of(self, layer: int) -> float | None:
        """The factor of the scores in this layer; None is 1 / sqrt(head width)."""
        if not self.softmax_scale_by_layer:
            return self.softmax_scale
        scale = self.head_dim**-0.5 if self.softmax_scale is None else self.softmax_scale
        return scale / (layer + 1)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """All ids that end a sequence."""
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "max_seqlen", "n_layer", "n_head", "d_model"):
            self._check_size(name)
        for name in (
            *("n_head_kv", "d_head", "d_inner", "rotary_dim", "window", "d_embedding", "conv_width"),
        ):
            if getattr(self, name) is not None:
                self._check_size(name)
        for name, valid in (("activation", ACTIVATIONS), ("norm", NORMS), ("position", POSITIONS)):
            self._check_choice(name, valid)
        for field in dataclasses.fields(self):
            if isinstance(field.default, bool):
                self._check_bool(field.name)
        self._check_heads()
        self._check_rotary()
        self._check_effects()
        self._check_window_layers()
        self._check_probability("dropout")
        self._check_probability("attn_dropout")
        if self.embedding_dropout is not None:
            self._check_probability("embedding_dropout")
        self._check_positive("norm_eps")
        self._check_positive("embedding_scale")
        self._check_positive("logit_scale")
        for name in ("softcap", "softmax_scale"):
            if getattr(self, name) is not None:
                self._check_positive(name)
        self._check_positive("rotary_base")
        self._check_positive("initializer_range")
        self._check_token_ids()

    def _reject(self, name: str, expected: str, fix: str) -> ValueError:
        return bad_argument(f"GPTConfig.{name}", repr(getattr(self, name)), expected, fix)

    def _check_size(self, name: str) -> None:
        value = getattr(self, name)
        if not is_int(value) or value <= 0:
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
        if isinstance(self.rotary_scaling, Mapping):  # from JSON and configuration files
            object.__setattr__(self, "rotary_scaling", RotaryScaling.from_dict(self.rotary_scaling))
        if not isinstance(self.rotary_scaling, RotaryScaling | None):
            raise self._reject(
                "rotary_scaling", "a RotaryScaling, a mapping of its fields, or None", "give one of these"
            )
        if self.rotary_scaling is not None:
            self.rotary_scaling.build(self.max_seqlen)  # its parameters must fit together too
        if self.position == "rotary" and (
            self.num_rotary_dims > self.head_dim or self.num_rotary_dims % 2 != 0
        ):
            raise bad_argument(
                "GPTConfig.rotary_dim",
                self.num_rotary_dims,
                f"an even number of at most the head dimension, {self.head_dim}",
                "change rotary_dim, or the head dimension (d_head, or d_model / n_head)",
            )

    def _check_effects(self) -> None:
        """Refuse options that would change nothing, or contradict another."""
        for name in ("position_offset", "window_first_layer"):
            value = getattr(self, name)
            if not is_int(value) or value < 0:
                raise self._reject(name, "an integer of at least 0", f"give {name} as a whole number")
        rotary = (
            "position='rotary'",
            self.position == "rotary",
            f"position={self.position!r} has no rotary embedding",
        )
        required = {
            "rotary_dim": rotary,
            "rotary_base": rotary,
            "rotary_interleaved": rotary,
            "rotary_scaling": rotary,
            "position_offset": (
                "position='learned'",
                self.position == "learned",
                f"position={self.position!r} has no table of positions",
            ),
            "alibi_scaled": (
                "position='alibi'",
                self.position == "alibi",
                f"position={self.position!r} has no ALiBi",
            ),
            "window_first_layer": ("a window", self.window is not None, "there is no window"),
            "window_layers": ("a window", self.window is not None, "there is no window"),
            "softmax_scale_by_layer": (
                "alibi_scaled=False",
                not self.alibi_scaled,
                "all layers have the same ALiBi, scaled by the same factor",
            ),
            "tied_norm": ("parallel_block=True", self.parallel_block, "parallel_block=False needs two norms"),
            "parallel_block": ("prenorm=True", self.prenorm, "prenorm=False norms after each branch"),
            "residual_in_fp32": ("prenorm=True", self.prenorm, "prenorm=False normalises the stream itself"),
        }
        for name, (needs, has, why) in required.items():
            default = _DEFAULTS[name]
            if not has and getattr(self, name) != default:
                raise self._reject(
                    name, f"its default, {default}, since {why}", f"set {needs} or leave {name} out"
                )
        if self.window is not None and self.window_first_layer >= self.n_layer:
            raise self._reject(
                "window_first_layer",
                f"less than n_layer={self.n_layer}, since no layer has the window otherwise",
                "leave window and window_first_layer out for full attention in all layers",
            )
        if self.conv_width == 1:
            raise self._reject("conv_width", "at least 2 tokens", "leave conv_width out for no convolution")
        if self.d_embedding == self.d_model:
            raise self._reject("d_embedding", "another width than d_model", "leave d_embedding out")

    def _check_window_layers(self) -> None:
        layers = self.window_layers
        if layers is None:
            return
        if isinstance(layers, list):  # from JSON and configuration files
            layers = tuple(layers)
        if not isinstance(layers, tuple) or not all(isinstance(has_window, bool) for has_window in layers):
            raise self._reject(
                "window_layers", "True or False for each layer, or None", "give a list of these"
            )
        if len(layers) != self.n_layer:
            raise self._reject(
                "window_layers",
                f"one value for each of n_layer={self.n_layer} layers",
                "change window_layers or n_layer",
            )
        if not any(layers):
            raise self._reject(
                "window_layers",
                "True for at least one layer",
                "leave window and window_layers out for full attention in all layers",
            )
        if self.window_first_layer:
            raise self._reject(
                "window_layers",
                f"None beside window_first_layer={self.window_first_layer}, which says the same otherwise",
                "leave one of them out",
            )
        # One way to say one thing, so that configs of the same model are equal.
        first = layers.index(True)
        if all(layers[first:]):
            object.__setattr__(self, "window_first_layer", first)
            layers = None
        object.__setattr__(self, "window_layers", layers)

    def _check_probability(self, name: str) -> None:
        value = getattr(self, name)
        if not is_number(value) or not 0.0 <= value < 1.0:
            raise self._reject(
                name, "a probability in [0, 1)", f"give {name} as the share that is dropped, such as 0.1"
            )

    def _check_positive(self, name: str) -> None:
        value = getattr(self, name)
        if not is_number(value) or not 0.0 < value < math.inf:
            raise self._reject(name, "a positive, finite number", f"change {name}")

    def _check_token_ids(self) -> None:
        # Lists come from JSON and from configuration files; a tuple keeps the config hashable.
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            ids = self.eos_token_ids if name == "eos_token_id" else () if value is None else (value,)
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
        if self.window_layers is not None:
            fields["window_layers"] = list(self.window_layers)
        if self.rotary_scaling is not None:
            fields["rotary_scaling"] = self.rotary_scaling.to_dict()
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> GPTConfig:
        """The config with these fields. Unknown and missing names are refused, with the nearest valid one."""
        return config_of(cls, fields)

    @classmethod
    def gpt2(cls, size: str = "small", **changes: Any) -> GPTConfig:
        """GPT-2: "small" (124M), "medium" (355M), "large" (774M), "xl" (1.5B); ``changes`` replace fields.

        Changing vocab_size also drops the special token ids, which belong to GPT-2's vocabulary. Dropout is
        0 here; GPT-2 itself was trained with 0.1 everywhere.
        Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", table 2.
        """
        return _from_preset(presets.GPT2_SIZES, size, presets.GPT2_COMMON, changes)

    @classmethod
    def llama(cls, size: str = "llama2-7b", **changes: Any) -> GPTConfig:
        """LLaMA by name: "tinyllama-1.1b", "llama2-7b", "llama2-13b", "llama3-8b"; ``changes`` replace
        fields.

        Changing vocab_size also drops the special token ids, which belong to the original vocabulary.
        Sources: arXiv 2307.09288 (LLaMA 2), 2407.21783 (LLaMA 3), 2401.02385 (TinyLlama).
        """
        return _from_preset(presets.LLAMA_SIZES, size, presets.LLAMA_COMMON, changes)


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(GPTConfig)}


def _from_preset(
    sizes: Mapping[str, Mapping[str, Any]], size: str, common: Mapping[str, Any], changes: Mapping[str, Any]
) -> GPTConfig:
    preset = {**common, **preset_of(sizes, size)}
    if "vocab_size" in changes:  # another vocabulary has other special tokens
        preset = {
            name: value for name, value in preset.items() if name not in ("bos_token_id", "eos_token_id")
        }
    return GPTConfig.from_dict({**preset, **changes})

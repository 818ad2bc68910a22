"""Options of the model group: what is trained."""

# No `from __future__ import annotations` here: OmegaConf reads the annotations as types.

from dataclasses import dataclass
from typing import Any

from flash_attn_train.configs.option import option, unless, where

_ACTIVATIONS = ("gelu_tanh", "gelu", "relu", "swiglu")
_ROTARY = where("model.position", "rotary")


@dataclass
class ModelConfig:
    """What every kind of model has."""

    warm_start: str | None = option(
        None,
        "weights to start from: a checkpoint of flash-attn-train, or a Hugging Face folder or hub name; null: random",
    )
    warm_start_skip: list[str] = option(
        [],
        "patterns of parameters that keep their random weights, such as [head.*] for a head of another size",
        unless("model.warm_start", equal=None),
    )


@dataclass
class GPTModelConfig(ModelConfig):
    """A decoder, GPT-2 or LLaMA style. The vocabulary size comes from the tokenizer."""

    max_seqlen: int = option(256, "context length in tokens, in training and generation", at_least=2)
    n_layer: int = option(4, "transformer blocks", at_least=1)
    n_head: int = option(4, "query heads", at_least=1)
    n_head_kv: int | None = option(None, "key and value heads, a divisor of n_head; null: n_head", at_least=1)
    d_model: int = option(256, "width of the residual stream", at_least=1)
    d_head: int | None = option(None, "width of a head; null: d_model / n_head", at_least=1)
    d_inner: int | None = option(
        None, "width inside the MLP; null: the architecture's usual multiple", at_least=1
    )
    activation: str = option("gelu_tanh", "MLP activation", choices=_ACTIVATIONS)
    norm: str = option("layer_norm", "normalisation", choices=("layer_norm", "rms_norm"))
    norm_eps: float = option(1e-5, "added to the variance in the normalisation", above=0.0)
    qk_norm: bool = option(False, "normalise queries and keys")
    position: str = option("learned", "position information", choices=("learned", "rotary", "alibi"))
    rotary_base: float = option(10000.0, "base of the rotary frequencies", _ROTARY, above=0.0)
    rotary_fraction: float = option(
        1.0, "share of each head that is rotated", _ROTARY, above=0.0, at_most=1.0
    )
    rotary_scaling: dict[str, Any] = option(
        {},
        "rescaled rotary frequencies, e.g. {kind: linear, factor: 4.0}, see flash_attn_models' RotaryScaling",
        _ROTARY,
    )
    window: int | None = option(None, "tokens each token sees, itself among them; null: all", at_least=1)
    qkv_bias: bool = option(True, "bias in the query, key and value projections")
    out_bias: bool = option(True, "bias in the attention output projection")
    mlp_bias: bool = option(True, "bias in the MLP")
    tie_embeddings: bool = option(True, "output layer shares the token embedding")
    embedding_scale: float = option(1.0, "factor of the token embedding (muP)", above=0.0)
    logit_scale: float = option(1.0, "factor of the logits (muP)", above=0.0)
    pad_vocab_multiple: int = option(
        1, "round the vocabulary up to a multiple; the GPU's matrix products like 8 to 128", at_least=1
    )
    dropout: float = option(0.0, "dropout on embeddings and residual branches", at_least=0.0, below=1.0)
    attn_dropout: float = option(0.0, "dropout on attention probabilities", at_least=0.0, below=1.0)
    residual_in_fp32: bool = option(
        False, "keep the residual stream in float32 where the rest computes in 16 bits"
    )
    initializer_range: float = option(0.02, "standard deviation of the initial weights", above=0.0)


@dataclass
class BertModelConfig(ModelConfig):
    """A bidirectional encoder. The vocabulary size comes from the tokenizer."""

    max_seqlen: int = option(128, "context length in tokens", at_least=2)
    n_layer: int = option(12, "transformer blocks", at_least=1)
    n_head: int = option(12, "heads", at_least=1)
    d_model: int = option(768, "width of the residual stream", at_least=1)
    d_inner: int | None = option(None, "width inside the MLP; null: 4 d_model", at_least=1)
    dropout: float = option(0.1, "dropout on embeddings and residual branches", at_least=0.0, below=1.0)
    attn_dropout: float = option(0.1, "dropout on attention probabilities", at_least=0.0, below=1.0)
    initializer_range: float = option(0.02, "standard deviation of the initial weights", above=0.0)
    pad_vocab_multiple: int = option(
        8, "round the vocabulary up to a multiple; the GPU's matrix products like 8 to 128", at_least=1
    )


@dataclass
class ViTModelConfig(ModelConfig):
    """A vision transformer. The number of classes comes from the data."""

    image_size: int = option(224, "height and width of the images in pixels", at_least=1)
    patch_size: int = option(16, "height and width of a patch in pixels", at_least=1)
    channels: int = option(3, "channels of the images", at_least=1)
    n_layer: int = option(12, "transformer blocks", at_least=1)
    n_head: int = option(12, "heads", at_least=1)
    d_model: int = option(768, "width of the residual stream", at_least=1)
    d_inner: int | None = option(None, "width inside the MLP; null: 4 d_model", at_least=1)
    dropout: float = option(0.0, "dropout on embeddings and residual branches", at_least=0.0, below=1.0)
    attn_dropout: float = option(0.0, "dropout on attention probabilities", at_least=0.0, below=1.0)
    drop_path: float = option(0.0, "largest probability of dropping a branch", at_least=0.0, below=1.0)
    pool: str = option(
        "token", "what the head sees: the class token, or the average of patches", choices=("token", "avg")
    )


@dataclass
class HuggingFaceModelConfig(ModelConfig):
    """A decoder of transformers, to compare with."""

    model_type: str = option("gpt2", "transformers' model type")
    config: dict[str, Any] = option({}, "fields of its config, e.g. {n_layer: 12}")
    attn_implementation: str = option("sdpa", "transformers' attention: sdpa, eager, or fa_kernels for ours")
    max_seqlen: int = option(256, "context length in tokens", at_least=2)


# Config group `model`: schemas, whose named sizes are the YAML files of the group.
MODELS: dict[str, type[ModelConfig]] = {
    "gpt": GPTModelConfig,
    "bert": BertModelConfig,
    "vit": ViTModelConfig,
    "hugging_face": HuggingFaceModelConfig,
}

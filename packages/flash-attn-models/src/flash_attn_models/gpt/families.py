"""The decoder families: their Hugging Face model types, and published models of each by name.

Sizes are fields of the published ``config.json`` where they differ from what transformers assumes, and are read as
that file would be: by :func:`flash_attn_models.gpt.hugging_face.config_from_hugging_face`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flash_attn_models.errors import bad_argument, did_you_mean
from flash_attn_models.gpt.config import GPTConfig
from flash_attn_models.gpt.hugging_face import config_from_hugging_face
from flash_attn_models.gpt.hugging_face.config_fields import token_ids_from

__all__ = ["FAMILIES", "Family", "family_of", "named_config"]


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        model_type: in ``config.json``; transformers has a class for it unless ``describes`` says no.
        describes: what makes it different.
        sizes: name of a published model to its fields.
    """

    model_type: str
    describes: str
    sizes: Mapping[str, Mapping[str, Any]]


def named_config(name: str, **changes: Any) -> GPTConfig:
    """The config of a published model such as "pythia-160m" or "llama-3.2-1b"; ``changes`` replace fields.

    Special tokens that a changed vocabulary does not have become None, unless they are changed too.

    Raises ValueError for a name that no family has, or a field that a config does not.
    """
    family = family_of(name)
    fields = config_from_hugging_face({"model_type": family.model_type, **family.sizes[name]}).to_dict()
    tokens = token_ids_from({**fields, "vocab_size": changes.get("vocab_size", fields["vocab_size"])})
    return GPTConfig.from_dict({**fields, **tokens, **changes})


def family_of(name: str) -> Family:
    """The family that has a size of this name."""
    for family in FAMILIES.values():
        if name in family.sizes:
            return family
    names = [size for family in FAMILIES.values() for size in family.sizes]
    raise bad_argument(
        "name", repr(name), f"one of {', '.join(names)}{did_you_mean(name, names)}", "choose one of these"
    )


def _gpt2(layers: int, heads: int, width: int) -> dict[str, Any]:
    return {"n_layer": layers, "n_head": heads, "n_embd": width}


def _llama(layers: int, heads: int, kv_heads: int, width: int, inner: int, **others: Any) -> dict[str, Any]:
    sizes = {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    return {**sizes, "hidden_size": width, "intermediate_size": inner, **others}


def _llama2(*sizes: int) -> dict[str, Any]:
    return _llama(*sizes, max_position_embeddings=4096, rms_norm_eps=1e-5)


def _llama3(*sizes: int, factor: float | None, **others: Any) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 500000.0}
    if factor is not None:
        rope |= {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope["original_max_position_embeddings"] = 8192
    return _llama(
        *sizes,
        vocab_size=128256,
        max_position_embeddings=8192 if factor is None else 131072,
        rms_norm_eps=1e-5,
        bos_token_id=128000,
        eos_token_id=128001,
        rope_parameters=rope,
        **others,
    )


def _qwen(*sizes: int, **others: Any) -> dict[str, Any]:
    ids = {"bos_token_id": 151643, "eos_token_id": 151643}
    return {**_llama(*sizes), "rope_theta": 1000000.0, **ids, **others}


def _neox(layers: int, heads: int, width: int, vocab_size: int = 50304) -> dict[str, Any]:
    sizes = {"num_hidden_layers": layers, "num_attention_heads": heads, "hidden_size": width}
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    return {**sizes, "intermediate_size": 4 * width, "vocab_size": vocab_size, **ids}


def _opt(layers: int, heads: int, width: int, **others: Any) -> dict[str, Any]:
    sizes = {"num_hidden_layers": layers, "num_attention_heads": heads, "hidden_size": width}
    return {**sizes, "ffn_dim": 4 * width, "word_embed_proj_dim": width, **others}


_STARCODER = {"vocab_size": 49152, "n_positions": 8192, "bos_token_id": 0, "eos_token_id": 0}
_BAICHUAN_13B = {
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "hidden_size": 5120,
    "intermediate_size": 13696,
}

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "gpt2",
            "learned positions",
            {
                "gpt2": {},
                "gpt2-medium": _gpt2(24, 16, 1024),
                "gpt2-large": _gpt2(36, 20, 1280),
                "gpt2-xl": _gpt2(48, 25, 1600),
            },
        ),
        Family(
            "llama",
            "rotary positions, RMS norms, SwiGLU, rescaled frequencies from 3.1 on",
            {
                "tinyllama-1.1b": _llama(22, 32, 4, 2048, 5632, rms_norm_eps=1e-5),
                "llama-2-7b": _llama2(32, 32, 32, 4096, 11008),
                "llama-2-13b": _llama2(40, 40, 40, 5120, 13824),
                "llama-3-8b": _llama3(32, 32, 8, 4096, 14336, factor=None),
                "llama-3.1-8b": _llama3(32, 32, 8, 4096, 14336, factor=8.0),
                "llama-3.2-1b": _llama3(
                    16, 32, 8, 2048, 8192, factor=32.0, head_dim=64, tie_word_embeddings=True
                ),
                "llama-3.2-3b": _llama3(
                    28, 24, 8, 3072, 8192, factor=32.0, head_dim=128, tie_word_embeddings=True
                ),
            },
        ),
        Family(
            "mistral",
            "as LLaMA, with a sliding window",
            {
                "mistral-7b-v0.1": {"max_position_embeddings": 32768, "rms_norm_eps": 1e-5},
                "mistral-7b-v0.3": {
                    "vocab_size": 32768,
                    "max_position_embeddings": 32768,
                    "rms_norm_eps": 1e-5,
                    "rope_theta": 1000000.0,
                    "sliding_window": None,
                },
            },
        ),
        Family(
            "qwen2",
            "as LLaMA, with biases of queries, keys and values",
            {
                "qwen2.5-0.5b": _qwen(24, 14, 2, 896, 4864, tie_word_embeddings=True),
                "qwen2.5-1.5b": _qwen(
                    28, 12, 2, 1536, 8960, tie_word_embeddings=True, max_position_embeddings=131072
                ),
                "qwen2.5-7b": _qwen(
                    28, 28, 4, 3584, 18944, vocab_size=152064, max_position_embeddings=131072
                ),
            },
        ),
        Family(
            "qwen3",
            "as LLaMA, with normalised queries and keys",
            {
                "qwen3-0.6b": _qwen(
                    28, 16, 8, 1024, 3072, tie_word_embeddings=True, max_position_embeddings=40960
                ),
                "qwen3-1.7b": _qwen(
                    28, 16, 8, 2048, 6144, tie_word_embeddings=True, max_position_embeddings=40960
                ),
                "qwen3-4b": _qwen(
                    36, 32, 8, 2560, 9728, tie_word_embeddings=True, max_position_embeddings=40960
                ),
                "qwen3-8b": _qwen(36, 32, 8, 4096, 12288, max_position_embeddings=40960),
            },
        ),
        Family(
            "gpt_neox",
            "parallel branches with a norm each, rotary positions in a quarter of each head",
            {
                "pythia-70m": _neox(6, 8, 512),
                "pythia-160m": _neox(12, 12, 768),
                "pythia-410m": _neox(24, 16, 1024),
                "pythia-1b": _neox(16, 8, 2048),
                "pythia-1.4b": _neox(24, 16, 2048),
                "pythia-2.8b": _neox(32, 32, 2560),
                "pythia-6.9b": _neox(32, 32, 4096, 50432),
                "pythia-12b": _neox(36, 40, 5120, 50688),
                "gpt-neox-20b": {"hidden_act": "gelu_fast", "bos_token_id": 0, "eos_token_id": 0},
            },
        ),
        Family("gptj", "parallel branches with one norm, interleaved rotary positions", {"gpt-j-6b": {}}),
        Family(
            "opt",
            "learned positions from row 2 on; 350M with norms behind the branches and a narrow embedding",
            {
                "opt-125m": _opt(12, 12, 768),
                "opt-350m": _opt(24, 16, 1024, word_embed_proj_dim=512, do_layer_norm_before=False),
                "opt-1.3b": _opt(24, 32, 2048),
                "opt-2.7b": _opt(32, 32, 2560),
                "opt-6.7b": _opt(32, 32, 4096),
                "opt-13b": _opt(40, 40, 5120),
                "opt-30b": _opt(48, 56, 7168),
            },
        ),
        Family(
            "falcon",
            "parallel branches; multi-query (7B), grouped-query with two norms (40B), ALiBi (RW)",
            {
                "falcon-7b": {},
                "falcon-40b": {
                    "num_hidden_layers": 60,
                    "num_attention_heads": 128,
                    "num_kv_heads": 8,
                    "hidden_size": 8192,
                    "new_decoder_architecture": True,
                },
                "falcon-rw-1b": {
                    "vocab_size": 50304,
                    "num_hidden_layers": 24,
                    "num_attention_heads": 32,
                    "hidden_size": 2048,
                    "alibi": True,
                    "multi_query": False,
                    "parallel_attn": False,
                    "bias": True,
                    "bos_token_id": 1,
                    "eos_token_id": 2,
                },
            },
        ),
        Family(
            "gpt_bigcode",
            "as GPT-2, with one key/value head",
            {
                "santacoder": {
                    **_gpt2(24, 16, 2048),
                    "vocab_size": 49280,
                    "n_positions": 2048,
                    "bos_token_id": 49152,
                    "eos_token_id": 49152,
                },
                "starcoderbase-1b": {**_gpt2(24, 16, 2048), **_STARCODER},
                "starcoder": {**_gpt2(40, 48, 6144), **_STARCODER},
            },
        ),
        Family(
            "baichuan",
            "as LLaMA, with ALiBi in 13B and a normalised head in version 2; not a class of transformers",
            {
                "baichuan-7b": {"max_position_embeddings": 4096},
                "baichuan-13b": _BAICHUAN_13B,
                "baichuan2-7b": {"max_position_embeddings": 4096, "vocab_size": 125696, "z_loss_weight": 0},
                "baichuan2-13b": {**_BAICHUAN_13B, "vocab_size": 125696, "z_loss_weight": 0},
            },
        ),
        Family(
            "btlm",
            "as GPT-2, with ALiBi, SwiGLU and muP factors; not a class of transformers",
            {
                "btlm-3b-8k": {
                    **_gpt2(32, 32, 2560),
                    "n_positions": 8192,
                    "n_inner": 6826,
                    "mup_embeddings_scale": 14.6,
                    "mup_output_alpha": 2.2,
                    "mup_width_scale": 0.1,
                    "mup_scale_qk_dot_by_d": True,
                    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
                }
            },
        ),
    )
}

"""Fields of Hugging Face configs, which need no transformers: read, written, and refused by name."""

from __future__ import annotations

import dataclasses

import pytest
from flash_attn_models.gpt.families import named_config
from flash_attn_models.gpt.hugging_face import config_from_hugging_face, config_to_hugging_face
from flash_attn_models.gpt.hugging_face.rope import share_of

_BY_HAND = {
    "pythia-160m": {
        "model_type": "gpt_neox",
        "architectures": ["GPTNeoXForCausalLM"],
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_act": "gelu",
        "hidden_size": 768,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.24.0",
        "use_cache": True,
        "use_parallel_residual": True,
        "vocab_size": 50304,
    },
    "falcon-7b": {
        "model_type": "falcon",
        "alibi": False,
        "apply_residual_connection_post_layernorm": False,
        "architectures": ["FalconForCausalLM"],
        "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_falcon.FalconConfig"},
        "bias": False,
        "hidden_dropout": 0.0,
        "hidden_size": 4544,
        "layer_norm_epsilon": 1e-05,
        "multi_query": True,
        "new_decoder_architecture": False,
        "num_attention_heads": 71,
        "num_hidden_layers": 32,
        "parallel_attn": True,
        "vocab_size": 65024,
    },
    "opt-350m": {
        "model_type": "opt",
        "_remove_final_layer_norm": False,
        "activation_dropout": 0.0,
        "activation_function": "relu",
        "do_layer_norm_before": False,
        "dropout": 0.1,
        "ffn_dim": 4096,
        "hidden_size": 1024,
        "init_std": 0.02,
        "layerdrop": 0.0,
        "max_position_embeddings": 2048,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "prefix": "</s>",
        "word_embed_proj_dim": 512,
        "vocab_size": 50272,
    },
    "qwen2.5-0.5b": {
        "model_type": "qwen2",
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "max_window_layers": 24,
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "use_mrope": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
}


@pytest.mark.parametrize("name", _BY_HAND)
def test_configs_of_older_transformers_are_those_of_the_registry(name):
    assert config_from_hugging_face(_BY_HAND[name]) == named_config(name)


_NEW = {"model_type": "falcon", "new_decoder_architecture": True}
_MIXED = ["sliding_attention", "full_attention"]
_QWEN = {"model_type": "qwen2", "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 8}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({**_NEW, "parallel_attn": False}, r"'parallel_attn': got False; expected True with new_decoder"),
        ({**_NEW, "num_ln_in_parallel_attn": 3}, r"'num_ln_in_parallel_attn': got 3; expected 1 or 2"),
        (
            {"model_type": "falcon", "num_ln_in_parallel_attn": 2},
            r"'num_ln_in_parallel_attn': got 2; expected 1 without new_decoder",
        ),
        (
            {"model_type": "falcon", "multi_query": False, "num_kv_heads": 2},
            r"'num_kv_heads': got 2; expected 71 without multi_query",
        ),
        (
            {"model_type": "falcon", "apply_residual_connection_post_layernorm": True},
            r"'apply_residual_connection_post_layernorm': got True; expected False",
        ),
        ({"model_type": "gptj", "rotary_dim": None}, r"'rotary_dim': got None; expected the number"),
        ({"model_type": "opt", "layerdrop": 0.1}, r"'layerdrop': got 0.1; expected 0.0"),
        (
            {"model_type": "opt", "layer_norm_elementwise_affine": False},
            r"'layer_norm_elementwise_affine': got False; expected True",
        ),
        ({"model_type": "gpt_bigcode", "scale_attn_weights": False}, r"'scale_attn_weights': got False"),
        ({"model_type": "gpt_neox", "hidden_act": "silu"}, r"'hidden_act': got 'silu'; expected one of gelu"),
        (
            {"model_type": "mistral", "rope_theta": 1.0, "num_kv_heads": 2},
            r"'num_kv_heads': got 2; expected a",
        ),
        (
            {**_QWEN, "layer_types": ["sliding_attention", "full_attention", "linear_attention"]},
            r"'layer_types': got .*expected one of 'full_attention' and.* for each of 3 layers",
        ),
        (
            {**_QWEN, "layer_types": ["sliding_attention"] * 2},
            r"'layer_types': got .* for each of 3 layers",
        ),
        (
            {**_QWEN, "use_sliding_window": False, "layer_types": ["sliding_attention"] * 3},
            r"'layer_types': got .*with use_sliding_window",
        ),
        (
            {"model_type": "mistral", "num_hidden_layers": 2, "layer_types": _MIXED},
            r"'layer_types': got .*expected 'sliding_attention' in all layers, since Mistral",
        ),
        ({**_QWEN, "use_mrope": True}, r"'use_mrope': got True; expected False"),
    ],
)
def test_unsupported_configs_are_refused_by_field(fields, message):
    with pytest.raises(ValueError, match=r"config field " + message + r".*Fix: "):
        config_from_hugging_face(fields)


@pytest.mark.parametrize(
    ("name", "model_type", "message"),
    [
        ("pythia-70m", "gptj", r"qkv_bias=True.*'gptj' has: .*qkv_bias False"),
        ("falcon-rw-1b", "gpt_neox", r"position='alibi'.*'gpt_neox' has: .*position 'rotary'"),
        (
            "mistral-7b-v0.1",
            "llama",
            r"got window=4096; expected what Hugging Face's 'llama' has: window None",
        ),
        ("qwen3-0.6b", "qwen2", r"qk_norm=True"),
        ("opt-125m", "gpt2", r"position_offset=2.*position_offset 0"),
    ],
)
def test_configs_of_another_family_are_refused(name, model_type, message):
    with pytest.raises(ValueError, match=message):
        config_to_hugging_face(named_config(name), model_type)


def test_a_window_in_upper_layers_is_read_from_either_field():
    config = config_from_hugging_face({**_QWEN, "max_window_layers": 2})
    assert [config.window_of(layer) for layer in range(3)] == [None, None, 8]
    kinds = ["full_attention", "full_attention", "sliding_attention"]
    assert config_from_hugging_face({**_QWEN, "layer_types": kinds}) == config
    assert config_from_hugging_face({**_QWEN, "max_window_layers": 3}).window is None


def test_windows_in_any_layers_are_read_and_written():
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = config_from_hugging_face({**_QWEN, "layer_types": kinds})
    assert [config.window_of(layer) for layer in range(3)] == [8, None, 8]
    fields = config_to_hugging_face(config)
    assert (fields["layer_types"], fields["max_window_layers"]) == (kinds, 0)
    of_mistral = {"model_type": "mistral", "num_hidden_layers": 2}
    plain = config_from_hugging_face(of_mistral)
    assert config_from_hugging_face({**of_mistral, "layer_types": ["sliding_attention"] * 2}) == plain
    full = {**of_mistral, "sliding_window": None, "layer_types": ["full_attention"] * 2}
    assert config_from_hugging_face(full).window is None
    mixed = dataclasses.replace(plain, window_layers=(True, False))
    with pytest.raises(ValueError, match=r"window_layers=\(True, False\).*'mistral' has: window_layers None"):
        config_to_hugging_face(mixed, "mistral")


def test_dynamic_scaling_of_a_longer_context_is_not_in_hugging_face_files():
    scaling = {"kind": "dynamic", "factor": 2.0, "original_max_seqlen": 2048}
    with pytest.raises(ValueError, match=r"rotary_scaling=.*'dynamic' without original_max_seqlen"):
        config_to_hugging_face(named_config("llama-2-7b", rotary_scaling=scaling))
    assert config_to_hugging_face(named_config("llama-2-7b", max_seqlen=2048, rotary_scaling=scaling))


def test_the_share_of_rotating_dimensions_survives_rounding():
    for width in range(2, 257):
        config = named_config("pythia-70m", n_head=1, d_head=width, rotary_dim=2)
        for rotary_dim in range(2, width + 1, 2):
            share = share_of(dataclasses.replace(config, rotary_dim=rotary_dim))
            assert int(width * share) == rotary_dim

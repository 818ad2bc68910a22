"""Hugging Face GPT-2 and LLaMA: equal logits and gradients, exact conversion, configs read strictly."""

from __future__ import annotations

import json

import pytest
import torch
from flash_attn_models.gpt import GPTConfig, GPTLMHeadModel
from flash_attn_models.gpt.hugging_face import (
    config_from_hugging_face,
    config_to_hugging_face,
    from_hugging_face,
    hugging_face_layout,
    to_hugging_face,
)

GPT2 = {"model_type": "gpt2", "vocab_size": 100, "n_positions": 32, "n_embd": 32, "n_layer": 1, "n_head": 2}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 100,
    "max_position_embeddings": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def without_tied_head(state_dict, layout):
    return {name: tensor for name, tensor in state_dict.items() if name != layout.tied_head}


def convert(hf_model):
    """Our model with the weights of a transformers one, and the layout that relates the two."""
    fields = json.loads(hf_model.config.to_json_string(use_diff=False))
    config = config_from_hugging_face(fields)
    layout = hugging_face_layout(config, fields["model_type"])
    model = GPTLMHeadModel(config).eval()
    model.load_state_dict(from_hugging_face(hf_model.state_dict(), layout))
    return model, layout


def test_float32_logits_and_gradients_equal_transformers(hf_model):
    model, layout = convert(hf_model)
    input_ids = torch.randint(model.config.vocab_size, (3, 29))
    logits, expected = model(input_ids), hf_model(input_ids).logits
    assert expected.std() > 0.5  # large enough for 1e-4 to mean something
    assert (logits - expected).abs().max() < 1e-4

    direction = torch.randn_like(logits)
    (logits * direction).mean().backward()
    (expected * direction).mean().backward()
    ours = to_hugging_face({name: parameter.grad for name, parameter in model.named_parameters()}, layout)
    theirs = {name: parameter.grad for name, parameter in hf_model.named_parameters()}
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        assert (ours[name] - grad).abs().max() < 1e-4 * grad.abs().max() + 1e-7, name


def test_state_dict_round_trip_is_exact_in_both_directions(hf_model):
    model, layout = convert(hf_model)
    theirs = without_tied_head(hf_model.state_dict(), layout)
    back = to_hugging_face(model.state_dict(), layout)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in theirs.items())
    again = from_hugging_face(back, layout)
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


def test_config_round_trip(hf_model):
    config = config_from_hugging_face(hf_model.config.to_dict())
    assert config_from_hugging_face(json.loads(json.dumps(config_to_hugging_face(config)))) == config


def test_defaults_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    for hf_config in (transformers.GPT2Config(), transformers.LlamaConfig()):
        complete = config_from_hugging_face(hf_config.to_dict())
        sparse = config_from_hugging_face({"model_type": hf_config.model_type})
        assert config_to_hugging_face(sparse) == config_to_hugging_face(complete)


def test_config_fields_of_older_transformers():
    old = {**LLAMA, "rope_theta": 5e5, "rope_scaling": None, "pretraining_tp": 1, "torch_dtype": "bfloat16"}
    new = {**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "dtype": "bfloat16"}
    assert config_from_hugging_face(old) == config_from_hugging_face(new)
    assert config_from_hugging_face(old).rotary_base == 5e5
    assert config_from_hugging_face(LLAMA).rotary_base == 10000.0
    published_gpt2 = {
        **GPT2,
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "n_ctx": 32,
        "bos_token_id": 99,
        "eos_token_id": 99,
        "summary_type": "cls_index",
        "task_specific_params": {"text-generation": {"max_length": 50}},
    }
    assert config_from_hugging_face(published_gpt2).eos_token_id == 99


@pytest.mark.parametrize(
    ("theirs", "changes"),
    [
        ("n_layer", {"n_layer": 3}),
        ("n_head", {"n_head": 4}),
        ("n_embd", {"n_embd": 64}),
        ("n_inner", {"n_inner": 40}),
        ("n_positions", {"n_positions": 48}),
        ("vocab_size", {"vocab_size": 128}),
        ("attn_pdrop", {"attn_pdrop": 0.3}),
        ("resid_pdrop", {"resid_pdrop": 0.3}),
        ("embd_pdrop", {"embd_pdrop": 0.3}),
        ("activation_function", {"activation_function": "relu"}),
        ("layer_norm_epsilon", {"layer_norm_epsilon": 1e-3}),
        ("tie_word_embeddings", {"tie_word_embeddings": False}),
        ("initializer_range", {"initializer_range": 0.1}),
        ("eos_token_id", {"eos_token_id": [5, 6]}),
        ("bos_token_id", {"bos_token_id": 5}),
        ("pad_token_id", {"pad_token_id": 5}),
    ],
)
def test_every_gpt2_field_arrives_and_returns(theirs, changes):
    config = config_from_hugging_face({**GPT2, **changes})
    assert config != config_from_hugging_face(GPT2)
    assert config_to_hugging_face(config)[theirs] == changes[theirs]


@pytest.mark.parametrize(
    ("theirs", "changes"),
    [
        ("num_hidden_layers", {"num_hidden_layers": 3}),
        ("num_attention_heads", {"num_attention_heads": 8}),
        ("num_key_value_heads", {"num_key_value_heads": 1}),
        ("hidden_size", {"hidden_size": 64}),
        ("intermediate_size", {"intermediate_size": 64}),
        ("head_dim", {"head_dim": 12}),
        ("vocab_size", {"vocab_size": 128}),
        ("max_position_embeddings", {"max_position_embeddings": 64}),
        ("rms_norm_eps", {"rms_norm_eps": 1e-3}),
        ("attention_bias", {"attention_bias": True}),
        ("mlp_bias", {"mlp_bias": True}),
        ("tie_word_embeddings", {"tie_word_embeddings": True}),
        ("attention_dropout", {"attention_dropout": 0.2}),
        ("initializer_range", {"initializer_range": 0.1}),
        ("rope_theta", {"rope_theta": 77.0}),
        ("eos_token_id", {"eos_token_id": [5, 6]}),
        ("bos_token_id", {"bos_token_id": 5}),
        ("pad_token_id", {"pad_token_id": 5}),
    ],
)
def test_every_llama_field_arrives_and_returns(theirs, changes):
    config = config_from_hugging_face({**LLAMA, **changes})
    assert config != config_from_hugging_face(LLAMA)
    assert config_to_hugging_face(config)[theirs] == changes[theirs]


def test_token_ids_outside_the_vocabulary_become_none():
    config = config_from_hugging_face(
        {**GPT2, "eos_token_id": [50256, 7], "bos_token_id": 50256, "pad_token_id": -1}
    )
    assert (config.eos_token_id, config.bos_token_id, config.pad_token_id) == ((7,), None, None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"model_type": "mistrall"},
            r"config field 'model_type': got 'mistrall'; expected one of 'gpt2', 'llama', 'mistral'",
        ),
        ({"hidden_size": 8}, r"config field 'model_type': got None"),
        ({**GPT2, "n_layers": 2}, r"config field 'n_layers': got 2;.*did you mean 'n_layer'"),
        (
            {**GPT2, "activation_function": "silu"},
            r"config field 'activation_function': got 'silu'; expected one of gelu_new",
        ),
        (
            {**GPT2, "scale_attn_weights": False},
            r"config field 'scale_attn_weights': got False; expected True, because",
        ),
        (
            {**GPT2, "add_cross_attention": True},
            r"config field 'add_cross_attention': got True; expected False",
        ),
        ({**GPT2, "quantization_config": {"bits": 4}}, r"config field 'quantization_config'.*not quantised"),
        ({**GPT2, "n_embd": 33}, r"GPTConfig.d_model: got 33; expected a multiple of n_head=2"),
        ({**GPT2, "vocab_size": "many"}, r"GPTConfig.vocab_size: got 'many'"),
        ({**LLAMA, "hidden_act": "gelu"}, r"config field 'hidden_act': got 'gelu'; expected 'silu'"),
        (
            {**LLAMA, "sliding_window": 8},
            r"config field 'sliding_window': got 8; expected a field of a 'llama' config",
        ),
        (
            {**LLAMA, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            r"config field 'rope_scaling'.*RotaryScaling.low_freq_factor: got None.*'llama3' needs",
        ),
        (
            {**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 3.0}},
            r"config field 'rope_scaling'.*RotaryScaling.beta_fast: got 3.0.*'linear' has no such",
        ),
        (
            {**LLAMA, "rope_scaling": {"rope_type": "linear", "facto": 2.0}},
            r"config field 'rope_scaling'.*unknown field 'facto' \(did you mean 'factor'",
        ),
        (
            {**LLAMA, "rope_parameters": {"rope_type": "axial", "factor": 2.0}},
            r"config field 'rope_parameters'.*one of 'linear', 'dynamic', 'yarn', 'llama3', 'longrope', not 'axial'",
        ),
        (
            {
                **LLAMA,
                "rope_scaling": {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 16},
            },
            r"config field 'rope_scaling'.*original_max_position_embeddings 32, the config's context",
        ),
        (
            {**LLAMA, "rope_parameters": {"partial_rotary_factor": 0.5}},
            r"config field 'rope_parameters'.*whole heads",
        ),
        (
            {**LLAMA, "rope_parameters": {"rope_theta": 1e4, "factor": 2.0}},
            r"config field 'rope_parameters'.*not factor",
        ),
    ],
)
def test_unsupported_configs_are_refused_by_field(fields, message):
    with pytest.raises(ValueError, match=message + r".*Fix: "):
        config_from_hugging_face(fields)


SMALL = {"vocab_size": 100, "max_seqlen": 32, "n_layer": 1, "n_head": 4, "d_model": 32}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_head_kv": 2}, r"got n_head_kv=2; expected what Hugging Face's 'gpt2' has: n_head_kv n_head"),
        ({"qkv_bias": False}, r"got qkv_bias=False;.*'gpt2' has: qkv_bias True"),
        (
            {"position": "rotary", "rotary_dim": 4, "activation": "swiglu", "norm": "rms_norm"},
            r"got rotary_dim=4;.*'llama'",
        ),
        (
            {"position": "rotary", "rotary_interleaved": True, "activation": "swiglu", "norm": "rms_norm"},
            r"rotary_interleaved",
        ),
        (
            {"position": "rotary", "out_bias": False, "activation": "swiglu", "norm": "rms_norm"},
            r"got out_bias=False;.*'llama'",
        ),
    ],
)
def test_configs_that_hugging_face_lacks_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config_to_hugging_face(GPTConfig(**{**SMALL, **changes}))


def test_layout_of_an_unknown_family_is_refused():
    with pytest.raises(ValueError, match=r"'model_type': got 'bert'"):
        hugging_face_layout(GPTConfig(**SMALL), "bert")

"""Every decoder family against tiny random transformers models: logits, gradients, tokens, files, both ways.

Driven by the registry: a family without at least two models here fails.
"""

from __future__ import annotations

import json

import pytest
import torch
from flash_attn_models import load_pretrained, save_pretrained
from flash_attn_models.generation import generate, make_cache
from flash_attn_models.gpt import GPTLMHeadModel
from flash_attn_models.gpt.families import FAMILIES
from flash_attn_models.gpt.hugging_face import (
    MODEL_TYPES,
    config_from_hugging_face,
    config_to_hugging_face,
    from_hugging_face,
    hugging_face_layout,
    to_hugging_face,
)
from flash_attn_models.testing import assert_within_reference_error

transformers = pytest.importorskip("transformers")

CONTEXT = 64
_N = {"n_positions": CONTEXT, "n_embd": 48, "n_layer": 2, "n_head": 4}
_HIDDEN = {
    "max_position_embeddings": CONTEXT,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_GATED = {**_HIDDEN, "intermediate_size": 88}
SIZES = {
    "gpt2": _N,
    "gptj": {**_N, "rotary_dim": 8},
    "gpt_bigcode": _N,
    "opt": {**_HIDDEN, "ffn_dim": 72},
    "falcon": _HIDDEN,
    "gpt_neox": {**_HIDDEN, "intermediate_size": 72},
    "llama": _GATED,
    "mistral": {**_GATED, "num_key_value_heads": 2},
    "qwen2": {**_GATED, "num_key_value_heads": 2},
    "qwen3": {**_GATED, "num_key_value_heads": 2, "head_dim": 20},
}

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 8.0,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
NEW_FALCON = {"new_decoder_architecture": True, "num_kv_heads": 2}
WINDOW = {"use_sliding_window": True, "sliding_window": 5, "num_hidden_layers": 3}
OLD_350M = {"do_layer_norm_before": False, "word_embed_proj_dim": 20}

# Head ratios, biases, odd vocabularies, norms, windows, and kinds of positions.
MODELS: dict[str, list[dict]] = {
    "gpt2": [
        {},
        {"tie_word_embeddings": False, "activation_function": "gelu", "vocab_size": 257},
        {"scale_attn_by_inverse_layer_idx": True, "n_layer": 3},
    ],
    "llama": [
        {"num_attention_heads": 6, "num_key_value_heads": 2, "rope_parameters": LLAMA3},
        {"num_key_value_heads": 1, "tie_word_embeddings": True, "rope_parameters": YARN, "head_dim": 20},
        {"attention_bias": True, "mlp_bias": True, "rope_parameters": LINEAR, "vocab_size": 257},
        {"rope_parameters": DYNAMIC},
    ],
    "mistral": [
        {"sliding_window": 7},
        {"sliding_window": None, "head_dim": 20, "tie_word_embeddings": True, "vocab_size": 257},
        {"sliding_window": 2, "num_key_value_heads": 4, "rope_parameters": YARN},
    ],
    "qwen2": [
        {},
        {"num_key_value_heads": 1, "tie_word_embeddings": True, "vocab_size": 257},
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "rope_parameters": YARN},
        {**WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ],
    "qwen3": [
        {},
        {"attention_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 4, "vocab_size": 257},
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0, "head_dim": 8},
        {**WINDOW, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    ],
    "gpt_neox": [
        {},  # a quarter of 12 dimensions is odd: see _model
        {
            "use_parallel_residual": False,
            "rope_parameters": {"rope_theta": 300.0, "partial_rotary_factor": 1.0},
        },
        {
            "attention_bias": False,
            "tie_word_embeddings": True,
            "vocab_size": 257,
            "hidden_act": "gelu_fast",
            "rope_parameters": {**LINEAR, "partial_rotary_factor": 0.5},
        },
    ],
    "gptj": [
        {},
        {"rotary_dim": 12, "n_inner": 72, "vocab_size": 257, "activation_function": "gelu"},
        {"tie_word_embeddings": True},
    ],
    "opt": [
        {},
        OLD_350M,
        {"enable_bias": False, "vocab_size": 257, "tie_word_embeddings": False},
        {"word_embed_proj_dim": 64, "activation_function": "gelu", "tie_word_embeddings": False},
    ],
    "falcon": [
        {},  # 7B: multi-query, parallel, one norm
        NEW_FALCON,  # 40B: grouped, two norms
        {**NEW_FALCON, "num_ln_in_parallel_attn": 1, "bias": True, "tie_word_embeddings": False},
        {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},  # RW
        {"alibi": True, "num_attention_heads": 6, "vocab_size": 257, "hidden_size": 48},
        {"multi_query": False, "rope_parameters": LLAMA3, "ffn_hidden_size": 72},
        {"parallel_attn": False, "activation": "relu"},
    ],
    "gpt_bigcode": [
        {},
        {"multi_query": False, "vocab_size": 257, "n_inner": 72},
        {"tie_word_embeddings": False, "activation_function": "relu", "n_head": 6},
    ],
}
_CASES = [
    pytest.param(model_type, changes, id=f"{model_type}{number}")
    for model_type, models in MODELS.items()
    for number, changes in enumerate(models)
]


def _model(model_type, changes, std=0.3):
    spread = "init_std" if model_type == "opt" else "initializer_range"
    sizes = {"vocab_size": 131, spread: std, **SIZES[model_type]}
    if model_type == "gpt_neox" and "rope_parameters" not in changes:
        changes = {**changes, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.34}}
    no_tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = transformers.AutoConfig.for_model(model_type, **{**sizes, **no_tokens, **changes})
    # The eager attention of Falcon counts ALiBi twice.
    attention = "sdpa" if model_type == "falcon" else "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():  # norms and biases too, so that swapped or lost ones show
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=[case.values for case in _CASES], ids=[case.id for case in _CASES])
def case(request):
    """Model type and fields."""
    return request.param


@pytest.fixture
def theirs(case):
    """A tiny random transformers model, in evaluation mode."""
    return _model(*case)


def convert(theirs, dtype=torch.float32):
    fields = json.loads(theirs.config.to_json_string(use_diff=False))
    config = config_from_hugging_face(fields)
    layout = hugging_face_layout(config, fields["model_type"])
    model = GPTLMHeadModel(config, dtype=dtype).eval()
    model.load_state_dict(from_hugging_face(theirs.state_dict(), layout))
    return model, layout


def prompt(model, batch=3, seqlen=29):
    return torch.randint(model.config.vocab_size, (batch, seqlen))


def in_module_names(tensors, layout):
    """With the names that modules of transformers have, which for some heads are not those in files."""
    return {layout.other_names.get(name, name): tensor for name, tensor in tensors.items()}


def test_registry_and_models_of_this_file_agree():
    without_class = {"baichuan", "btlm"}  # see test_models_family_remote.py
    assert set(FAMILIES) == set(MODEL_TYPES) == set(MODELS) | without_class
    assert all(len(models) >= 2 for models in MODELS.values())


def test_float32_logits_and_gradients_equal_transformers(theirs):
    model, layout = convert(theirs)
    input_ids = prompt(model, seqlen=CONTEXT)
    logits, expected = model(input_ids), theirs(input_ids).logits
    assert expected.std() > 0.5  # large enough for 1e-4 to mean something
    assert (logits - expected).abs().max() < 1e-4

    direction = torch.randn_like(logits)
    (logits * direction).mean().backward()
    (expected * direction).mean().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    ours = in_module_names(to_hugging_face(grads, layout), layout)
    their_grads = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert ours.keys() == their_grads.keys()
    for name, grad in their_grads.items():
        assert (ours[name] - grad).abs().max() < 1e-4 * grad.abs().max() + 1e-7, name


def test_bfloat16_logits_obey_the_tolerance_law(case):
    # Weights this small keep rounding errors from growing so much that the law says nothing of the model.
    theirs = _model(*case, std=0.1).bfloat16()
    model, _ = convert(theirs, dtype=torch.bfloat16)
    input_ids = prompt(model)
    with torch.no_grad():
        out, plain = model(input_ids), theirs(input_ids).logits
        reference = theirs.float()(input_ids).logits
    last_place = torch.finfo(torch.bfloat16).eps * reference.abs().max().item()
    assert_within_reference_error(out, reference, plain, atol=last_place)


def test_state_dict_round_trip_is_exact_in_both_directions(theirs):
    model, layout = convert(theirs)
    back = to_hugging_face(model.state_dict(), layout)
    modules = in_module_names(back, layout)
    expected = {
        n: t
        for n, t in theirs.state_dict().items()
        if not (n == "lm_head.weight" and model.config.tie_embeddings)
    }
    assert modules.keys() == expected.keys()
    assert all(torch.equal(modules[name], tensor) for name, tensor in expected.items())
    again = from_hugging_face(back, layout)
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


def test_config_round_trip(theirs):
    config = config_from_hugging_face(theirs.config.to_dict())
    for model_type in (theirs.config.model_type, None):
        fields = json.loads(json.dumps(config_to_hugging_face(config, model_type)))
        assert config_from_hugging_face(fields) == config


def test_files_load_from_and_into_transformers_bit_for_bit(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_pretrained(tmp_path / "theirs")
    expected, _ = convert(theirs)
    assert model.config == expected.config
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name

    save_pretrained(model, tmp_path / "ours")
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation=theirs.config._attn_implementation, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    # A model that an earlier family has too is saved as that: GPTBigCode with all heads as GPT-2.
    saved_as = loaded.config.model_type
    assert saved_as in (theirs.config.model_type, "llama", "gpt2")
    if {saved_as, theirs.config.model_type} != {"gpt2", "gpt_bigcode"}:
        for name, tensor in theirs.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
    input_ids = prompt(model)
    with torch.no_grad():  # activations of one function under several names round differently
        torch.testing.assert_close(
            loaded.eval()(input_ids).logits, theirs(input_ids).logits, rtol=1e-5, atol=1e-5
        )


def test_greedy_equals_transformers_token_for_token(theirs):
    model, _ = convert(theirs)
    input_ids = prompt(model, batch=4, seqlen=9)
    # Without a mask transformers takes every fill id in the prompt for padding.
    options = {
        "attention_mask": torch.ones_like(input_ids),
        "max_new_tokens": CONTEXT - 10,
        "do_sample": False,
    }
    expected = theirs.generate(input_ids, **options, pad_token_id=0)
    assert len(expected[:, 9:].unique()) > 5  # not one token for ever
    assert torch.equal(generate(model, input_ids, CONTEXT - 10), expected)


@torch.no_grad()
def test_decoding_in_pieces_equals_one_pass(theirs):
    model, _ = convert(theirs)
    input_ids = prompt(model, seqlen=40)
    cache = make_cache(model, 3, 40)
    pieces = [model(part, cache=cache) for part in input_ids.split([11, 1, 1, 20, 7], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(input_ids), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("model_type", MODELS)
def test_defaults_are_those_of_transformers(model_type):
    complete = config_from_hugging_face(transformers.AutoConfig.for_model(model_type).to_dict())
    sparse = config_from_hugging_face({"model_type": model_type})
    fields = [config_to_hugging_face(config, model_type) for config in (complete, sparse)]
    assert fields[0] == fields[1]


def test_a_head_of_either_name_loads(tmp_path):
    safetensors_torch = pytest.importorskip("safetensors.torch")
    theirs = _model("gpt_neox", {})
    model, _ = convert(theirs)
    save_pretrained(model, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = safetensors_torch.load_file(file)
    weights["lm_head.weight"] = weights.pop("embed_out.weight")
    safetensors_torch.save_file(weights, file)
    assert torch.equal(load_pretrained(tmp_path / "model").lm_head.weight, model.lm_head.weight)

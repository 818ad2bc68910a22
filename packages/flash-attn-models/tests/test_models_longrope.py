"""LongRoPE: long factors for a context beyond that of pretraining, short ones up to it, as in transformers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from flash_attn_models import load_pretrained, save_pretrained
from flash_attn_models.gpt import GPTConfig, GPTLMHeadModel
from flash_attn_models.gpt.hugging_face import config_from_hugging_face

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": 16,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 2.0],
    "long_factor": [1.0, 2.0, 3.0, 5.0, 9.0, 16.0],
}


def test_equals_transformers(make_hf_model, tmp_path):
    hf_model = make_hf_model("llama", {"rope_parameters": LONGROPE})
    hf_model.save_pretrained(tmp_path / "hf")
    model = load_pretrained(tmp_path / "hf")
    input_ids = torch.randint(131, (2, 40))  # transformers takes the long factors for inputs beyond 16 tokens
    with torch.no_grad():
        expected = hf_model(input_ids).logits
        assert (model(input_ids) - expected).abs().max() < 1e-4
        # Its factor of the scores is the ratio of the contexts, which the shorter model does not have.
        scaling = dataclasses.replace(model.config.rotary_scaling, factor=4.0)
        short_config = dataclasses.replace(model.config, max_seqlen=16, rotary_scaling=scaling)
        short = GPTLMHeadModel(short_config).eval()
        short.load_state_dict(model.state_dict())
        assert (short(input_ids[:, :16]) - hf_model(input_ids[:, :16]).logits).abs().max() < 1e-4
        assert (short(input_ids[:, :16]) - model(input_ids[:, :16])).abs().max() > 1e-3
    save_pretrained(model, tmp_path / "back")
    assert load_pretrained(tmp_path / "back").config == model.config


def test_the_first_name_and_a_context_beside_it():
    rope = {name: value for name, value in LONGROPE.items() if name not in ("rope_type", "rope_theta")}
    original = rope.pop("original_max_position_embeddings")
    fields = {
        "model_type": "llama",
        "hidden_size": 48,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "rope_scaling": {"type": "su", **rope},
        "original_max_position_embeddings": original,
    }
    scaling = config_from_hugging_face(fields).rotary_scaling
    assert (scaling.kind, scaling.original_max_seqlen) == ("longrope", 16)
    assert hash(scaling)


def test_plain_values_make_the_same_config():
    config = GPTConfig(
        vocab_size=9,
        max_seqlen=64,
        n_layer=1,
        n_head=1,
        d_model=4,
        position="rotary",
        rotary_scaling={
            "kind": "longrope",
            "original_max_seqlen": 16,
            "short_factor": [1.0, 2.0],
            "long_factor": [3.0, 4.0],
        },
    )
    assert GPTConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"short_factor": None},
            r"RotaryScaling.short_factor: got None; expected a value, which 'longrope' needs",
        ),
        ({"long_factor": [1.0, -2.0]}, r"RotaryScaling.long_factor: got \(1.0, -2.0\); expected positive"),
        ({"beta_fast": 2.0}, "RotaryScaling.beta_fast"),
    ],
)
def test_wrong_parameters_are_named(change, message):
    good = {"kind": "longrope", "original_max_seqlen": 16, "short_factor": [1.0], "long_factor": [2.0]}
    with pytest.raises(ValueError, match=message):
        GPTConfig(
            vocab_size=9,
            max_seqlen=64,
            n_layer=1,
            n_head=1,
            d_model=4,
            position="rotary",
            rotary_scaling={**good, **change},
        )

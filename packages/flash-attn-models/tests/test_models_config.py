"""GPTConfig: sizes that follow, presets, dictionaries, and what it refuses."""

from __future__ import annotations

import dataclasses
import json

import pytest
from flash_attn_models.gpt import GPTConfig, GPTLMHeadModel, RotaryScaling

SMALL = {"vocab_size": 128, "max_seqlen": 32, "n_layer": 2, "n_head": 4, "d_model": 64}


def test_optional_sizes_follow_from_the_others():
    config = GPTConfig(**SMALL)
    assert (config.num_heads_kv, config.head_dim, config.inner_dim, config.num_rotary_dims) == (4, 16, 256, 0)
    rotary = GPTConfig(**SMALL, position="rotary", n_head_kv=2, d_head=24, activation="swiglu")
    assert (rotary.num_heads_kv, rotary.head_dim, rotary.num_rotary_dims) == (2, 24, 24)
    assert rotary.inner_dim == 256  # 8/3 * 64 = 170.7, up to a multiple of 256
    assert dataclasses.replace(config, n_head=8).head_dim == 8


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        (GPTConfig.gpt2("small"), 124.44),
        (GPTConfig.gpt2("medium"), 354.82),
        (GPTConfig.gpt2("large"), 774.03),
        (GPTConfig.gpt2("xl"), 1557.61),
        (GPTConfig.llama("tinyllama-1.1b"), 1100.05),
        (GPTConfig.llama("llama2-7b"), 6738.42),
        (GPTConfig.llama("llama2-13b"), 13015.86),
        (GPTConfig.llama("llama3-8b"), 8030.26),
    ],
)
def test_presets_have_the_published_number_of_parameters(config, millions):
    assert GPTLMHeadModel(config, device="meta").num_parameters() / 1e6 == pytest.approx(millions, abs=0.005)


def test_preset_changes():
    assert GPTConfig.gpt2("small", n_layer=3).n_layer == 3
    assert GPTConfig.gpt2().eos_token_id == 50256
    assert GPTConfig.gpt2(vocab_size=300).eos_token_id is None
    assert GPTConfig.llama(vocab_size=300, eos_token_id=7).eos_token_id == 7


def test_dictionary_round_trip_through_json(config):
    assert GPTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    several = dataclasses.replace(config, eos_token_id=[3, 5])
    assert several.eos_token_ids == (3, 5)
    assert GPTConfig.from_dict(json.loads(json.dumps(several.to_dict()))) == several
    hash(several)


def test_windows_by_layer():
    sizes = {"vocab_size": 8, "max_seqlen": 8, "n_layer": 3, "n_head": 1, "d_model": 4, "window": 2}
    config = GPTConfig(**sizes, window_layers=[True, False, True])
    assert config.window_layers == (True, False, True)
    assert [config.window_of(layer) for layer in range(3)] == [2, None, 2]
    again = GPTConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and hash(again) == hash(config)
    upper = GPTConfig(**sizes, window_layers=(False, True, True))
    assert upper == GPTConfig(**sizes, window_first_layer=1)
    assert GPTConfig(**sizes, window_layers=(True,) * 3) == GPTConfig(**sizes)


def test_scales_by_layer():
    config = GPTConfig(vocab_size=8, max_seqlen=8, n_layer=3, n_head=1, d_model=4)
    assert [config.softmax_scale_of(layer) for layer in range(3)] == [None] * 3
    config = dataclasses.replace(config, softmax_scale_by_layer=True)
    assert [config.softmax_scale_of(layer) for layer in range(3)] == [1 / 2, 1 / 4, 1 / 6]
    config = dataclasses.replace(config, softmax_scale=3.0)
    assert [config.softmax_scale_of(layer) for layer in range(3)] == [3.0, 1.5, 1.0]


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        GPTConfig(**SMALL).n_layer = 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layer": 0}, r"GPTConfig.n_layer: got 0; expected a positive integer"),
        ({"vocab_size": 128.0}, r"GPTConfig.vocab_size: got 128.0; expected a positive integer"),
        ({"n_head": True}, r"GPTConfig.n_head: got True; expected a positive integer"),
        ({"d_inner": -1}, r"GPTConfig.d_inner: got -1; expected a positive integer"),
        ({"d_model": 65}, r"GPTConfig.d_model: got 65; expected a multiple of n_head=4"),
        ({"n_head_kv": 3}, r"GPTConfig.n_head_kv: got 3; expected a divisor of n_head=4"),
        ({"activation": "swigluu"}, r"GPTConfig.activation: got 'swigluu'.*did you mean 'swiglu'"),
        ({"norm": None}, r"GPTConfig.norm: got None; expected one of 'layer_norm', 'rms_norm'"),
        (
            {"position": "alib"},
            r"GPTConfig.position: got 'alib'; .*'learned', 'rotary', 'alibi' \(did you mean 'alibi'",
        ),
        ({"rotary_dim": 8}, r"GPTConfig.rotary_dim: got 8;.*position='learned' has no rotary embedding"),
        ({"rotary_base": 5e5}, r"GPTConfig.rotary_base: got 500000.0;.*no rotary embedding"),
        ({"rotary_interleaved": True}, r"GPTConfig.rotary_interleaved: got True;.*no rotary embedding"),
        (
            {"position": "rotary", "rotary_dim": 18},
            r"GPTConfig.rotary_dim: got 18; expected an even number of at most .* 16",
        ),
        ({"position": "rotary", "rotary_dim": 7}, r"GPTConfig.rotary_dim: got 7; expected an even number"),
        ({"position": "rotary", "d_head": 15}, r"GPTConfig.rotary_dim: got 15; expected an even number"),
        ({"rotary_scaling": {"kind": "linear", "factor": 2.0}}, r"GPTConfig.rotary_scaling: got .*no rotary"),
        (
            {"position": "rotary", "rotary_scaling": 2.0},
            r"GPTConfig.rotary_scaling: got 2.0; expected a Rotary",
        ),
        (
            {"position": "rotary", "rotary_scaling": {"kind": "yarn", "factor": 2.0}},
            r"RotaryScaling.original_max_seqlen: got None; expected a value, which 'yarn' needs",
        ),
        (
            {"position": "rotary", "rotary_scaling": {"kind": "linar", "factor": 2.0}},
            r"RotaryScaling.kind: got 'linar'; .*did you mean 'linear'",
        ),
        (
            {"position": "rotary", "rotary_scaling": {"kind": "linear", "factor": -2.0}},
            r"RotaryScaling.factor: got -2.0; expected a positive",
        ),
        (
            {"position": "rotary", "rotary_scaling": {"factor": 2.0}},
            r"RotaryScaling: got no kind; expected one of 'linear'",
        ),
        (
            {
                "position": "rotary",
                "rotary_scaling": {
                    "kind": "llama3",
                    "factor": 2.0,
                    "original_max_seqlen": 16,
                    "low_freq_factor": 4.0,
                    "high_freq_factor": 1.0,
                },
            },
            r"high_freq_factor: got 1.0; expected a number above low_freq_factor",
        ),
        ({"alibi_scaled": True}, r"GPTConfig.alibi_scaled: got True;.*has no ALiBi"),
        ({"position": "alibi", "position_offset": 2}, r"GPTConfig.position_offset: got 2;.*no table"),
        ({"position_offset": -1}, r"GPTConfig.position_offset: got -1; expected an integer of at least 0"),
        ({"window": 0}, r"GPTConfig.window: got 0; expected a positive integer"),
        ({"window_first_layer": 1}, r"GPTConfig.window_first_layer: got 1;.*there is no window"),
        (
            {"window": 4, "window_first_layer": 2},
            r"GPTConfig.window_first_layer: got 2; expected less than n_layer=2",
        ),
        ({"window_layers": [True, False]}, r"GPTConfig.window_layers: got .*there is no window"),
        ({"window": 4, "window_layers": [True]}, r"GPTConfig.window_layers: got .*each of n_layer=2 layers"),
        (
            {"window": 4, "window_layers": [1, 0]},
            r"GPTConfig.window_layers: got .*True or False for each layer",
        ),
        ({"window": 4, "window_layers": [False] * 2}, r"GPTConfig.window_layers: .*at least one layer"),
        (
            {"window": 4, "window_layers": [True, False], "window_first_layer": 1},
            r"GPTConfig.window_layers: .*None beside window_first_layer=1",
        ),
        (
            {"position": "alibi", "alibi_scaled": True, "softmax_scale_by_layer": True},
            r"GPTConfig.softmax_scale_by_layer: got True;.*all layers have the same ALiBi",
        ),
        ({"softcap": 0.0}, r"GPTConfig.softcap: got 0.0; expected a positive, finite number"),
        ({"softmax_scale": -1.0}, r"GPTConfig.softmax_scale: got -1.0; expected a positive"),
        ({"logit_scale": 0}, r"GPTConfig.logit_scale: got 0; expected a positive"),
        ({"embedding_scale": "2"}, r"GPTConfig.embedding_scale: got '2'; expected a positive"),
        ({"tied_norm": True}, r"GPTConfig.tied_norm: got True;.*parallel_block=False needs two norms"),
        ({"parallel_block": True, "prenorm": False}, r"GPTConfig.parallel_block: got True;.*prenorm=False"),
        ({"d_embedding": 64}, r"GPTConfig.d_embedding: got 64; expected another width than d_model"),
        ({"qk_norm": None}, r"GPTConfig.qk_norm: got None; expected True or False"),
        ({"qkv_bias": 1}, r"GPTConfig.qkv_bias: got 1; expected True or False"),
        ({"dropout": 1.0}, r"GPTConfig.dropout: got 1.0; expected a probability in \[0, 1\)"),
        ({"embedding_dropout": -0.1}, r"GPTConfig.embedding_dropout: got -0.1; expected a probability"),
        ({"attn_dropout": "0.1"}, r"GPTConfig.attn_dropout: got '0.1'; expected a probability"),
        ({"norm_eps": 0.0}, r"GPTConfig.norm_eps: got 0.0; expected a positive, finite number"),
        ({"initializer_range": float("nan")}, r"GPTConfig.initializer_range: got nan; expected a positive"),
        (
            {"eos_token_id": 128},
            r"GPTConfig.eos_token_id: got 128; expected a token id in \[0, vocab_size=128\)",
        ),
        ({"eos_token_id": [3, 500]}, r"GPTConfig.eos_token_id: got \(3, 500\); expected a token id"),
        ({"pad_token_id": -1}, r"GPTConfig.pad_token_id: got -1; expected a token id"),
    ],
)
def test_bad_values_are_refused(changes, message):
    with pytest.raises(ValueError, match=message + r".*Fix: "):
        GPTConfig(**{**SMALL, **changes})


def test_unknown_and_missing_fields_are_refused():
    with pytest.raises(ValueError, match=r"unknown field 'n_layers' \(did you mean 'n_layer'\?\)"):
        GPTConfig.from_dict({**SMALL, "n_layers": 3})
    with pytest.raises(ValueError, match=r"unknown field 'dropuot' \(did you mean 'dropout'\?\)"):
        GPTConfig.gpt2("small", dropuot=0.1)
    with pytest.raises(ValueError, match=r"GPTConfig: got no n_head, d_model; expected at least the fields"):
        GPTConfig.from_dict({"vocab_size": 128, "max_seqlen": 32, "n_layer": 2})
    with pytest.raises(ValueError, match=r"size: got 'smal'; expected one of .*did you mean 'small'"):
        GPTConfig.gpt2("smal")
    with pytest.raises(ValueError, match=r"size: got 'llama2-70b'; expected one of .*'llama2-7b'"):
        GPTConfig.llama("llama2-70b")


def test_scaling_survives_json_and_hashing():
    config = GPTConfig(
        **SMALL,
        position="rotary",
        rotary_scaling={"kind": "yarn", "factor": 2.0, "original_max_seqlen": 16, "truncate": False},
    )
    assert isinstance(config.rotary_scaling, RotaryScaling)
    again = GPTConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and hash(again) == hash(config)
    with pytest.raises(ValueError, match=r"RotaryScaling: got unknown field 'beta' \(did you mean"):
        RotaryScaling.from_dict({"kind": "yarn", "beta": 3})

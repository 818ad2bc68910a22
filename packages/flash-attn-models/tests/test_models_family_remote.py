"""Families whose class transformers does not have: against a reference in plain PyTorch that reads their own names.

The references follow the code published beside the weights, one sequence at a time and with quadratic attention.
"""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from flash_attn_models import load_pretrained, save_pretrained
from flash_attn_models.checkpoint_files import open_checkpoint
from flash_attn_models.generation import generate
from flash_attn_models.gpt import GPTLMHeadModel
from flash_attn_models.gpt.hugging_face import (
    config_from_hugging_face,
    config_to_hugging_face,
    from_hugging_face,
    hugging_face_layout,
    to_hugging_face,
)
from torch.nn import functional as F

_BAICHUAN = {
    "model_type": "baichuan",
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
    "model_max_length": 64,
    "hidden_act": "silu",
    "bos_token_id": None,
    "eos_token_id": None,
}
_BTLM = {
    "model_type": "btlm",
    "vocab_size": 131,
    "n_positions": 64,
    "n_embd": 48,
    "n_inner": 70,
    "n_layer": 2,
    "n_head": 4,
    "initializer_range": 0.3,
    "activation_function": "swiglu",
    "position_embedding_type": "alibi",
    "mup_embeddings_scale": 14.6,
    "mup_output_alpha": 2.2,
    "mup_width_scale": 0.1,
    "mup_scale_qk_dot_by_d": True,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
CONFIGS = {
    "baichuan_7b": {**_BAICHUAN, "max_position_embeddings": 64},
    "baichuan_13b": {**_BAICHUAN, "num_attention_heads": 6, "vocab_size": 257},
    "baichuan2_7b": {**_BAICHUAN, "max_position_embeddings": 64, "z_loss_weight": 0},
    "baichuan2_13b": {**_BAICHUAN, "z_loss_weight": 0, "tie_word_embeddings": True},
    "btlm": _BTLM,
    "btlm_plain": {
        **{name: value for name, value in _BTLM.items() if not name.startswith("mup")},
        "n_head": 6,
        "tie_word_embeddings": False,
        "vocab_size": 257,
    },
}


def _slopes(n_head):
    """As published with ALiBi, by recursion."""
    if math.log2(n_head).is_integer():
        start = 2 ** (-(2 ** -(math.log2(n_head) - 3)))
        return [start * start**i for i in range(n_head)]
    power = 2 ** math.floor(math.log2(n_head))
    return _slopes(power) + _slopes(2 * power)[0::2][: n_head - power]


def _attention(q, k, v, scale, alibi):
    """q, k, v (B,S,H,D)."""
    seqlen, n_head = q.shape[1:3]
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    if alibi:
        slopes = torch.tensor(_slopes(n_head), dtype=q.dtype)
        scores = scores + slopes[:, None, None] * torch.arange(seqlen, dtype=q.dtype)
    scores = scores.masked_fill(torch.ones(seqlen, seqlen, dtype=torch.bool).triu(1), -math.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)


def _rotate(x):
    half = x.shape[-1] // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(x.shape[1], dtype=torch.float64)[:, None, None] * frequencies
    cos, sin = angles.cos().to(x.dtype).repeat(1, 1, 2), angles.sin().to(x.dtype).repeat(1, 1, 2)
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * cos + turned * sin


def _baichuan(fields, w, ids):
    def norm(x, name):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * w[f"{name}.weight"]

    rotary = "max_position_embeddings" in fields
    x = w["model.embed_tokens.weight"][ids]
    for layer in range(fields["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        qkv = norm(x, f"{name}.input_layernorm") @ w[f"{name}.self_attn.W_pack.weight"].T
        q, k, v = qkv.unflatten(-1, (3, fields["num_attention_heads"], -1)).unbind(2)
        if rotary:
            q, k = _rotate(q), _rotate(k)
        out = _attention(q, k, v, q.shape[-1] ** -0.5, alibi=not rotary)
        x = x + out @ w[f"{name}.self_attn.o_proj.weight"].T
        h = norm(x, f"{name}.post_attention_layernorm")
        gate, up = (h @ w[f"{name}.mlp.{part}_proj.weight"].T for part in ("gate", "up"))
        x = x + (F.silu(gate) * up) @ w[f"{name}.mlp.down_proj.weight"].T
    head = w["model.embed_tokens.weight" if fields.get("tie_word_embeddings") else "lm_head.weight"]
    head = F.normalize(head) if "z_loss_weight" in fields else head
    return norm(x, "model.norm") @ head.T


def _btlm(fields, w, ids):
    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

    def conv1d(x, name):
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    x = w["transformer.wte.weight"][ids] * fields.get("mup_embeddings_scale", 1.0)
    for layer in range(fields["n_layer"]):
        name = f"transformer.h.{layer}"
        qkv = conv1d(norm(x, f"{name}.ln_1"), f"{name}.attn.c_attn")
        q, k, v = qkv.unflatten(-1, (3, fields["n_head"], -1)).unbind(2)
        power = 1.0 if fields.get("mup_scale_qk_dot_by_d") else 0.5
        x = x + conv1d(_attention(q, k, v, q.shape[-1] ** -power, alibi=True), f"{name}.attn.c_proj")
        h = norm(x, f"{name}.ln_2")
        h = conv1d(h, f"{name}.mlp.c_fc") * F.silu(conv1d(h, f"{name}.mlp.c_fc2"))
        x = x + conv1d(h, f"{name}.mlp.c_proj")
    head = w["transformer.wte.weight" if fields.get("tie_word_embeddings", True) else "lm_head.weight"]
    scale = fields.get("mup_output_alpha", 1.0) * fields.get("mup_width_scale", 1.0)
    return norm(x, "transformer.ln_f") @ head.T * scale


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def fields(request):
    return request.param


@pytest.fixture
def model(fields):
    torch.manual_seed(0)
    model = GPTLMHeadModel(config_from_hugging_face(fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def reference(fields, weights, input_ids):
    return (_baichuan if fields["model_type"] == "baichuan" else _btlm)(fields, weights, input_ids)


def theirs_of(model, fields):
    layout = hugging_face_layout(model.config, fields["model_type"])
    return {
        name: tensor.detach().clone().requires_grad_()
        for name, tensor in to_hugging_face(model.state_dict(), layout).items()
    }, layout


def test_logits_and_gradients_equal_the_reference(model, fields):
    weights, layout = theirs_of(model, fields)
    input_ids = torch.randint(fields["vocab_size"], (3, 64))
    logits, expected = model(input_ids), reference(fields, weights, input_ids)
    assert expected.std() > 0.05
    assert (logits - expected).abs().max() < 1e-4
    direction = torch.randn_like(logits)
    (logits * direction).mean().backward()
    (expected * direction).mean().backward()
    ours = to_hugging_face({name: parameter.grad for name, parameter in model.named_parameters()}, layout)
    for name, weight in weights.items():
        assert (ours[name] - weight.grad).abs().max() < 1e-4 * weight.grad.abs().max() + 1e-7, name


def test_conversion_is_exact_both_ways(model, fields):
    weights, layout = theirs_of(model, fields)
    again = from_hugging_face(weights, layout)
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())
    back = json.loads(json.dumps(config_to_hugging_face(model.config, fields["model_type"])))
    assert config_from_hugging_face(back) == model.config


@torch.no_grad()
def test_greedy_equals_a_loop_over_the_reference(model, fields):
    weights, _ = theirs_of(model, fields)
    expected = torch.randint(fields["vocab_size"], (3, 9))
    tokens = generate(model, expected, 25, eos_token_id=())
    for _ in range(25):
        following = reference(fields, weights, expected)[:, -1].argmax(-1)
        expected = torch.cat([expected, following[:, None]], dim=1)
    assert torch.equal(tokens, expected)


def test_folders_hold_the_published_names_and_load(model, fields, tmp_path):
    save_pretrained(model, tmp_path / "model")
    saved_as = json.loads((tmp_path / "model" / "config.json").read_text())["model_type"]
    # Without its head, Baichuan 1 with rotary positions is a LLaMA, which transformers has a class for.
    assert saved_as == (
        "llama"
        if "max_position_embeddings" in fields and "z_loss_weight" not in fields
        else fields["model_type"]
    )
    if saved_as == fields["model_type"]:
        assert set(open_checkpoint(tmp_path / "model").tensors) == set(theirs_of(model, fields)[0])
    loaded = load_pretrained(tmp_path / "model")
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    input_ids = torch.randint(fields["vocab_size"], (2, 20))
    assert torch.equal(loaded(input_ids), model(input_ids))


def test_the_vocabulary_of_baichuan_2_tells_its_head():
    config = config_from_hugging_face({**_BAICHUAN, "vocab_size": 125696})
    assert config.normalize_head
    with pytest.raises(ValueError, match=r"normalize_head=False.*normalize_head True with vocab_size=125696"):
        config_to_hugging_face(dataclasses.replace(config, normalize_head=False), "baichuan")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"position_embedding_type": "learned"},
            r"'position_embedding_type': got 'learned'; expected 'alibi'",
        ),
        ({"activation_function": "gelu"}, r"'activation_function': got 'gelu'; expected 'swiglu'"),
        ({"alibi_scaling": {"type": "linear"}}, r"'alibi_scaling': got .*expected None"),
    ],
)
def test_unsupported_btlm_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config_from_hugging_face({**_BTLM, **changes})

"""Shared fixtures: small configs, a GPT in plain PyTorch to compare with, small transformers models."""

from __future__ import annotations

import math

import pytest
import torch
from flash_attn_models.bert import BertConfig
from flash_attn_models.gpt import GPTConfig
from flash_attn_models.gpt.families import named_config
from flash_attn_models.vit import ViTConfig
from torch.nn import functional as F

# One per architecture option, with sizes that are neither equal to one another nor powers of two.
CONFIGS = {
    "gpt2": GPTConfig(vocab_size=131, max_seqlen=40, n_layer=2, n_head=3, d_model=48),
    "gpt2_untied_mqa": GPTConfig(
        vocab_size=97,
        max_seqlen=40,
        n_layer=2,
        n_head=4,
        n_head_kv=1,
        d_model=32,
        d_inner=72,
        activation="relu",
        tie_embeddings=False,
        qkv_bias=False,
        norm_eps=1e-3,
    ),
    "llama": GPTConfig.llama(
        "tinyllama-1.1b",
        vocab_size=113,
        max_seqlen=40,
        n_layer=2,
        n_head=6,
        n_head_kv=2,
        d_model=48,
        d_inner=88,
    ),
    "llama_interleaved": GPTConfig.llama(
        "llama2-7b",
        vocab_size=113,
        max_seqlen=40,
        n_layer=1,
        n_head=4,
        d_model=48,
        d_inner=40,
        d_head=20,
        rotary_interleaved=True,
        rotary_dim=12,
        rotary_base=500.0,
        tie_embeddings=True,
        mlp_bias=True,
        out_bias=True,
    ),
    "rotary_layer_norm": GPTConfig(
        vocab_size=101,
        max_seqlen=40,
        n_layer=2,
        n_head=2,
        d_model=32,
        position="rotary",
        rotary_dim=6,
        activation="gelu",
        mlp_bias=False,
    ),
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def config(request: pytest.FixtureRequest) -> GPTConfig:
    return request.param


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def _norm(config, weights, name, x):
    weight = weights[f"{name}.weight"]
    if config.norm == "layer_norm":
        return F.layer_norm(x, weight.shape, weight, weights[f"{name}.bias"], config.norm_eps)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.norm_eps) * weight


def _linear(weights, name, x):
    return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def _rotate(config, x):
    """x (B,S,H,D): pair j of the first R dimensions, as a complex number, times exp(i p base^(-2 j / R))."""
    size = config.rotary_dim or config.head_dim
    rotating, rest = x[..., :size], x[..., size:]
    frequencies = config.rotary_base ** (
        -torch.arange(0, size, 2, device=x.device, dtype=torch.float64) / size
    )
    angles = torch.arange(x.shape[1], device=x.device, dtype=torch.float64)[:, None] * frequencies
    # Tables are fp32 in any model: that is part of the definition, and not an error to be measured.
    cos, sin = angles.cos()[:, None].float().to(x.dtype), angles.sin()[:, None].float().to(x.dtype)
    if config.rotary_interleaved:
        a, b = rotating[..., 0::2], rotating[..., 1::2]
        rotated = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
    else:
        a, b = rotating.chunk(2, dim=-1)
        rotated = torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
    return torch.cat([rotated, rest], dim=-1)


def _attention(config, weights, name, x):
    h, hk, d = config.n_head, config.n_head_kv or config.n_head, config.head_dim
    q, k, v = _linear(weights, f"{name}.Wqkv", x).split([h * d, hk * d, hk * d], dim=-1)
    q, k, v = q.unflatten(-1, (h, d)), k.unflatten(-1, (hk, d)), v.unflatten(-1, (hk, d))
    if config.position == "rotary":
        q, k = _rotate(config, q), _rotate(config, k)
    k, v = k.repeat_interleave(h // hk, dim=2), v.repeat_interleave(h // hk, dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(d)
    hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
    probabilities = scores.masked_fill(hidden, -math.inf).softmax(-1)
    return _linear(weights, f"{name}.out_proj", torch.einsum("bhqk,bkhd->bqhd", probabilities, v).flatten(-2))


def _mlp(config, weights, name, x):
    x = _linear(weights, f"{name}.fc1", x)
    if config.activation == "swiglu":
        value, gate = x.chunk(2, dim=-1)
        x = value * F.silu(gate)
    elif config.activation == "gelu_tanh":
        x = F.gelu(x, approximate="tanh")
    else:
        x = {"gelu": F.gelu, "relu": F.relu}[config.activation](x)
    return _linear(weights, f"{name}.fc2", x)


def _plain_gpt(config: GPTConfig, weights: dict[str, torch.Tensor], input_ids: torch.Tensor) -> torch.Tensor:
    """Logits (B,S,V) of the model with this state dict, in the dtype of the weights, without dropout."""
    x = weights["transformer.embeddings.word_embeddings.weight"][input_ids]
    if config.position == "learned":
        x = x + weights["transformer.embeddings.position_embeddings.weight"][: input_ids.shape[1]]
    for layer in range(config.n_layer):
        name = f"transformer.layers.{layer}"
        x = x + _attention(config, weights, f"{name}.mixer", _norm(config, weights, f"{name}.norm1", x))
        x = x + _mlp(config, weights, f"{name}.mlp", _norm(config, weights, f"{name}.norm2", x))
    x = _norm(config, weights, "transformer.ln_f", x)
    head = "transformer.embeddings.word_embeddings" if config.tie_embeddings else "lm_head"
    return F.linear(x, weights[f"{head}.weight"])


@pytest.fixture
def plain_gpt():
    return _plain_gpt


# Several of each family: head ratios, tied or not, biases, odd vocabularies, rotary bases, activations.
HUGGING_FACE = {
    "gpt2": ("gpt2", {}),
    "gpt2_untied_gelu": ("gpt2", {"tie_word_embeddings": False, "activation_function": "gelu", "n_head": 2}),
    "gpt2_relu_wide": ("gpt2", {"activation_function": "relu", "n_inner": 72, "layer_norm_epsilon": 1e-3}),
    "gpt2_tanh_odd_vocab": ("gpt2", {"activation_function": "gelu_pytorch_tanh", "vocab_size": 257}),
    "llama_mha": ("llama", {}),
    "llama_gqa_3": ("llama", {"num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 257}),
    "llama_mqa_tied": ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama_biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_theta_head_dim": (
        "llama",
        {"head_dim": 20, "rope_parameters": {"rope_type": "default", "rope_theta": 300.0}},
    ),
}


def _hugging_face_model(family: str, changes: dict):
    transformers = pytest.importorskip("transformers")
    if family == "gpt2":
        sizes = {
            "vocab_size": 131,
            "n_positions": 64,
            "n_embd": 48,
            "n_layer": 2,
            "n_head": 4,
            "initializer_range": 0.3,
        }
        no_tokens = {"bos_token_id": None, "eos_token_id": None}
        hf_config = transformers.GPT2Config(**{**sizes, **no_tokens, **changes})
        model = transformers.GPT2LMHeadModel(hf_config)
    else:
        sizes = {"vocab_size": 131, "max_position_embeddings": 64, "hidden_size": 48, "intermediate_size": 88}
        depth = {"num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.3}
        no_tokens = {"bos_token_id": None, "eos_token_id": None}
        hf_config = transformers.LlamaConfig(**{**sizes, **depth, **no_tokens, **changes})
        model = transformers.LlamaForCausalLM(hf_config)
    with torch.no_grad():  # norms and biases too, so that swapped or lost ones show
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


@pytest.fixture(params=HUGGING_FACE.values(), ids=HUGGING_FACE.keys())
def hf_model(request: pytest.FixtureRequest):
    """A tiny random transformers model, in evaluation mode."""
    return _hugging_face_model(*request.param)


@pytest.fixture
def make_hf_model():
    return _hugging_face_model


# Tiny models of every family, for tests of how they are spread over ranks.


def _tiny_decoder(name: str, ranks: int) -> GPTConfig:
    """A published size with the same structure but few, odd and uneven sizes, which so many ranks can share."""
    published = named_config(name)
    n_head, n_head_kv = 6, 6
    if published.num_heads_kv == 1:
        n_head_kv = 1
    elif published.num_heads_kv < published.n_head:  # 2 + 1 on two ranks, and one on two of four
        n_head_kv = {4: 2}.get(ranks, 3)
    changes: dict = {
        "vocab_size": 61,
        "max_seqlen": 48,
        "n_layer": 2,
        "n_head": n_head,
        "n_head_kv": n_head_kv,
        "d_head": 8,
        "d_model": 36,
        "d_inner": 42,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if published.rotary_dim is not None:
        changes["rotary_dim"] = 4
    if published.d_embedding is not None:
        changes["d_embedding"] = 20
    if published.window is not None:
        changes |= {"window": 5, "window_first_layer": min(published.window_first_layer, 1)}
    changes |= dict.fromkeys(("dropout", "attn_dropout"), 0.0)
    if published.embedding_dropout is not None:
        changes["embedding_dropout"] = 0.0
    return named_config(name, **changes)


def _tiny_bert(**changes) -> BertConfig:
    sizes = {"vocab_size": 53, "max_seqlen": 24, "n_layer": 2, "n_head": 5, "d_model": 40, "d_inner": 30}
    no_dropout = {"dropout": 0.0, "attn_dropout": 0.0}
    return BertConfig(**{**sizes, **no_dropout, "initializer_range": 0.2, "pad_token_id": 0, **changes})


def _tiny_vit(**changes) -> ViTConfig:
    sizes = {"image_size": 12, "patch_size": 4, "n_layer": 2, "n_head": 5, "d_model": 40, "d_inner": 30}
    return ViTConfig(**{**sizes, "n_classes": 7, "initializer_range": 0.2, **changes})


@pytest.fixture
def tiny_decoder():
    return _tiny_decoder


@pytest.fixture
def tiny_bert():
    return _tiny_bert


@pytest.fixture
def tiny_vit():
    return _tiny_vit

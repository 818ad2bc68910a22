"""Layers on their own: attention, MLPs, embeddings, the pairing of branch and residual in a block."""

from __future__ import annotations

import pytest
import torch
from flash_attn_models.layers import MLP, Block, CausalSelfAttention, GatedMLP, GPTEmbeddings, KVCache
from torch import nn
from torch.nn import functional as F


@pytest.mark.parametrize("n_head_kv", [1, 2, 6])
def test_attention_equals_torch_attention(n_head_kv):
    mixer = CausalSelfAttention(48, 6, n_head_kv=n_head_kv, d_head=10, dtype=torch.float64)
    x = torch.randn(2, 17, 48, dtype=torch.float64)
    q, k, v = mixer.Wqkv(x).split([60, 10 * n_head_kv, 10 * n_head_kv], dim=-1)
    q, k, v = (t.unflatten(-1, (-1, 10)).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(mixer(x), mixer.out_proj(out.transpose(1, 2).flatten(-2)))


def test_attention_dropout_acts_in_training_only():
    mixer = CausalSelfAttention(32, 4, dropout=0.5)
    x = torch.randn(2, 9, 32)
    assert not torch.equal(mixer(x), mixer(x))
    mixer.eval()
    assert torch.equal(mixer(x), mixer(x))


def test_attention_writes_to_its_own_layer_of_the_cache():
    mixer = CausalSelfAttention(32, 4, n_head_kv=2, layer=1)
    cache = KVCache(2, 3, 8, 2, 8)
    for buffer in [*cache.k, *cache.v]:
        buffer.zero_()
    with torch.no_grad():
        mixer(torch.randn(3, 5, 32), cache)
    assert (cache.k[0] == 0).all() and (cache.v[0] == 0).all()
    assert (cache.k[1][:, :5] != 0).all() and (cache.k[1][:, 5:] == 0).all()


@pytest.mark.parametrize(
    ("activation", "function"),
    [("gelu", F.gelu), ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")), ("relu", F.relu)],
)
def test_mlp(activation, function):
    mlp = MLP(8, 20, activation=activation)
    x = torch.randn(3, 5, 8)
    torch.testing.assert_close(mlp(x), mlp.fc2(function(mlp.fc1(x))))


def test_gated_mlp_has_value_first_and_gate_second():
    mlp = GatedMLP(8, 20, bias=False)
    x = torch.randn(3, 5, 8)
    value, gate = x @ mlp.fc1.weight[:20].T, x @ mlp.fc1.weight[20:].T
    torch.testing.assert_close(mlp(x), mlp.fc2(value * torch.sigmoid(gate) * gate))


class PlainNorm(nn.Module):
    """The interface that a block asks of its norms."""

    def forward(self, x, residual=None, prenorm=False):
        total = x if residual is None else x + residual
        return (F.normalize(total, dim=-1), total) if prenorm else F.normalize(total, dim=-1)


class Scale(nn.Linear):
    def forward(self, x, cache=None):
        return super().forward(x)


def test_block_is_two_prenorm_residual_branches():
    block = Block(PlainNorm(), Scale(6, 6), PlainNorm(), nn.Linear(6, 6))
    x = torch.randn(2, 3, 6)
    branch, residual = block(*block(x))
    expected = x
    for _ in range(2):
        expected = expected + block.mixer(F.normalize(expected, dim=-1))
        expected = expected + block.mlp(F.normalize(expected, dim=-1))
    torch.testing.assert_close(branch + residual, expected)


def test_block_dropout_falls_on_both_branches():
    block = Block(PlainNorm(), Scale(6, 6), PlainNorm(), nn.Linear(6, 6), dropout=0.5)
    x = torch.ones(2, 50, 6)
    branch, residual = block(x)
    for dropped in (branch, residual - x):
        assert 0.3 < (dropped == 0).float().mean() < 0.7
    block.eval()
    branch, residual = block(x)
    assert (branch != 0).all() and (residual != x).all()


def test_embeddings_add_positions_from_the_offset():
    embeddings = GPTEmbeddings(11, 4, n_positions=9)
    input_ids = torch.randint(11, (2, 5))
    expected = embeddings.word_embeddings.weight[input_ids] + embeddings.position_embeddings.weight[3:8]
    assert torch.equal(embeddings(input_ids, offset=3), expected)
    without = GPTEmbeddings(11, 4)
    assert torch.equal(without(input_ids, offset=3), without.word_embeddings.weight[input_ids])

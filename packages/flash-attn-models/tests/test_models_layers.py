"""Layers on their own: attention, MLPs, embeddings, the pairing of branch and residual in a block."""

from __future__ import annotations

import pytest
import torch
from flash_attn_models.layers import (
    MLP,
    ALiBi,
    Block,
    CausalSelfAttention,
    CrossAttention,
    DecoderPostNormBlock,
    GatedMLP,
    GPTEmbeddings,
    KVCache,
    ParallelBlock,
)
from flash_attn_models.layers.alibi import alibi_slopes
from flash_attn_models.layers.bidirectional import BidirectionalSelfAttention
from flash_attn_ops.norm import LayerNorm, RMSNorm
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


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("alibi", [False, True])
def test_attention_options_equal_their_definition(cached, window, softcap, alibi):
    scale, slopes = 0.7, torch.tensor(alibi_slopes(6), dtype=torch.float64)
    mixer = CausalSelfAttention(
        48,
        6,
        n_head_kv=2,
        alibi=ALiBi(6) if alibi else None,
        window=window,
        softcap=softcap,
        softmax_scale=scale,
        q_norm=RMSNorm(8, dtype=torch.float64),
        k_norm=RMSNorm(8, dtype=torch.float64),
        dtype=torch.float64,
    )
    nn.init.normal_(mixer.q_norm.weight)
    nn.init.normal_(mixer.k_norm.weight)
    x = torch.randn(2, 17, 48, dtype=torch.float64)
    q, k, v = (t.unflatten(-1, (-1, 8)) for t in mixer.Wqkv(x).split([48, 16, 16], dim=-1))
    q, k = (F.rms_norm(t, (8,), norm.weight, 1e-5) for t, norm in ((q, mixer.q_norm), (k, mixer.k_norm)))
    k, v = k.repeat_interleave(3, dim=2), v.repeat_interleave(3, dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    scores = softcap * (scores / softcap).tanh() if softcap else scores
    distance = torch.arange(17)[:, None] - torch.arange(17)
    scores = scores - slopes[:, None, None] * distance if alibi else scores
    visible = (distance >= 0) & (distance < (17 if window is None else window))
    probabilities = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    expected = mixer.out_proj(torch.einsum("bhqk,bkhd->bqhd", probabilities, v).flatten(2))
    if not cached:
        torch.testing.assert_close(mixer(x), expected)
        return
    cache = KVCache(1, 2, 17, 2, 8, dtype=torch.float64)
    pieces = []
    for part in x.split([9, 1, 7], dim=1):
        with torch.no_grad():
            pieces.append(mixer(part, cache))
        cache.advance(part.shape[1])
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected)


@pytest.mark.parametrize("layer", [CausalSelfAttention, CrossAttention])
@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((32, 3), "d_model: got 32; expected a multiple of n_head=3"),
        ((32, 0), "n_head: got 0; expected at least 1"),
        ((32, 4, 3), "n_head_kv: got 3; expected a divisor of n_head=4"),
        ((32, 4, 0), "n_head_kv: got 0; expected a divisor of n_head=4"),
    ],
)
def test_heads_that_cannot_be_are_refused(layer, sizes, message):
    d_model, n_head, *n_head_kv = sizes
    with pytest.raises(ValueError, match=message):
        layer(d_model, n_head, n_head_kv=n_head_kv[0] if n_head_kv else None)
    if n_head_kv == []:
        with pytest.raises(ValueError, match=message):
            BidirectionalSelfAttention(d_model, n_head)
    assert layer(30, 3, n_head_kv=1).out_proj.in_features == 30
    assert layer(32, 3, d_head=4).out_proj.in_features == 12


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_of_nothing_is_refused(window):
    with pytest.raises(ValueError, match=f"window: got {window}; expected at least 1 token, or None"):
        CausalSelfAttention(32, 4, window=window)


def test_alibi_slopes():
    assert alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(1) == [2.0**-8]
    assert alibi_slopes(6) == [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]
    scaled = ALiBi(4, scale=0.5).slopes(torch.device("cpu"))
    assert scaled.tolist() == [0.5 * slope for slope in alibi_slopes(4)] and scaled.dtype == torch.float32


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


@pytest.mark.parametrize("norm", [LayerNorm, RMSNorm])
@pytest.mark.parametrize("tied", [False, True])
def test_parallel_block_adds_two_branches_of_one_input(norm, tied):
    norm1, norm2 = norm(6), None if tied else norm(6)
    for module in (norm1, norm2):
        if module is not None:
            nn.init.normal_(module.weight)
    block = ParallelBlock(norm1, Scale(6, 6), norm2, nn.Linear(6, 6))
    x = torch.randn(2, 3, 6, requires_grad=True)
    branch, other, residual = block(*block(x))
    expected = x
    for _ in range(2):
        mlp_input = (norm2 or norm1)(expected)
        expected = expected + block.mixer(norm1(expected)) + block.mlp(mlp_input)
    torch.testing.assert_close(branch + other + residual, expected)
    weights = torch.randn(2, 3, 6)
    parameters = [x, *block.parameters()]
    grads = torch.autograd.grad(((branch + other + residual) * weights).sum(), parameters)
    for ours, theirs in zip(grads, torch.autograd.grad((expected * weights).sum(), parameters), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_parallel_block_dropout_falls_on_both_branches():
    block = ParallelBlock(LayerNorm(6), Scale(6, 6), None, nn.Linear(6, 6), dropout=0.5)
    x = torch.randn(2, 50, 6)
    for dropped in block(x)[:2]:
        assert 0.3 < (dropped == 0).float().mean() < 0.7
    block.eval()
    assert all((branch != 0).all() for branch in block(x)[:2])


def test_post_norm_block_normalises_the_stream_after_each_branch():
    block = DecoderPostNormBlock(LayerNorm(6), Scale(6, 6), RMSNorm(6), nn.Linear(6, 6), dropout=0.5)
    x = torch.randn(2, 3, 6)
    assert not torch.equal(block(x)[0], block(x)[0])
    block.eval()
    middle = block.norm1(x + block.mixer(x))
    (out,) = block(x)
    torch.testing.assert_close(out, block.norm2(middle + block.mlp(middle)))


def test_embeddings_of_another_width_are_projected_and_scaled():
    embeddings = GPTEmbeddings(11, 4, n_positions=9, position_offset=2, d_embedding=3, scale=2.5)
    input_ids = torch.randint(11, (2, 5))
    projected = embeddings.word_embeddings.weight[input_ids] @ embeddings.project_in.weight.T
    assert embeddings.position_embeddings.weight.shape == (11, 4)
    torch.testing.assert_close(
        embeddings(input_ids, offset=3), 2.5 * projected + embeddings.position_embeddings.weight[5:10]
    )


def test_embeddings_add_positions_from_the_offset():
    embeddings = GPTEmbeddings(11, 4, n_positions=9)
    input_ids = torch.randint(11, (2, 5))
    expected = embeddings.word_embeddings.weight[input_ids] + embeddings.position_embeddings.weight[3:8]
    assert torch.equal(embeddings(input_ids, offset=3), expected)
    without = GPTEmbeddings(11, 4)
    assert torch.equal(without(input_ids, offset=3), without.word_embeddings.weight[input_ids])

"""Cross-attention against its definition, written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
from flash_attn_models.layers import CrossAttention, ProjectedContext
from flash_attn_ops.rotary import RotaryEmbedding
from torch import nn

D_MODEL, D_CONTEXT, HEADS, D_HEAD = 24, 20, 4, 6


def make(**options):
    layer = CrossAttention(D_MODEL, HEADS, d_context=D_CONTEXT, dtype=torch.float64, **options)
    if layer.sinks is not None:
        nn.init.normal_(layer.sinks)
    return layer


def rotated(heads, base=10000.0):
    """heads (B,S,H,D) by their positions, halves paired."""
    size = heads.shape[-1]
    frequencies = base ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angles = torch.arange(heads.shape[1], dtype=torch.float64)[:, None] * frequencies
    cos, sin = angles.cos().float().double()[:, None], angles.sin().float().double()[:, None]
    a, b = heads.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def definition(layer, x, context, mask=None):
    """Every step spelt out; what sees nothing gets 0 before the last projection."""
    q = (x @ layer.Wq.weight.T + layer.Wq.bias).unflatten(-1, (HEADS, D_HEAD))
    kv = context @ layer.Wkv.weight.T + layer.Wkv.bias
    k, v = (t.unflatten(-1, (-1, D_HEAD)) for t in kv.chunk(2, dim=-1))
    if layer.rotary is not None:
        q, k = rotated(q), rotated(k)
    k, v = (t.repeat_interleave(HEADS // layer.n_head_kv, dim=2) for t in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (layer.softmax_scale or 1 / math.sqrt(D_HEAD))
    if layer.softcap:
        scores = layer.softcap * (scores / layer.softcap).tanh()
    seqlen_q, seqlen_k = scores.shape[-2:]
    distance = torch.arange(seqlen_k) - torch.arange(seqlen_q)[:, None] - (seqlen_k - seqlen_q)
    left, right = layer.window_size
    right = 0 if layer.causal else right
    visible = (distance >= (-left if left >= 0 else -999)) & (distance <= (right if right >= 0 else 999))
    visible = visible if mask is None else visible & mask[:, None, None]
    weights = scores.exp() * visible
    sink = 0.0 if layer.sinks is None else layer.sinks.exp()[:, None, None]
    total = weights.sum(-1, keepdim=True) + sink
    weights = weights / torch.where(total == 0, 1.0, total)
    out = torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)
    return out @ layer.out_proj.weight.T + layer.out_proj.bias


def inputs(batch=2, seqlen=5, length=7):
    x = torch.randn(batch, seqlen, D_MODEL, dtype=torch.float64, requires_grad=True)
    context = torch.randn(batch, length, D_CONTEXT, dtype=torch.float64, requires_grad=True)
    return x, context


def assert_same_with_gradients(ours, theirs, tensors):
    torch.testing.assert_close(ours, theirs)
    weights = torch.randn_like(ours)
    expected = torch.autograd.grad((theirs * weights).sum(), tensors, retain_graph=True)
    for got, want in zip(torch.autograd.grad((ours * weights).sum(), tensors), expected, strict=True):
        torch.testing.assert_close(got, want)


OPTIONS = {
    "plain": {},
    "mqa": {"n_head_kv": 1},
    "gqa_softcap": {"n_head_kv": 2, "softcap": 0.7},
    "causal": {"causal": True},
    "window": {"window_size": (1, 2)},
    "sinks_scale": {"sinks": True, "softmax_scale": 0.9},
    "rotary": {"rotary": True, "n_head_kv": 2},
}


def made(name):
    options = dict(OPTIONS[name])
    if options.pop("rotary", False):
        options["rotary"] = RotaryEmbedding(D_HEAD)
    return make(**options)


@pytest.mark.parametrize("seqlen", [1, 5, 9])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_equals_its_definition_with_gradients(name, masked, seqlen):
    layer = made(name)
    x, context = inputs(seqlen=seqlen)
    mask = torch.arange(7) < torch.tensor([[4], [7]]) if masked else None
    ours = layer(x, context, key_padding_mask=mask)
    assert_same_with_gradients(ours, definition(layer, x, context, mask), [x, context, *layer.parameters()])


def test_plain_equals_multihead_attention_of_torch():
    layer = made("plain")
    theirs = nn.MultiheadAttention(
        D_MODEL, HEADS, kdim=D_CONTEXT, vdim=D_CONTEXT, batch_first=True, dtype=torch.float64
    )
    k, v = layer.Wkv.weight.chunk(2)
    with torch.no_grad():
        theirs.q_proj_weight.copy_(layer.Wq.weight)
        theirs.k_proj_weight.copy_(k)
        theirs.v_proj_weight.copy_(v)
        theirs.in_proj_bias.copy_(torch.cat([layer.Wq.bias, layer.Wkv.bias]))
        theirs.out_proj.load_state_dict(layer.out_proj.state_dict())
    x, context = inputs()
    mask = torch.arange(7) < torch.tensor([[4], [7]])
    expected, _ = theirs(x, context, context, key_padding_mask=~mask)
    torch.testing.assert_close(layer(x, context, key_padding_mask=mask), expected)


def test_a_token_that_sees_nothing_gets_the_bias():
    layer = made("plain")
    x, context = inputs()
    out = layer(x, context, key_padding_mask=torch.zeros(2, 7, dtype=torch.bool))
    torch.testing.assert_close(out, layer.out_proj.bias.expand_as(out))


@pytest.mark.parametrize("name", OPTIONS)
def test_packed_sequences_equal_separate_ones(name):
    layer = made(name)
    lengths, of_context = [3, 1, 4], [5, 2, 4]
    xs = [torch.randn(n, D_MODEL, dtype=torch.float64) for n in lengths]
    contexts = [torch.randn(n, D_CONTEXT, dtype=torch.float64) for n in of_context]
    out = layer(
        torch.cat(xs),
        torch.cat(contexts),
        cu_seqlens=torch.tensor([0, 3, 4, 8], dtype=torch.int32),
        max_seqlen=4,
        cu_seqlens_context=torch.tensor([0, 5, 7, 11], dtype=torch.int32),
        max_seqlen_context=5,
    )
    apart = [layer(x[None], context[None])[0] for x, context in zip(xs, contexts, strict=True)]
    torch.testing.assert_close(out, torch.cat(apart))


@torch.no_grad()
@pytest.mark.parametrize("name", ["plain", "gqa_softcap", "sinks_scale", "rotary"])
def test_a_projected_context_serves_one_token_after_the_other(name):
    layer = made(name)
    x, context = inputs()
    mask = torch.arange(7) < torch.tensor([[4], [7]])
    projected = layer.project(context, key_padding_mask=mask)
    whole = layer(x, context, key_padding_mask=mask)
    steps = [layer(x[:, i : i + 1], projected, offset=i) for i in range(5)]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole)
    first = torch.tensor([2, 0])
    rows = torch.stack([x[0, 2:4], x[1, :2]])
    later = layer(rows, projected, offset=first, max_seqlen=5)
    torch.testing.assert_close(later, torch.stack([whole[0, 2:4], whole[1, :2]]))


def test_dropout_acts_in_training_only():
    layer = make(dropout=0.5)
    x, context = inputs()
    assert not torch.equal(layer(x, context), layer(x, context))
    layer.eval()
    assert torch.equal(layer(x, context), layer(x, context))


CU = torch.tensor([0, 5, 10], dtype=torch.int32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(2, 5, 23)}, r"x: got shape \(2, 5, 23\); expected \(batch, seqlen, 24\)"),
        ({"context": torch.zeros(7, 20)}, r"context: got shape \(7, 20\); expected \(batch, seqlen, 20\)"),
        ({"x": torch.zeros(10, 24), "cu_seqlens": CU}, "got a packed x and a padded context"),
        ({"cu_seqlens": CU}, r"x: got shape \(2, 5, 24\); expected \(tokens, 24\), since"),
        (
            {
                "context": torch.zeros(10, 20),
                "cu_seqlens_context": CU,
                "key_padding_mask": torch.ones(2, 5, dtype=torch.bool),
            },
            "key_padding_mask: got a mask beside packed contexts",
        ),
        (
            {
                "context": ProjectedContext(torch.zeros(2, 7, 4, 6), torch.zeros(2, 7, 4, 6)),
                "key_padding_mask": torch.ones(2, 7, dtype=torch.bool),
            },
            "context: got a ProjectedContext beside the mask",
        ),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    layer = CrossAttention(D_MODEL, HEADS, d_context=D_CONTEXT)
    given = {"x": torch.zeros(2, 5, 24), "context": torch.zeros(2, 7, 20), **arguments}
    with pytest.raises(ValueError, match=message):
        layer(given.pop("x"), given.pop("context"), **given)


def test_a_causal_layer_refuses_a_projected_context():
    layer = make(causal=True)
    x, context = inputs()
    with pytest.raises(ValueError, match=r"context: got a ProjectedContext, with causal=True"):
        layer(x, layer.project(context))


def test_lengths_of_padded_tokens_are_no_more_than_a_hint():
    layer = made("rotary")
    x, context = inputs()
    hinted = made("rotary")
    hinted.load_state_dict(layer.state_dict())
    for hint in (3, 5, 90):
        got = hinted(x, context, offset=40, max_seqlen=hint, max_seqlen_context=hint)
        assert torch.equal(got, layer(x, context, offset=40))


def test_rotary_needs_the_length_of_what_only_the_device_knows():
    layer = made("rotary")
    x, context = inputs()
    with pytest.raises(ValueError, match=r"max_seqlen: got None; expected how many positions"):
        layer(x, context, offset=torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"n_head_kv": 3}, "n_head_kv: got 3"), ({"d_model": 25}, "d_model: got 25; expected a multiple")],
)
def test_heads_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        CrossAttention(**{"d_model": 24, "n_head": 4, **arguments})

"""Attention sinks, and the depthwise convolution over queries, keys and values in training and generation."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from flash_attn_models import generate
from flash_attn_models.attention import attention_path
from flash_attn_models.generation.paged_cache import PagedKVCache, PagePool
from flash_attn_models.gpt import GPTConfig, GPTLMHeadModel
from flash_attn_models.gpt.hugging_face import config_to_hugging_face
from flash_attn_models.layers import CausalDepthwiseConv, CausalSelfAttention, KVCache
from torch import nn
from torch.nn import functional as F

LLAMA = GPTConfig.llama(
    vocab_size=61,
    max_seqlen=160,
    n_layer=2,
    n_head=4,
    n_head_kv=2,
    d_model=32,
    d_inner=40,
    initializer_range=0.3,
)
OPTIONS = {
    "sinks": dataclasses.replace(LLAMA, sinks=True),
    "sinks_alibi": dataclasses.replace(LLAMA, position="alibi", sinks=True, rotary_base=10000.0),
    "conv": dataclasses.replace(LLAMA, conv_width=3),
    "conv4_sinks_learned": GPTConfig(
        vocab_size=61, max_seqlen=160, n_layer=2, n_head=3, d_model=24, conv_width=4, sinks=True, window=9
    ),
    "conv_parallel": dataclasses.replace(LLAMA, conv_width=3, parallel_block=True, tied_norm=True),
}


def randomized(model):
    """Every sink and tap random, so that none can be forgotten unnoticed."""
    for module in model.modules():
        if isinstance(module, CausalDepthwiseConv):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
        if isinstance(module, CausalSelfAttention) and module.sinks is not None:
            nn.init.normal_(module.sinks)
    return model


def convolved(x, weight, bias):
    """x (B,S,C): the sum over taps, written out."""
    width = weight.shape[-1]
    padded = F.pad(x, (0, 0, width - 1, 0))
    return bias + sum(weight[:, 0, tap] * padded[:, tap : tap + x.shape[1]] for tap in range(width))


@pytest.mark.parametrize("cached", [False, True])
def test_sinks_equal_their_definition(cached):
    mixer = randomized(CausalSelfAttention(48, 6, n_head_kv=2, sinks=True, dtype=torch.float64))
    x = torch.randn(2, 17, 48, dtype=torch.float64)
    q, k, v = (t.unflatten(-1, (-1, 8)) for t in mixer.Wqkv(x).split([48, 16, 16], dim=-1))
    k, v = k.repeat_interleave(3, dim=2), v.repeat_interleave(3, dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 8**0.5
    scores = scores.masked_fill(torch.ones(17, 17, dtype=torch.bool).triu(1), -torch.inf)
    sink = mixer.sinks[:, None, None].expand(2, 6, 17, 1)
    probabilities = torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]
    expected = mixer.out_proj(torch.einsum("bhqk,bkhd->bqhd", probabilities, v).flatten(2))
    if cached:
        cache = KVCache(1, 2, 17, 2, 8, dtype=torch.float64)
        pieces = []
        for part in x.split([9, 1, 7], dim=1):
            with torch.no_grad():
                pieces.append(mixer(part, cache))
            cache.advance(part.shape[1])
        torch.testing.assert_close(torch.cat(pieces, dim=1), expected)
        return
    out = mixer(x)
    torch.testing.assert_close(out, expected)
    parameters, weights = list(mixer.parameters()), torch.randn_like(out)
    wanted = torch.autograd.grad((expected * weights).sum(), parameters)
    for ours, theirs in zip(torch.autograd.grad((out * weights).sum(), parameters), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("width", [2, 3, 5])
def test_convolution_equals_its_definition_with_gradients(width):
    conv = randomized(CausalDepthwiseConv(7, width, dtype=torch.float64))
    for seqlen in (0, 1, 2, 11):
        x = torch.randn(2, seqlen, 7, dtype=torch.float64, requires_grad=True)
        out, expected = conv(x), convolved(x, conv.weight, conv.bias)
        torch.testing.assert_close(out, expected)
        weights, tensors = torch.randn_like(out), [x, conv.weight, conv.bias]
        wanted = torch.autograd.grad((expected * weights).sum(), tensors)
        for ours, theirs in zip(torch.autograd.grad((out * weights).sum(), tensors), wanted, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_convolution_starts_as_the_identity():
    plain, conv = GPTLMHeadModel(LLAMA), GPTLMHeadModel(OPTIONS["conv"])
    names = conv.load_state_dict(plain.state_dict(), strict=False)
    assert not names.unexpected_keys and all(".dwconv." in name for name in names.missing_keys)
    input_ids = torch.randint(61, (2, 9))
    torch.testing.assert_close(conv(input_ids), plain(input_ids))
    randomized(conv).reset_parameters()
    dwconv = conv.transformer.layers[1].mixer.dwconv
    assert (dwconv.weight[..., -1] == 1).all() and (dwconv.weight[..., :-1] == 0).all()
    assert conv.transformer.layers[0].mixer.dwconv.weight.shape == ((4 + 2 + 2) * 8, 1, 3)


@torch.no_grad()
@pytest.mark.parametrize("parts", [[150], [1] * 20, [2, 1, 1, 3], [70, 1, 1, 65, 1], [62, 63, 64 - 62, 1]])
@pytest.mark.parametrize("name", OPTIONS)
def test_decoding_in_parts_equals_one_pass(name, parts):
    model = randomized(GPTLMHeadModel(OPTIONS[name], dtype=torch.float64)).eval()
    input_ids = torch.randint(61, (2, sum(parts)))
    config = model.config
    cache = KVCache(2, 2, 160, config.num_heads_kv, config.head_dim, dtype=torch.float64)
    cached = torch.cat([model(part, cache=cache) for part in input_ids.split(parts, dim=1)], dim=1)
    torch.testing.assert_close(cached, model(input_ids))
    cache.reset()
    torch.testing.assert_close(model(input_ids, cache=cache), cached)


@torch.no_grad()
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("seqlen", [12, 100])
@pytest.mark.parametrize("name", ["conv", "conv4_sinks_learned"])
def test_sequences_of_different_lengths_continue_as_if_alone(name, seqlen, paged):
    model = randomized(GPTLMHeadModel(OPTIONS[name], dtype=torch.float64)).eval()
    config, lengths = model.config, [seqlen, seqlen // 3, 1, seqlen - 2]
    sizes = (config.num_heads_kv, config.head_dim)
    if paged:
        cache = PagedKVCache(PagePool(2, 60, 16, *sizes, dtype=torch.float64), [n + 20 for n in lengths])
    else:
        cache = KVCache(2, 4, 160, *sizes, dtype=torch.float64)
    prompts = torch.randint(61, (4, seqlen))
    model(prompts, cache=cache, seqlens=torch.tensor(lengths))
    news, seqlens = torch.randint(61, (4, 5)), torch.tensor([3, 5, 1, 2])
    whole = model(news, cache=cache, seqlens=seqlens)
    last = model(news[:, :1], cache=cache)
    for row, (length, new) in enumerate(zip(lengths, seqlens.tolist(), strict=True)):
        tokens = torch.cat([prompts[row, :length], news[row, :new], news[row, :1]])
        alone = model(tokens[None])[0]
        torch.testing.assert_close(whole[row, :new], alone[length : length + new])
        torch.testing.assert_close(last[row, 0], alone[-1])


@torch.no_grad()
@pytest.mark.parametrize("back", [1, 4, 62])
def test_up_to_62_tokens_may_be_taken_back(back):
    model = randomized(GPTLMHeadModel(OPTIONS["conv"], dtype=torch.float64)).eval()
    cache = KVCache(2, 2, 160, 2, 8, dtype=torch.float64)
    input_ids = torch.randint(61, (2, 26))
    model(input_ids[:, :20], cache=cache)
    model(torch.randint(61, (2, back)), cache=cache)
    cache.lengths -= back
    cache.length -= back
    torch.testing.assert_close(model(input_ids[:, 20:], cache=cache), model(input_ids)[:, 20:])


@torch.no_grad()
def test_a_cache_refuses_to_forget_more_than_the_convolution_can():
    model = randomized(GPTLMHeadModel(OPTIONS["conv"], dtype=torch.float64)).eval()
    cache = KVCache(2, 2, 160, 2, 8, dtype=torch.float64)
    input_ids = torch.randint(61, (2, 150))
    model(input_ids[:, :120], cache=cache, seqlens=torch.tensor([120, 40]))
    with pytest.raises(
        ValueError, match=r"lengths: got \[57, 40\] after \[120, 40\] tokens; expected at most 62 less, or 0"
    ):
        cache.truncate([57, 40])
    assert cache.length == 120 and cache.lengths.tolist() == [120, 40]
    cache.truncate([58, 0])
    logits = model(input_ids[:, :9], cache=cache)
    whole = torch.cat([input_ids[:1, :58], input_ids[:1, :9]], dim=1)
    torch.testing.assert_close(logits[0], model(whole)[0, 58:])
    torch.testing.assert_close(logits[1], model(input_ids[1:, :9])[0])


@torch.no_grad()
@pytest.mark.parametrize("name", OPTIONS)
def test_greedy_generation_equals_one_pass_per_token(name):
    model = randomized(GPTLMHeadModel(OPTIONS[name], dtype=torch.float64)).eval()
    prompt = torch.randint(61, (2, 7))
    expected = prompt
    for _ in range(8):
        expected = torch.cat([expected, model(expected)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generate(model, prompt, 8), expected)
    assert torch.equal(generate(model, prompt, 8, cache="paged", page_size=4), expected)


def test_a_state_made_in_inference_mode_serves_no_grad_too():
    model = GPTLMHeadModel(OPTIONS["conv"]).eval()
    cache = KVCache(2, 2, 40, 2, 8)
    input_ids = torch.randint(61, (2, 9))
    with torch.inference_mode():
        model(input_ids, cache=cache)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids, cache=cache), model(input_ids.repeat(1, 2))[:, 9:])


@pytest.mark.parametrize("field", ["sinks", "conv_width"])
def test_no_hugging_face_model_has_them(field):
    value = True if field == "sinks" else 3
    with pytest.raises(ValueError, match=f"config: got {field}={value}"):
        config_to_hugging_face(dataclasses.replace(LLAMA, **{field: value}))


@pytest.mark.parametrize("width", [1, 0, 2.5])
def test_widths_that_make_no_convolution(width):
    with pytest.raises(ValueError, match=rf"GPTConfig.conv_width: got {width}"):
        dataclasses.replace(LLAMA, conv_width=width)
    if width == 1:
        with pytest.raises(ValueError, match="width: got 1; expected at least 2 tokens"):
            CausalDepthwiseConv(8, width)


def test_the_path_of_attention_is_that_with_sinks():
    path = attention_path(OPTIONS["sinks"], seqlen=64, device="cpu", dtype=torch.float32)
    assert path.path == "portable"


@torch.no_grad()
@pytest.mark.parametrize("cache", ["contiguous", "paged"])
def test_drafts_that_are_refused_leave_no_trace_in_the_convolution(cache):
    model, draft = (randomized(GPTLMHeadModel(OPTIONS["conv"], dtype=torch.float64)).eval() for _ in range(2))
    prompts, mask = torch.randint(61, (3, 7)), torch.arange(7) < torch.tensor([[7], [3], [1]])
    expected = generate(model, prompts, 8, attention_mask=mask)
    assert torch.equal(
        generate(model, prompts, 8, attention_mask=mask, draft=draft, lookahead=3, cache=cache), expected
    )
    with pytest.raises(ValueError, match="lookahead: got 62; expected less than 62 tokens"):
        generate(model, prompts, 8, draft=draft, lookahead=62)

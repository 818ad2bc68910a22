"""The key/value cache, and that a model with one computes what it computes without."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from flash_attn_models.generation import KVCache, make_cache
from flash_attn_models.gpt import GPTConfig, GPTLMHeadModel
from flash_attn_models.layers import CausalSelfAttention
from flash_attn_ops.rotary import RotaryEmbedding


@pytest.mark.parametrize("splits", [[1] * 12, [5, 1, 1, 5], [7, 5], [12]], ids=str)
@torch.no_grad()
def test_logits_with_cache_equal_those_without(config, splits):
    model = GPTLMHeadModel(dataclasses.replace(config, initializer_range=0.2), dtype=torch.float64).eval()
    input_ids = torch.randint(config.vocab_size, (3, 12))
    cache = make_cache(model, 3, 20)
    logits = torch.cat([model(part, cache=cache) for part in input_ids.split(splits, dim=1)], dim=1)
    assert cache.length == 12
    torch.testing.assert_close(logits, model(input_ids), rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_what_lies_beyond_the_length_changes_nothing(config):
    model = GPTLMHeadModel(config).eval()
    input_ids = torch.randint(config.vocab_size, (2, 9))
    cache = make_cache(model, 2, 16)
    for buffer in [*cache.k, *cache.v]:
        buffer.fill_(torch.nan)
    logits = torch.cat([model(input_ids[:, :6], cache=cache), model(input_ids[:, 6:], cache=cache)], dim=1)
    torch.testing.assert_close(logits, model(input_ids))


@torch.no_grad()
def test_reset_starts_again(config):
    model = GPTLMHeadModel(config).eval()
    input_ids = torch.randint(config.vocab_size, (2, 9))
    cache = make_cache(model, 2, 9)
    model(input_ids.flip(1), cache=cache)
    cache.reset()
    logits = model(input_ids, cache=cache)
    assert torch.equal(logits, model(input_ids, cache=make_cache(model, 2, 9)))
    torch.testing.assert_close(logits, model(input_ids))


def test_buffers_fit_the_model(config):
    model = GPTLMHeadModel(config, dtype=torch.float16)
    cache = make_cache(model, 2, 9)
    assert len(cache.k) == len(cache.v) == config.n_layer
    for buffer in [*cache.k, *cache.v]:
        assert buffer.shape == (2, 9, config.num_heads_kv, config.head_dim)
        assert buffer.dtype == torch.float16
        assert buffer.is_contiguous()


@torch.no_grad()
def test_under_autocast_the_cache_has_its_dtype(config):
    model = GPTLMHeadModel(config).eval()
    input_ids = torch.randint(config.vocab_size, (2, 9))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache = make_cache(model, 2, 9)
        assert cache.k[0].dtype == torch.bfloat16
        cached = torch.cat(
            [model(input_ids[:, :5], cache=cache), model(input_ids[:, 5:], cache=cache)], dim=1
        )
        torch.testing.assert_close(cached, model(input_ids))


def test_update_appends_and_counts_only_when_told():
    cache = KVCache(2, 3, 8, 2, 4)
    k, v = torch.randn(2, 3, 5, 2, 4)
    assert all(torch.equal(got, given) for got, given in zip(cache.update(1, k, v), (k, v), strict=True))
    assert cache.length == 0
    cache.update(0, v, k)
    cache.advance(5)
    more_k, more_v = torch.randn(2, 3, 3, 2, 4)
    all_k, all_v = cache.update(1, more_k, more_v)
    assert torch.equal(all_k, torch.cat([k, more_k], dim=1))
    assert torch.equal(all_v, torch.cat([v, more_v], dim=1))
    assert torch.equal(cache.k[0][:, :5], v)


def test_misuse_is_refused():
    cache = KVCache(1, 3, 8, 2, 4)
    with pytest.raises(
        ValueError, match=r"cache: got 9 more tokens with 0 of 8 .*expected at most 8 more.*reset\(\)"
    ):
        cache.update(0, torch.zeros(3, 9, 2, 4), torch.zeros(3, 9, 2, 4))
    cache.advance(6)
    with pytest.raises(
        ValueError, match=r"3 more tokens with 6 of 8 .*at most 2 more.*max_seqlen of at least 9"
    ):
        cache.check_room(3, 3)
    with pytest.raises(
        ValueError, match=r"cache: got a cache of 3 sequences for a batch of 2; expected equal batch sizes"
    ):
        cache.check_room(2, 1)
    with pytest.raises(
        ValueError, match=r"a cache of torch.float32 for keys of torch.bfloat16.*dtype=torch.bfloat16"
    ):
        cache.update(0, torch.zeros(3, 1, 2, 4).bfloat16(), torch.zeros(3, 1, 2, 4).bfloat16())
    with pytest.raises(
        ValueError, match=r"KVCache: got n_layer=1, .*\(3, 0, 2, 4\); expected sizes of at least 1"
    ):
        KVCache(1, 3, 0, 2, 4)


@pytest.mark.parametrize("n_layer", [1, 3])
def test_a_cache_of_another_model_is_refused(n_layer):
    model = GPTLMHeadModel(GPTConfig(vocab_size=9, max_seqlen=8, n_layer=2, n_head=2, d_model=8)).eval()
    input_ids = torch.zeros(1, 3, dtype=torch.long)
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=rf"cache: got a cache of {n_layer} layers; expected 2, the model's"),
    ):
        model(input_ids, cache=KVCache(n_layer, 1, 8, 2, 4))
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match="cache: got device meta; expected the model's device cpu"),
    ):
        model(input_ids, cache=KVCache(2, 1, 8, 2, 4, device="meta"))


def test_overflow_leaves_the_cache_as_it_was(config):
    model = GPTLMHeadModel(config).eval()
    cache = make_cache(model, 1, 6)
    input_ids = torch.randint(config.vocab_size, (1, 8))
    with torch.no_grad():
        model(input_ids[:, :4], cache=cache)
        with pytest.raises(ValueError, match="4 more tokens with 4 of 6 positions in use"):
            model(input_ids[:, 4:], cache=cache)
        logits = model(input_ids[:, 4:6], cache=cache)
        torch.testing.assert_close(logits, model(input_ids[:, :6])[:, 4:])


@torch.no_grad()
@pytest.mark.parametrize("scale_base", [None, 16.0], ids=["rotary", "xpos"])
def test_rotary_positions_of_keys_in_the_cache(scale_base):
    """Also with XPos, whose keys have tables of their own."""
    rotary = RotaryEmbedding(8, scale_base=scale_base)
    mixer = CausalSelfAttention(32, 4, n_head_kv=2, rotary=rotary, dtype=torch.float64)
    x = torch.randn(2, 11, 32, dtype=torch.float64)
    cache = KVCache(1, 2, 16, 2, 8, dtype=torch.float64)
    pieces = []
    for part in x.split([4, 1, 6], dim=1):
        pieces.append(mixer(part, cache))
        cache.advance(part.shape[1])
    torch.testing.assert_close(torch.cat(pieces, dim=1), mixer(x), rtol=1e-10, atol=1e-10)

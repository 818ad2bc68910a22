"""The paged cache: the tokens of the contiguous one, as many pages as are needed, all given back."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from flash_attn_models.generation import (
    PagedKVCache,
    PagePool,
    generate,
    make_cache,
    make_page_pool,
    stream_tokens,
)
from flash_attn_models.gpt import GPTLMHeadModel

LENGTHS = [9, 2, 5]


@pytest.fixture
def model(config):
    return GPTLMHeadModel(dataclasses.replace(config, initializer_range=0.3)).eval()


def prompt(model, batch=3, seqlen=9):
    return torch.randint(model.config.vocab_size, (batch, seqlen))


@pytest.mark.parametrize("page_size", [1, 3, 16, 100, None])
def test_tokens_are_those_of_the_contiguous_cache(model, page_size):
    input_ids = prompt(model)
    for options in ({}, {"prompt_lengths": LENGTHS}):
        expected = generate(model, input_ids, 20, **options)
        paged = generate(model, input_ids, 20, **options, cache="paged", page_size=page_size)
        assert torch.equal(paged, expected)


def test_a_pool_is_shared_and_gets_everything_back(model):
    input_ids = prompt(model)
    expected = generate(model, input_ids, 20, prompt_lengths=LENGTHS)
    # 28, 21 and 24 tokens: the last one of each is never fed back.
    pool = make_page_pool(model, n_pages=7 + 6 + 6, page_size=4)
    for buffer in [*pool.k, *pool.v]:
        buffer.fill_(torch.nan)  # what is not a sequence's own must not be read
    for _ in range(3):
        assert torch.equal(generate(model, input_ids, 20, prompt_lengths=LENGTHS, cache=pool), expected)
        assert pool.n_free == 19


def test_sequences_in_one_pool_do_not_touch_each_other(model):
    input_ids = prompt(model)
    pool = make_page_pool(model, n_pages=40, page_size=4)
    streams = [stream_tokens(model, row[None], 15, cache=pool) for row in input_ids]
    columns = [torch.cat(column) for column in zip(*streams, strict=True)]
    assert torch.equal(torch.stack(columns, dim=1), generate(model, input_ids, 15)[:, 9:])
    assert pool.n_free == 40


def test_pages_come_back_from_a_stream_that_is_left_early(model):
    pool = make_page_pool(model, n_pages=40, page_size=4)
    stream = stream_tokens(model, prompt(model), 15, cache=pool)
    assert pool.n_free == 40
    next(stream)
    assert pool.n_free == 40 - 3 * 6
    stream.close()
    assert pool.n_free == 40


def test_pages_come_back_from_a_failing_model(model):
    pool = make_page_pool(model, n_pages=40, page_size=4)
    handle = model.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(model, prompt(model), 15, cache=pool)
    handle.remove()
    assert pool.n_free == 40


@torch.no_grad()
def test_logits_equal_those_without_cache(config):
    model = GPTLMHeadModel(dataclasses.replace(config, initializer_range=0.2), dtype=torch.float64).eval()
    input_ids = torch.randint(config.vocab_size, (3, 12))
    pool = make_page_pool(model, 12, 5)
    PagedKVCache(pool, [11])  # so that pages are not in the order of positions from 0
    cache = PagedKVCache(pool, [12, 14, 12])
    logits = torch.cat([model(part, cache=cache) for part in input_ids.split([5, 1, 6], dim=1)], dim=1)
    torch.testing.assert_close(logits, model(input_ids), rtol=1e-10, atol=1e-10)
    assert pool.n_free == 0
    with pytest.raises(ValueError, match=r"cache: got 3 more tokens with 12 of 14 positions in use"):
        model(input_ids[:, :3], cache=cache)
    cache.free()
    cache.free()
    assert pool.n_free == 9


def test_pages_are_of_the_dtype_of_autocast(model):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert make_page_pool(model, 1).k[0].dtype == make_cache(model, 1, 1).k[0].dtype == torch.bfloat16
        input_ids = prompt(model)
        assert torch.equal(generate(model, input_ids, 5, cache="paged"), generate(model, input_ids, 5))


def test_misuse_is_refused(model):
    config = model.config
    model.register_forward_pre_hook(lambda *_: pytest.fail("computed something"))
    wrong = PagePool(config.n_layer + 1, 40, 4, config.num_heads_kv, config.head_dim)
    for options, message in [
        (
            {"cache": "page"},
            r"cache: got 'page' \(did you mean 'paged'\?\); expected 'contiguous', 'paged' or",
        ),
        ({"cache": 3}, r"cache: got 3; expected"),
        ({"page_size": 4}, r"page_size: got 4; expected to be left out without cache='paged'"),
        ({"page_size": 4, "cache": make_page_pool(model, 9)}, r"page_size: got 4;.*a pool has its own"),
        ({"page_size": 0, "cache": "paged"}, r"page_size: got 0; expected at least 1"),
        ({"cache": wrong}, rf"cache: got a pool for {config.n_layer + 1} layers, .*make_page_pool\(model"),
    ]:
        with pytest.raises(ValueError, match=message):
            stream_tokens(model, prompt(model), 5, **options)
    pool = make_page_pool(model, n_pages=10, page_size=4)
    stream = stream_tokens(model, prompt(model), 5, cache=pool)  # 13 tokens: 4 pages each
    with pytest.raises(
        ValueError, match=r"cache: got a pool with 10 free of 10 pages; expected the 12 pages"
    ):
        next(stream)
    assert pool.n_free == 10
    with pytest.raises(ValueError, match=r"PagePool: got n_layer=1, .*\(0, 4, 2, 8\); expected sizes"):
        PagePool(1, 0, 4, 2, 8)
    for bad in ([], [3, 0]):
        with pytest.raises(ValueError, match=r"max_seqlens: got .* expected at least 1 token"):
            PagedKVCache(pool, bad)

"""Autoregressive generation with a key/value cache."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from flash_attn_models.errors import bad_argument, did_you_mean
from flash_attn_models.generation.choice import Choice
from flash_attn_models.generation.ends import (
    Ends,
    Tokenizer,
    read_eos_ids,
    read_pad_id,
    read_stop_strings,
)
from flash_attn_models.generation.paged_cache import PagedKVCache, PagePool
from flash_attn_models.generation.prompts import Prompts, read_prompts
from flash_attn_models.gpt.model import GPTLMHeadModel
from flash_attn_models.layers import KVCache
from flash_attn_models.layers.kv_cache import Cache

DEFAULT_PAGE_SIZE = 64


def generate(
    model: GPTLMHeadModel,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    attention_mask: Tensor | None = None,
    prompt_lengths: Tensor | Sequence[int] | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    do_sample: bool = False,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    stop_strings: str | Sequence[str] | None = None,
    tokenizer: Tokenizer | Callable[[list[int]], str] | None = None,
    generator: torch.Generator | None = None,
    cache: Literal["contiguous", "paged"] | PagePool = "contiguous",
    page_size: int | None = None,
) -> Tensor:
    """Continue each prompt by up to ``max_new_tokens`` tokens.

    The host waits for the device once per token to learn whether all rows have ended, if there are end ids or stop
    strings, and otherwise never.

    Args:
        model: language model. Runs in evaluation mode, whatever mode it is in, and is left as it was.
        input_ids: prompts (B,S) on the model's device, padded if their lengths differ. Padding may be any id, has no
            position, and changes nothing: each row is continued as if alone.
        max_new_tokens: most tokens to add; together with the longest prompt they may not exceed the context.
        attention_mask: (B,S), bool or integers, 0 at padding, which may be left or right of a prompt. As Hugging
            Face's tokenizers return it.
        prompt_lengths: instead of a mask: row b of input_ids is ``prompt_lengths[b]`` tokens and then padding.
        do_sample: draw each token; otherwise take the most likely one (greedy).
        temperature, top_k, top_p, min_p: how to draw, see ``flash_attn_models.generation.sampling``. Only with
            do_sample.
        repetition_penalty: makes tokens of the prompt and those generated less likely, if above 1, also without
            do_sample: see ``penalize_repetition``. Padding does not count.
        eos_token_id: id or ids that end a sequence; None takes the config's; an empty sequence never ends.
        pad_token_id: fills a row after its end; None takes the config's, or else the first end id, or else 0.
        stop_strings: a row ends with the token by which the text generated for it comes to contain one of these.
        tokenizer: makes that text: ``tokenizer.decode(ids) -> str``, or such a function. Only with stop_strings.
        generator: seeds drawing, on the model's device. Only with do_sample.
        cache: "contiguous", room for the longest row in all of them; "paged", pages for each row as it needs; or a
            pool of pages that outlives the call. Pages are given back at the end.
        page_size: tokens of a page, with "paged"; None is 64.

    Returns:
        Token ids (B,S+n), int64: input_ids as they were, and continuations from column S on. n is ``max_new_tokens``,
        or less if every row ended before.

    Raises:
        ValueError: prompt and new tokens longer than the context, ids outside the vocabulary, masks or lengths that
            do not fit, a pool with too few pages, or options that do not make sense or would have no effect; naming
            the argument and the fix.
    """
    tokens = stream_tokens(
        model,
        input_ids,
        max_new_tokens,
        attention_mask=attention_mask,
        prompt_lengths=prompt_lengths,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        do_sample=do_sample,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        stop_strings=stop_strings,
        tokenizer=tokenizer,
        generator=generator,
        cache=cache,
        page_size=page_size,
    )
    return torch.cat([input_ids.long(), *(token[:, None] for token in tokens)], dim=1)


def stream_tokens(
    model: GPTLMHeadModel,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    attention_mask: Tensor | None = None,
    prompt_lengths: Tensor | Sequence[int] | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    do_sample: bool = False,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    stop_strings: str | Sequence[str] | None = None,
    tokenizer: Tokenizer | Callable[[list[int]], str] | None = None,
    generator: torch.Generator | None = None,
    cache: Literal["contiguous", "paged"] | PagePool = "contiguous",
    page_size: int | None = None,
) -> Iterator[Tensor]:
    """The tokens of ``generate``, same arguments, one column (B,) at a time as soon as it is known.

    Bad arguments are refused now; pages are taken when the first token is asked for, and given back after the last one
    or when the iterator is closed.
    """
    if max_new_tokens < 1:
        raise bad_argument("max_new_tokens", max_new_tokens, "at least 1", "ask for at least one token")
    prompts = read_prompts(input_ids, attention_mask, prompt_lengths)
    _check_prompts(model, prompts, max_new_tokens)
    choose = Choice(do_sample, temperature, top_k, top_p, min_p, repetition_penalty, generator)
    choose.check_device(input_ids.device)
    eos_ids = read_eos_ids(model.config, eos_token_id)
    pad_id = read_pad_id(model.config, pad_token_id, eos_ids)
    stop = read_stop_strings(stop_strings, tokenizer)
    _check_cache(model, cache, page_size)
    ends = Ends(eos_ids, stop, len(prompts.lengths), input_ids.device)

    def new_cache() -> Cache:
        # The last new token is never fed back, so it needs no place.
        room = [length + max_new_tokens - 1 for length in prompts.lengths]
        if cache == "contiguous":
            return make_cache(model, len(room), max(room))
        if isinstance(cache, PagePool):
            return PagedKVCache(cache, room)
        size = DEFAULT_PAGE_SIZE if page_size is None else page_size
        return PagedKVCache(make_page_pool(model, sum(-(-tokens // size) for tokens in room), size), room)

    return _decode(model, prompts, max_new_tokens, choose, ends, pad_id, new_cache)


@torch.no_grad()
def _decode(
    model: GPTLMHeadModel,
    prompts: Prompts,
    max_new_tokens: int,
    choose: Choice,
    ends: Ends,
    pad_id: int,
    new_cache: Callable[[], Cache],
) -> Iterator[Tensor]:
    """Yield tokens (B,). From the step after its end on, a row gets ``pad_id`` and nothing else."""
    tokens, seqlens = prompts.tokens, prompts.seqlens
    seen = choose.seen_tokens(tokens, model.config.vocab_size)
    cache = new_cache()
    try:
        for _ in range(max_new_tokens):
            with _evaluating(model):
                logits = model(tokens, cache=cache, seqlens=seqlens, num_last_tokens=1)[:, 0]
            chosen = choose(logits, seen).masked_fill(ends.finished, pad_id)
            yield chosen
            if ends.all_after(chosen):
                return
            tokens, seqlens = chosen[:, None], None
    finally:
        if isinstance(cache, PagedKVCache):
            cache.free()


def make_cache(model: GPTLMHeadModel, batch_size: int, max_seqlen: int) -> KVCache:
    """An empty cache of the model's shape, on its device, in the dtype that its attention computes in."""
    config = model.config
    return KVCache(
        config.n_layer,
        batch_size,
        max_seqlen,
        config.num_heads_kv,
        config.head_dim,
        device=model.head_weight.device,
        dtype=_attention_dtype(model),
    )


def make_page_pool(model: GPTLMHeadModel, n_pages: int, page_size: int = DEFAULT_PAGE_SIZE) -> PagePool:
    """Free pages of the model's shape, on its device, in the dtype that its attention computes in."""
    config = model.config
    return PagePool(
        config.n_layer,
        n_pages,
        page_size,
        config.num_heads_kv,
        config.head_dim,
        device=model.head_weight.device,
        dtype=_attention_dtype(model),
    )


def _attention_dtype(model: GPTLMHeadModel) -> torch.dtype:
    weight = model.head_weight
    autocast = torch.is_autocast_enabled(weight.device.type)
    return torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout inside; afterwards every module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _check_prompts(model: GPTLMHeadModel, prompts: Prompts, max_new_tokens: int) -> None:
    config, longest = model.config, max(prompts.lengths)
    if longest + max_new_tokens > config.max_seqlen:
        raise bad_argument(
            "input_ids",
            f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens}",
            f"together at most the context of max_seqlen={config.max_seqlen}",
            f"keep only the prompt's end, input_ids[:, -{config.max_seqlen - max_new_tokens}:]"
            if max_new_tokens < config.max_seqlen
            else f"set max_new_tokens below {config.max_seqlen}",
        )
    lowest, highest = (int(bound) for bound in prompts.tokens.aminmax())
    if not 0 <= lowest <= highest < config.vocab_size:
        raise bad_argument(
            "input_ids",
            f"ids from {lowest} to {highest}",
            f"ids in [0, vocab_size={config.vocab_size})",
            "use the tokenizer that belongs to this model",
        )


def _check_cache(model: GPTLMHeadModel, cache: object, page_size: int | None) -> None:
    kinds = ("contiguous", "paged")
    if not isinstance(cache, PagePool) and cache not in kinds:
        hint = did_you_mean(cache, kinds) if isinstance(cache, str) else ""
        raise bad_argument(
            "cache", f"{cache!r}{hint}", "'contiguous', 'paged' or a PagePool", "choose one of these"
        )
    if page_size is not None and cache != "paged":
        raise bad_argument(
            "page_size",
            page_size,
            "to be left out without cache='paged', where it has no effect",
            "pass cache='paged', or leave it out: a pool has its own",
        )
    if page_size is not None and page_size < 1:
        raise bad_argument("page_size", page_size, "at least 1 token", "leave it out for the default")
    if isinstance(cache, PagePool):
        config, pages = model.config, cache.k[0]
        expected = (config.n_layer, config.num_heads_kv, config.head_dim, _attention_dtype(model))
        if (len(cache.k), *pages.shape[2:], pages.dtype) != expected or (
            pages.device != model.head_weight.device
        ):
            raise bad_argument(
                "cache",
                f"a pool for {len(cache.k)} layers, {pages.shape[2]} heads of width {pages.shape[3]},"
                f" {pages.dtype} on {pages.device}",
                f"one for {expected[0]} layers, {expected[1]} heads of width {expected[2]}, {expected[3]} on"
                f" {model.head_weight.device}",
                "make it with make_page_pool(model, ...)",
            )

"""Autoregressive generation with a key/value cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from flash_attn_models.generation.caches import CacheKind
from flash_attn_models.generation.decode import decode
from flash_attn_models.generation.ends import Tokenizer
from flash_attn_models.generation.output import Acceptance, Columns, GenerateOutput
from flash_attn_models.generation.request import DraftKind, Request, read_request
from flash_attn_models.generation.speculative import speculate
from flash_attn_models.gpt.model import GPTLMHeadModel


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
    vocab_size: int | None = None,
    do_sample: bool = False,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    stop_strings: str | Sequence[str] | None = None,
    tokenizer: Tokenizer | Callable[[list[int]], str] | None = None,
    generator: torch.Generator | None = None,
    cache: CacheKind = "contiguous",
    page_size: int | None = None,
    cuda_graph: bool | None = None,
    draft: DraftKind = None,
    lookahead: int | None = None,
) -> Tensor:
    """Continue each prompt by up to ``max_new_tokens`` tokens.

    On a GPU the host runs a step ahead of the answer whether all rows have ended, so that end ids cost no time; with
    stop strings it waits for the tokens of each step. Under tensor parallelism every rank must be given the same
    arguments, and when drawing equally seeded generators.

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
        vocab_size: only ids below this are chosen, as where a vocabulary is padded (``with_vocab_size``); None is all.
        eos_token_id: id or ids that end a sequence; None takes the config's; an empty sequence never ends.
        pad_token_id: fills a row after its end; None takes the config's, or else the first end id, or else 0.
        stop_strings: a row ends with the token by which the text generated for it comes to contain one of these.
        tokenizer: makes that text: ``tokenizer.decode(ids) -> str``, or such a function. Only with stop_strings.
        generator: seeds drawing, on the model's device. Only with do_sample.
        cache: "contiguous", room for the longest row in all of them; "paged", pages for each row as it needs; or a
            pool of pages that outlives the call. Pages are given back at the end.
        page_size: tokens of a page, with "paged"; None is 64.
        cuda_graph: record decoding steps once and replay them, so that the host launches one thing a step. The tokens
            are the same. What was recorded, and its cache, stay with the model for later calls (see
            ``release_cuda_graphs``); hooks of modules do not run then. None does so on a GPU where it can be and more
            than 16 tokens are asked for; True refuses where it cannot be.
        draft: speculative decoding: a smaller model with the same vocabulary, or "prompt_lookup", which continues as
            the text did before, proposes tokens, and the model checks several in one pass. Greedy tokens are the same
            (in low precision up to near-ties), drawn ones have the same distribution.
        lookahead: tokens that are drafted at a time; None is 4. Only with draft.

    Returns:
        Token ids (B,S+n), int64: input_ids as they were, and continuations from column S on. n is ``max_new_tokens``,
        or less if every row ended before.

    Raises:
        ValueError: prompt and new tokens longer than the context, ids outside the vocabulary, masks or lengths that
            do not fit, a pool with too few pages, or options that do not make sense or would have no effect; naming
            the argument and the fix.
    """
    request = read_request(
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
        vocab_size=vocab_size,
        do_sample=do_sample,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        stop_strings=stop_strings,
        tokenizer=tokenizer,
        generator=generator,
        cache=cache,
        page_size=page_size,
        cuda_graph=cuda_graph,
        draft=draft,
        lookahead=lookahead,
    )
    return torch.cat([input_ids.long(), *(new.tokens for new in _columns(model, request))], dim=1)


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
    vocab_size: int | None = None,
    do_sample: bool = False,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    stop_strings: str | Sequence[str] | None = None,
    tokenizer: Tokenizer | Callable[[list[int]], str] | None = None,
    generator: torch.Generator | None = None,
    cache: CacheKind = "contiguous",
    page_size: int | None = None,
    cuda_graph: bool | None = None,
    draft: DraftKind = None,
    lookahead: int | None = None,
) -> Iterator[Tensor]:
    """The tokens of ``generate``, same arguments, one column (B,) at a time as soon as it is known.

    Bad arguments are refused now; pages are taken when the first token is asked for, and given back after the last one
    or when the iterator is closed.
    """
    request = read_request(
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
        vocab_size=vocab_size,
        do_sample=do_sample,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        stop_strings=stop_strings,
        tokenizer=tokenizer,
        generator=generator,
        cache=cache,
        page_size=page_size,
        cuda_graph=cuda_graph,
        draft=draft,
        lookahead=lookahead,
    )
    return (column for new in _columns(model, request) for column in new.tokens.unbind(dim=1))


def generate_output(
    model: GPTLMHeadModel,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    return_logprobs: bool = False,
    **options: Any,
) -> GenerateOutput:
    """``generate`` with what it learns on the way.

    Args:
        model, input_ids, max_new_tokens, options: those of ``generate``.
        return_logprobs: return the log-probability of each new token.
    """
    request = read_request(model, input_ids, max_new_tokens, wants_logprobs=return_logprobs, **options)
    acceptance = Acceptance()
    new = list(_columns(model, request, acceptance))
    return GenerateOutput(
        torch.cat([input_ids.long(), *(columns.tokens for columns in new)], dim=1),
        torch.cat([columns.logprobs for columns in new if columns.logprobs is not None], dim=1)
        if return_logprobs
        else None,
        None if request.draft is None else acceptance,
    )


def _columns(
    model: GPTLMHeadModel, request: Request, acceptance: Acceptance | None = None
) -> Iterator[Columns]:
    if request.draft is None:
        return decode(model, request)
    return speculate(model, request, Acceptance() if acceptance is None else acceptance)

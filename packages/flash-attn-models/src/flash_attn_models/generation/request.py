"""The arguments of ``generate``, checked and brought to one form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flash_attn_models.errors import bad_argument, did_you_mean
from flash_attn_models.generation.caches import DEFAULT_PAGE_SIZE, CacheKind, check_cache
from flash_attn_models.generation.choice import Choice
from flash_attn_models.generation.cuda_graph import why_no_graph
from flash_attn_models.generation.ends import (
    StopStrings,
    Tokenizer,
    read_eos_ids,
    read_pad_id,
    read_stop_strings,
)
from flash_attn_models.generation.numbers import read_whole
from flash_attn_models.generation.prompts import Prompts, read_prompts
from flash_attn_models.generation.step import StepOptions
from flash_attn_models.gpt.model import GPTLMHeadModel
from flash_attn_models.layers.depthwise_conv import REWINDABLE_TOKENS

DEFAULT_LOOKAHEAD = 4
PROMPT_LOOKUP = "prompt_lookup"
DraftKind = GPTLMHeadModel | Literal["prompt_lookup"] | None

# A captured step pays for its capture after about so many steps.
_FEWEST_GRAPH_STEPS = 16


@dataclass(frozen=True)
class Request:
    """One call of ``generate``.

    Attributes:
        prompts: without padding.
        max_new_tokens: at least 1.
        step: what decoding steps do besides the model.
        stop: finds stop strings; None is none.
        cache, page_size: where keys and values go.
        uses_graph: whether steps are captured and replayed.
        requires_graph: whether that was asked for by name.
        draft, lookahead: who drafts how many tokens for speculative decoding; None is nobody.
    """

    prompts: Prompts
    max_new_tokens: int
    step: StepOptions
    stop: StopStrings | None
    cache: CacheKind
    page_size: int
    uses_graph: bool
    requires_graph: bool
    draft: DraftKind
    lookahead: int

    @property
    def room(self) -> list[int]:
        """Tokens of each row that the cache must hold. The last new token is never fed back, so it needs no place."""
        return [length + self.max_new_tokens - 1 for length in self.prompts.lengths]


def read_request(
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
    wants_logprobs: bool = False,
) -> Request:
    """Check the arguments of ``generate``, which documents them; ValueError for the first bad one. Nothing is computed
    by the model."""
    if not _is_decoder(model):
        raise bad_argument(
            "model",
            f"a {type(model).__name__}",
            "a GPTLMHeadModel",
            "pass the model itself, and not what wraps it",
        )
    expected, fix = "at least 1", "ask for at least one token"
    max_new_tokens = read_whole("max_new_tokens", max_new_tokens, expected, fix)
    if max_new_tokens < 1:
        raise bad_argument("max_new_tokens", max_new_tokens, expected, fix)
    prompts = read_prompts(input_ids, attention_mask, prompt_lengths)
    _check_prompts(model, prompts, max_new_tokens)
    if vocab_size is not None:
        vocab_size = _read_vocab_size(model, vocab_size)
    choice = Choice(do_sample, temperature, top_k, top_p, min_p, repetition_penalty, generator, vocab_size)
    choice.check_device(input_ids.device)
    eos_ids = read_eos_ids(model.config, eos_token_id)
    pad_id = read_pad_id(model.config, pad_token_id, eos_ids)
    stop = read_stop_strings(stop_strings, tokenizer)
    check_cache(model, cache, page_size)
    lookahead = _read_lookahead(model, draft, lookahead)
    _check_draft(model, prompts, max_new_tokens, draft)
    uses_graph = _read_cuda_graph(model, cuda_graph, draft, max_new_tokens)
    return Request(
        prompts,
        max_new_tokens,
        StepOptions(choice, eos_ids, pad_id, stop is not None, wants_logprobs),
        stop,
        cache,
        DEFAULT_PAGE_SIZE if page_size is None else int(page_size),
        uses_graph,
        cuda_graph is True,
        draft,
        lookahead,
    )


def _is_decoder(model: object) -> bool:
    """Also of what torch.compile makes of one, which is no subclass."""
    return isinstance(getattr(model, "_orig_mod", model), GPTLMHeadModel)


def _check_prompts(model: GPTLMHeadModel, prompts: Prompts, max_new_tokens: int) -> None:
    config, longest = model.config, max(prompts.lengths)
    given, device = prompts.tokens.device, model.head_weight.device
    if given != device:
        raise bad_argument(
            "input_ids",
            f"a tensor on {given}",
            f"one on the model's device, {device}",
            f"use input_ids.to({str(device)!r})",
        )
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


def _read_vocab_size(model: GPTLMHeadModel, vocab_size: int) -> int:
    expected, fix = f"between 1 and the model's {model.config.vocab_size}", "leave it out for all ids"
    vocab_size = read_whole("vocab_size", vocab_size, expected, fix)
    if not 1 <= vocab_size <= model.config.vocab_size:
        raise bad_argument("vocab_size", vocab_size, expected, fix)
    return vocab_size


def _read_lookahead(model: GPTLMHeadModel, draft: Any, lookahead: int | None) -> int:
    if lookahead is None:
        return DEFAULT_LOOKAHEAD
    if draft is None:
        raise bad_argument(
            "lookahead", lookahead, "to be left out without draft, where it has no effect", "pass draft"
        )
    expected, fix = "at least 1 token", "leave it out for the default"
    lookahead = read_whole("lookahead", lookahead, expected, fix)
    if lookahead < 1:
        raise bad_argument("lookahead", lookahead, expected, fix)
    models = [model, draft] if _is_decoder(draft) else [model]
    has_conv = any(part.config.conv_width is not None for part in models)
    if has_conv and lookahead >= REWINDABLE_TOKENS:
        raise bad_argument(
            "lookahead",
            lookahead,
            f"less than {REWINDABLE_TOKENS} tokens, since a depthwise convolution can take back no more",
            fix,
        )
    return lookahead


def _check_draft(model: GPTLMHeadModel, prompts: Prompts, max_new_tokens: int, draft: Any) -> None:
    if draft is None or (isinstance(draft, str) and draft == PROMPT_LOOKUP):
        return
    if not _is_decoder(draft):
        hint = did_you_mean(draft, [PROMPT_LOOKUP]) if isinstance(draft, str) else ""
        raise bad_argument(
            "draft",
            f"a {type(draft).__name__}" if isinstance(draft, nn.Module) else f"{draft!r}{hint}",
            "a GPTLMHeadModel or 'prompt_lookup'",
            "choose one of these",
        )
    for name, got, expected in (
        ("vocab_size", draft.config.vocab_size, model.config.vocab_size),
        ("device", draft.head_weight.device, model.head_weight.device),
    ):
        if got != expected:
            raise bad_argument(
                "draft",
                f"a model with {name} {got}",
                f"{name} {expected}, as the model has",
                "use a draft model with the same tokenizer, on the same device",
            )
    longest = max(prompts.lengths) + max_new_tokens
    if longest > draft.config.max_seqlen:
        raise bad_argument(
            "draft",
            f"a model with a context of {draft.config.max_seqlen} tokens",
            f"at least the {longest} of the longest prompt and new tokens together",
            "ask for fewer tokens, or use another draft model",
        )


def _read_cuda_graph(
    model: GPTLMHeadModel, cuda_graph: bool | None, draft: object, max_new_tokens: int
) -> bool:
    if cuda_graph is False:
        return False
    reason = why_no_graph(model) if draft is None else "speculative decoding, whose steps differ"
    if cuda_graph is True and reason is not None:
        raise bad_argument(
            "cuda_graph",
            f"True with {reason}",
            "a float16 or bfloat16 model on one CUDA device, without autocast and without draft",
            "leave it out: steps are then captured where they can be",
        )
    return reason is None and (cuda_graph is True or max_new_tokens > _FEWEST_GRAPH_STEPS)

"""Speculative decoding: several drafted tokens of every row are checked by one pass of the model.

What comes out is what plain decoding gives: greedily the same tokens (up to rounding, which may differ between passes
over one token and over several), and with do_sample tokens of the same distribution. Rows of a batch accept different
numbers of tokens: each has its own length in the cache, from which rejected tokens are dropped.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from flash_attn_models.generation.accept import Draft, accept_greedy, accept_sampled
from flash_attn_models.generation.caches import close_cache, open_cache
from flash_attn_models.generation.choice import Choice
from flash_attn_models.generation.draft import Drafter, ModelDrafter, PromptLookup
from flash_attn_models.generation.evaluation import evaluating
from flash_attn_models.generation.output import Acceptance, Columns
from flash_attn_models.generation.request import Request
from flash_attn_models.generation.step import DecodingState, prompt_step
from flash_attn_models.gpt.model import GPTLMHeadModel
from flash_attn_models.layers.kv_cache import Cache


class _Row:
    """What the host knows of one row."""

    def __init__(self, prompt: list[int]) -> None:
        self.text = prompt
        self.prompt_length = len(prompt)
        self.logprobs: list[float] = []
        self.recent: list[int] = []  # for stop strings
        self.is_finished = False

    @property
    def n_new(self) -> int:
        return len(self.text) - self.prompt_length

    def take(self, tokens: list[int], logprobs: list[float], request: Request) -> None:
        """Add tokens up to the one that ends the row."""
        if self.is_finished:
            return
        for token, logprob in zip(tokens, logprobs, strict=True):
            self.text.append(token)
            self.logprobs.append(logprob)
            stops = request.stop is not None and request.stop.ends(self.recent, token)
            if stops or token in request.step.eos_ids or self.n_new == request.max_new_tokens:
                self.is_finished = True
                return


# No decorator of torch: at the end of a program it fails for a generator that is still open.
def speculate(model: GPTLMHeadModel, request: Request, acceptance: Acceptance) -> Iterator[Columns]:
    """Yield columns as soon as every row has their token; count in ``acceptance`` what became of the drafts."""
    prompts, choice, device = request.prompts, request.step.choice, model.head_weight.device
    rows = [_Row(ids[:length]) for ids, length in zip(prompts.tokens.tolist(), prompts.lengths, strict=True)]
    contexts = [model.config.max_seqlen]
    if request.draft is not None and not isinstance(request.draft, str):
        contexts.append(request.draft.config.max_seqlen)
    context = min(contexts)
    room = [min(tokens + request.lookahead, context) for tokens in request.room]
    state = DecodingState(len(rows), model.config.vocab_size, request.step, device)
    cache = open_cache(model, request.cache, request.page_size, room)
    try:
        drafter = _drafter(request, room, device)
        prompt_step(model, prompts, cache, state, request.step)
        first = [state.tokens, *([] if state.logprobs is None else [state.logprobs])]
        _take(rows, [[token] for token in first[0].tolist()], _by_row(first[1:]), request)
        shown = 0
        while True:
            ready = _n_ready(rows)
            if ready > shown:
                yield _columns(rows, shown, ready, request, device)
                shown = ready
            if all(row.is_finished for row in rows):
                return
            # A row that has ended is a text of one token, so that it needs no place behind its end.
            texts = [row.text[:1] if row.is_finished else row.text for row in rows]
            going = [row for row in rows if not row.is_finished]
            count = min(
                request.lookahead,
                max(request.max_new_tokens - row.n_new for row in going) - 1,
                context - max(len(row.text) for row in going),
            )
            draft = Draft(torch.empty(len(rows), 0, dtype=torch.int64, device=device))
            if count > 0:
                draft = drafter.propose(texts, count, state.seen)
            cache.truncate([len(text) - 1 for text in texts])
            last = [text[-1] for text in texts]
            scores = _judge(model, cache, last, draft, choice, state.seen)
            verdict = (
                accept_sampled(scores, draft, choice.generator)
                if choice.do_sample
                else accept_greedy(scores, draft)
            )
            width = draft.tokens.shape[1] + 1
            places = torch.arange(width, device=device)
            padded = torch.nn.functional.pad(draft.tokens, (0, 1))
            tokens = torch.where(places < verdict.accepted[:, None], padded, verdict.token[:, None])
            if state.seen is not None:
                state.seen.scatter_(1, tokens, True)
            logprobs: list[Tensor] = []
            if request.step.wants_logprobs:
                logprobs = [scores.float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]]
            # All that the host has to know, in one transfer.
            read = torch.cat([tokens, verdict.accepted[:, None]], dim=1).tolist()
            accepted = [line[-1] for line in read]
            proposed = [width - 1] * len(rows) if draft.counts is None else draft.counts.tolist()
            acceptance.rounds += 1
            for row, taken, offered in zip(rows, accepted, proposed, strict=True):
                if not row.is_finished:
                    acceptance.accepted += taken
                    acceptance.drafted += offered
            new = [line[: taken + 1] for line, taken in zip(read, accepted, strict=True)]
            _take(rows, new, _by_row(logprobs), request)
    finally:
        close_cache(cache)


@torch.no_grad()
def _judge(
    model: GPTLMHeadModel, cache: Cache, last: list[int], draft: Draft, choice: Choice, seen: Tensor | None
) -> Tensor:
    """Scores (B,K+1,V) after the last token of each text and 0 to K drafted ones, in evaluation mode."""
    tokens = torch.cat([torch.tensor(last, device=draft.tokens.device)[:, None], draft.tokens], dim=1)
    with evaluating(model):
        logits = model(tokens, cache=cache)
    return choice.scores(logits, _seen_after(seen, draft.tokens))


def _drafter(request: Request, room: list[int], device: torch.device) -> Drafter:
    if request.draft is None or isinstance(request.draft, str):
        return PromptLookup(len(room), device)
    return ModelDrafter(request.draft, request.step.choice, room)


def _take(rows: list[_Row], new: list[list[int]], logprobs: list[list[float]], request: Request) -> None:
    for index, (row, tokens) in enumerate(zip(rows, new, strict=True)):
        row.take(tokens, logprobs[index][: len(tokens)] if logprobs else [0.0] * len(tokens), request)


def _by_row(logprobs: list[Tensor]) -> list[list[float]]:
    """Of no or one tensor (B,) or (B,n)."""
    return [] if not logprobs else logprobs[0].reshape(len(logprobs[0]), -1).tolist()


def _seen_after(seen: Tensor | None, drafted: Tensor) -> Tensor | None:
    """bool (B,K+1,V): what has occurred after 0 to K of the drafted tokens (B,K)."""
    if seen is None:
        return None
    after = [seen]
    for tokens in drafted.unbind(dim=1):
        after.append(after[-1].scatter(1, tokens[:, None], True))
    return torch.stack(after, dim=1)


def _n_ready(rows: list[_Row]) -> int:
    """Columns of which every token is known: rows that have ended are filled up to the longest."""
    going = [row.n_new for row in rows if not row.is_finished]
    return min(going) if going else max(row.n_new for row in rows)


def _columns(rows: list[_Row], start: int, stop: int, request: Request, device: torch.device) -> Columns:
    def block(of_rows: list[list[float]], fill: float, dtype: torch.dtype) -> Tensor:
        padded = [(values + [fill] * max(stop - len(values), 0))[start:stop] for values in of_rows]
        return torch.tensor(padded, dtype=dtype, device=device)

    new: list[list[float]] = [list(row.text[row.prompt_length :]) for row in rows]
    tokens = block(new, request.step.pad_id, torch.int64)
    if not request.step.wants_logprobs:
        return Columns(tokens, None)
    return Columns(tokens, block([row.logprobs for row in rows], 0.0, torch.float32))

"""One decoding step, on tensors that stay where they are: run as it stands, or captured once and replayed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flash_attn_models.generation.choice import Choice
from flash_attn_models.generation.evaluation import evaluating
from flash_attn_models.generation.prompts import Prompts
from flash_attn_models.gpt.model import GPTLMHeadModel
from flash_attn_models.layers.kv_cache import Cache


@dataclass(frozen=True)
class StepOptions:
    """What a step does besides the model: how it chooses tokens, and what ends a row.

    Attributes:
        choice: how tokens are chosen.
        eos_ids: ids that end a row.
        pad_id: what a row gets from the step after its end on.
        has_stop_strings: the host ends rows too.
        wants_logprobs: the log-probability of each chosen token is kept.
    """

    choice: Choice
    eos_ids: tuple[int, ...] = ()
    pad_id: int = 0
    has_stop_strings: bool = False
    wants_logprobs: bool = False

    @property
    def can_end(self) -> bool:
        """Whether anything can end a row."""
        return bool(self.eos_ids) or self.has_stop_strings


class DecodingState:
    """What a step reads and leaves for the next one. Steps write into these tensors and never replace them.

    Attributes:
        tokens: int64 (B,), the last token of each row.
        finished: bool (B,), rows that have ended.
        all_finished: bool (), whether all have.
        seen: bool (B,V), ids that occurred, with repetition penalty; otherwise None.
        logprobs: float32 (B,), of the last tokens, if they are wanted; 0 where a row had ended before.
    """

    @torch.inference_mode(False)  # the caller's mode may change from step to step
    def __init__(
        self, batch_size: int, vocab_size: int, options: StepOptions, device: torch.device | str
    ) -> None:
        def buffer(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.tokens = buffer(batch_size, dtype=torch.int64)
        self.finished = buffer(batch_size, dtype=torch.bool)
        self.all_finished = buffer(dtype=torch.bool)
        penalized = options.choice.repetition_penalty is not None
        self.seen = buffer(batch_size, vocab_size, dtype=torch.bool) if penalized else None
        self.logprobs = buffer(batch_size, dtype=torch.float32) if options.wants_logprobs else None
        self.end_ids = (
            torch.tensor(options.eos_ids, dtype=torch.int64, device=device) if options.eos_ids else None
        )

    def start(self, prompt: Tensor) -> None:
        """Forget what was before; the ids of prompt (B,S) are seen."""
        self.finished.zero_()
        self.all_finished.zero_()
        if self.seen is not None:
            self.seen.zero_().scatter_(1, prompt, True)


def take_tokens(logits: Tensor, state: DecodingState, options: StepOptions) -> None:
    """Choose the next token of each row from logits (B,V); note which rows end with it. Waits for nothing."""
    scores = options.choice.scores(logits, state.seen)
    tokens = options.choice.pick(scores)
    if state.logprobs is not None:
        logprobs = scores.float().log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
        state.logprobs.copy_(logprobs.masked_fill(state.finished, 0.0) if options.can_end else logprobs)
    if options.can_end:
        tokens = tokens.masked_fill(state.finished, options.pad_id)
    if state.seen is not None:
        state.seen.scatter_(1, tokens[:, None], True)
    if state.end_ids is not None:
        # Not torch.isin, which may sort, and then waits for the device.
        state.finished |= (tokens[:, None] == state.end_ids).any(dim=-1)
        state.all_finished.copy_(state.finished.all())
    state.tokens.copy_(tokens)


@torch.no_grad()
def prompt_step(
    model: GPTLMHeadModel, prompts: Prompts, cache: Cache, state: DecodingState, options: StepOptions
) -> None:
    """Feed the prompts and choose the first tokens. The model runs in evaluation mode."""
    state.start(prompts.tokens)
    with evaluating(model):
        logits = model(prompts.tokens, cache=cache, seqlens=prompts.seqlens, num_last_tokens=1)
    take_tokens(logits[:, 0], state, options)


@torch.no_grad()
def decode_step(model: GPTLMHeadModel, cache: Cache, state: DecodingState, options: StepOptions) -> None:
    """Feed the last tokens and choose the next ones."""
    logits = model(state.tokens[:, None], cache=cache, num_last_tokens=1)[:, 0]
    take_tokens(logits, state, options)

"""Plain decoding: one token for each row, step by step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

from flash_attn_models.generation.caches import close_cache, open_cache
from flash_attn_models.generation.cuda_graph import open_graph_run
from flash_attn_models.generation.end_watch import EndWatch
from flash_attn_models.generation.evaluation import evaluating
from flash_attn_models.generation.output import Columns
from flash_attn_models.generation.request import Request
from flash_attn_models.generation.step import DecodingState, StepOptions, decode_step, prompt_step
from flash_attn_models.gpt.model import GPTLMHeadModel
from flash_attn_models.layers.kv_cache import Cache


class Run(Protocol):
    """Who runs the steps of one request, and on what."""

    cache: Cache
    state: DecodingState

    def step(self) -> None:
        """Feed the last tokens, choose the next ones."""

    def close(self) -> None:
        """Give back what the run holds."""


class EagerRun:
    """Steps run as they stand, with a cache for this run alone."""

    def __init__(self, model: GPTLMHeadModel, request: Request) -> None:
        self._model = model
        self._options = request.step
        self.state = DecodingState(
            len(request.room), model.config.vocab_size, request.step, model.head_weight.device
        )
        # Last: what fails before has taken no pages.
        self.cache = open_cache(model, request.cache, request.page_size, request.room)

    def step(self) -> None:
        with evaluating(self._model):
            decode_step(self._model, self.cache, self.state, self._options)

    def close(self) -> None:
        close_cache(self.cache)


def open_run(model: GPTLMHeadModel, request: Request) -> Run:
    """Captured steps if they are wanted and their buffers free, otherwise eager ones."""
    run: Run | None = None
    if request.uses_graph and request.max_new_tokens > 1:
        run = open_graph_run(
            model,
            request.step,
            cache=request.cache,
            page_size=request.page_size,
            room=request.room,
            must=request.requires_graph,
        )
    return EagerRun(model, request) if run is None else run


def answer_lag(request: Request) -> int:
    """Steps that the host may run ahead of the answer whether all rows have ended: see ``EndWatch``."""
    on_gpu = request.prompts.tokens.device.type == "cuda"
    return 1 if on_gpu and request.stop is None and request.step.eos_ids else 0


# No decorator of torch: at the end of a program it fails for a generator that is still open.
def decode(model: GPTLMHeadModel, request: Request, lag: int | None = None) -> Iterator[Columns]:
    """Yield one column after the other. From the step after its end on, a row gets the fill id and nothing else.

    ``lag`` is that of ``EndWatch``, and changes nothing that is returned; None is ``answer_lag(request)``.
    """
    lag = answer_lag(request) if lag is None else lag
    prompts = request.prompts
    run = open_run(model, request)
    state = run.state
    try:
        watch = EndWatch(state, request.step, request.stop, lag)
        randomness = _Randomness(request.step, prompts.tokens.device, keeps=lag > 0)
        for step in range(request.max_new_tokens):
            if step == 0:
                prompt_step(model, prompts, run.cache, state, request.step)
            else:
                if not lag and watch.all_ended(step - 1):
                    return
                randomness.remember()
                run.step()
            watch.note(step)
            if lag and step > 0 and watch.all_ended(step - 1):
                randomness.go_back()
                return
            logprobs = None if state.logprobs is None else state.logprobs[:, None].clone()
            yield Columns(state.tokens[:, None].clone(), logprobs)
    finally:
        run.close()


class _Randomness:
    """The generator that draws, so that a step that is thrown away has used nothing of it."""

    def __init__(self, options: StepOptions, device: torch.device, keeps: bool) -> None:
        draws = keeps and options.choice.do_sample
        self._generator = options.choice.source(device) if draws else None
        self._state: torch.Tensor | None = None

    def remember(self) -> None:
        if self._generator is not None:
            self._state = self._generator.get_state()

    def go_back(self) -> None:
        if self._generator is not None and self._state is not None:
            self._generator.set_state(self._state)

"""Whether all rows have ended: what the host has to learn from the device."""

from __future__ import annotations

import torch

from flash_attn_models.generation.ends import StopStrings
from flash_attn_models.generation.step import DecodingState, StepOptions


class EndWatch:
    """Tells after each step whether every row has ended, if anything can end one at all.

    Of ends at ids the device tells. With ``lag`` 1 the answer about a step is sent while the next one runs, so that
    the device never waits for the host; who asks must then throw that next step away. Stop strings are found on the
    host, which has to read the tokens of each step before the next one.

    Args:
        state, options: of the steps.
        stop: finds stop strings; None is none.
        lag: steps that the caller runs ahead of the question, 0 or 1. With stop strings it must be 0.
    """

    def __init__(
        self, state: DecodingState, options: StepOptions, stop: StopStrings | None, lag: int
    ) -> None:
        self._state = state
        self._stop = stop
        self._watches_ids = bool(options.eos_ids) and stop is None
        self._texts: list[list[int]] = [[] for _ in state.tokens]
        device = state.tokens.device
        # Pinned memory, or a copy would make the host wait.
        with torch.inference_mode(False):  # the caller's mode may change from step to step
            self._flags = torch.zeros(
                lag + 1, dtype=torch.bool, device="cpu", pin_memory=device.type == "cuda"
            )
        self._events = [torch.cuda.Event() for _ in self._flags] if device.type == "cuda" else []

    def note(self, step: int) -> None:
        """Step number ``step`` has been started: send the answer about it."""
        if not self._watches_ids:
            return
        slot = step % len(self._flags)
        self._flags[slot].copy_(self._state.all_finished, non_blocking=True)
        if self._events:
            self._events[slot].record(torch.cuda.current_stream(self._state.tokens.device))

    def all_ended(self, step: int) -> bool:
        """Whether every row has ended by step number ``step``, noted no more than ``lag`` others ago. To be asked once
        for each step, in order."""
        if self._stop is not None:
            return self._read_texts(self._stop)
        if not self._watches_ids:
            return False
        slot = step % len(self._flags)
        if self._events:
            self._events[slot].synchronize()
        return bool(self._flags[slot])

    def _read_texts(self, stop: StopStrings) -> bool:
        tokens, finished = self._state.tokens, self._state.finished
        # One transfer for both; padding of a row that has ended must not be read.
        ids, ended = torch.stack([tokens, finished.long()]).tolist()
        stopped = [
            bool(end) or stop.ends(text, token)
            for text, token, end in zip(self._texts, ids, ended, strict=True)
        ]
        finished.copy_(torch.tensor(stopped, device="cpu"))
        return all(stopped)

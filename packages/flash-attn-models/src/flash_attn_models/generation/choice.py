"""Choosing one token for each sequence, greedily or by drawing, under one set of options."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flash_attn_models.errors import bad_argument
from flash_attn_models.generation.sampling import draw, filter_logits, most_likely, penalize_repetition


@dataclass(frozen=True)
class Choice:
    """The options of ``generate`` that choose a token; a ValueError says which one is bad or has no effect."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    generator: torch.Generator | None = None
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        nothing = torch.zeros(1, device="cpu")
        if self.repetition_penalty is not None:
            penalize_repetition(nothing, nothing.bool(), self.repetition_penalty)
        if self.do_sample:
            filter_logits(
                nothing, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p
            )
            if self.generator is not None and not isinstance(self.generator, torch.Generator):
                raise bad_argument(
                    "generator",
                    repr(self.generator),
                    "a torch.Generator",
                    "make one with torch.Generator(device).manual_seed(seed)",
                )
            return
        only_for_drawing = {
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "generator": self.generator,
            "temperature": None if self.temperature == 1 else self.temperature,
        }
        for name, value in only_for_drawing.items():
            if value is not None:
                raise bad_argument(
                    name,
                    value,
                    "to be left out with do_sample=False, where it has no effect",
                    "pass do_sample=True",
                )

    def check_device(self, device: torch.device) -> None:
        """Raise ValueError unless the generator is on the device of the model."""
        if self.generator is None:
            return
        given = self.generator.device
        if given.type != device.type or (given.index or 0) != (device.index or 0):
            raise bad_argument(
                "generator",
                f"a generator on {given}",
                f"one on the model's device, {device}",
                f"make it with torch.Generator({str(device)!r})",
            )

    def source(self, device: torch.device) -> torch.Generator:
        """The generator that draws on a device: the given one, or torch's global one there."""
        if self.generator is not None:
            return self.generator
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            torch.cuda.init()  # generators exist from then on
            return torch.cuda.default_generators[index]
        return torch.default_generator

    def scores(self, logits: Tensor, seen: Tensor | None) -> Tensor:
        """logits (..., V) as tokens are chosen by: the first ``vocab_size``, penalised for what bool ``seen`` (..., V)
        marks, and with do_sample filtered, in float32. Their softmax is the distribution that ``pick`` draws from."""
        logits = logits[..., : self.vocab_size]
        if self.repetition_penalty is not None:
            assert seen is not None
            logits = penalize_repetition(
                logits.float(), seen[..., : self.vocab_size], self.repetition_penalty
            )
        if not self.do_sample:
            return logits
        return filter_logits(
            logits.float(), temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p
        )

    def pick(self, scores: Tensor) -> Tensor:
        """scores (..., V) -> tokens (...), int64."""
        return draw(scores, self.generator) if self.do_sample else most_likely(scores)

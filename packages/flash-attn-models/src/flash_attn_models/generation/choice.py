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

    def __post_init__(self) -> None:
        nothing = torch.zeros(1)
        if self.repetition_penalty is not None:
            penalize_repetition(nothing, nothing.bool(), self.repetition_penalty)
        if self.do_sample:
            filter_logits(
                nothing, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p
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
        if self.generator is not None and self.generator.device.type != device.type:
            raise bad_argument(
                "generator",
                f"a generator on {self.generator.device}",
                f"one on the model's device, {device}",
                f"make it with torch.Generator({device.type!r})",
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
        """logits (..., V) as tokens are chosen by: penalised for what bool ``seen`` (..., V) marks, and with
        do_sample filtered, in float32. Their softmax is the distribution that ``pick`` draws from."""
        if self.repetition_penalty is not None:
            assert seen is not None
            logits = penalize_repetition(logits.float(), seen, self.repetition_penalty)
        if not self.do_sample:
            return logits
        return filter_logits(
            logits.float(), temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p
        )

    def pick(self, scores: Tensor) -> Tensor:
        """scores (..., V) -> tokens (...), int64."""
        return draw(scores, self.generator) if self.do_sample else most_likely(scores)

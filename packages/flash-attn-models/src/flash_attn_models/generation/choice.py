"""Choosing one token for each sequence, greedily or by drawing, under one set of options."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flash_attn_models.errors import bad_argument
from flash_attn_models.generation.sampling import filter_logits, penalize_repetition, sample


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

    def seen_tokens(self, tokens: Tensor, vocab_size: int) -> Tensor | None:
        """bool (B,V), which ids occur in each row of tokens (B,S); None without repetition penalty."""
        if self.repetition_penalty is None:
            return None
        seen = torch.zeros(tokens.shape[0], vocab_size, dtype=torch.bool, device=tokens.device)
        return seen.scatter_(1, tokens, True)

    def __call__(self, logits: Tensor, seen: Tensor | None) -> Tensor:
        """logits (B,V) -> tokens (B,), int64, which are then seen."""
        if seen is not None and self.repetition_penalty is not None:
            logits = penalize_repetition(logits.float(), seen, self.repetition_penalty)
        tokens = self._choose(logits)
        if seen is not None:
            seen.scatter_(1, tokens[:, None], True)
        return tokens

    def _choose(self, logits: Tensor) -> Tensor:
        if not self.do_sample:
            return logits.argmax(dim=-1)
        return sample(
            logits,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            generator=self.generator,
        )

"""Who drafts tokens for speculative decoding: a smaller model, or the text itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from flash_attn_models.generation.accept import Draft
from flash_attn_models.generation.caches import cache_capacity, make_cache
from flash_attn_models.generation.choice import Choice
from flash_attn_models.generation.evaluation import evaluating
from flash_attn_models.gpt.model import GPTLMHeadModel

Texts = Sequence[Sequence[int]]


class Drafter(Protocol):
    """Proposes how texts go on."""

    def propose(self, texts: Texts, count: int, seen: Tensor | None) -> Draft:
        """Up to ``count`` >= 1 tokens after each text.

        texts: ids of each row so far. From one call to the next a row has grown by some of the tokens proposed for it
            and one more; or has been replaced by a single id, as rows are that have ended.
        seen: bool (B,V), ids that occurred, with repetition penalty.
        """


class ModelDrafter:
    """Drafts with a model, under the same options of choosing tokens as the model that judges.

    Args:
        model: drafts; its cache is contiguous.
        choice: how tokens are chosen.
        room: tokens that each row must have room for, drafted ones among them.
    """

    def __init__(self, model: GPTLMHeadModel, choice: Choice, room: Sequence[int]) -> None:
        self._model = model
        self._choice = choice
        self._device = model.head_weight.device
        self._cache = make_cache(model, len(room), cache_capacity(model, room))
        self._held = [0] * len(room)  # tokens of each row in the cache

    @torch.no_grad()
    def propose(self, texts: Texts, count: int, seen: Tensor | None) -> Draft:
        with evaluating(self._model):
            logits = self._read(texts)
            seen = None if seen is None else seen.clone()
            tokens: list[Tensor] = []
            probabilities: list[Tensor] = []
            for number in range(count):
                if number > 0:
                    logits = self._model(tokens[-1][:, None], cache=self._cache, num_last_tokens=1)[:, 0]
                scores = self._choice.scores(logits, seen)
                chosen = self._choice.pick(scores)
                if seen is not None:
                    seen.scatter_(1, chosen[:, None], True)
                if self._choice.do_sample:
                    probabilities.append(scores.softmax(dim=-1))
                tokens.append(chosen)
        self._held = [len(text) + count - 1 for text in texts]
        return Draft(torch.stack(tokens, dim=1), torch.stack(probabilities, dim=1) if probabilities else None)

    def _read(self, texts: Texts) -> Tensor:
        """Feed what the cache does not hold of each text; logits (B,V) after it. Drafts that were not accepted lie
        behind all but the last token of a text, and are forgotten."""
        kept = [min(len(text) - 1, held) for text, held in zip(texts, self._held, strict=True)]
        self._cache.truncate(kept)
        new = [list(text[start:]) for text, start in zip(texts, kept, strict=True)]
        width = max(map(len, new))
        block = torch.tensor([ids + ids[-1:] * (width - len(ids)) for ids in new], device=self._device)
        seqlens = torch.tensor([len(ids) for ids in new], dtype=torch.int32, device=self._device)
        logits: Tensor = self._model(block, cache=self._cache, seqlens=seqlens, num_last_tokens=1)[:, 0]
        self._cache.truncate([len(text) for text in texts])
        return logits


class PromptLookup:
    """Drafts what followed the last few tokens of a text where they occurred before: good where texts repeat
    themselves, as in summaries and edits. Source: Saxena, "Prompt lookup decoding", 2023.

    Args:
        n_rows: texts.
        device: of the drafts.
        longest: most tokens that must agree; fewer do, down to 2, if so many do not.
    """

    def __init__(self, n_rows: int, device: torch.device, longest: int = 3) -> None:
        self._sizes = range(longest, 1, -1)
        self._device = device
        # Of each row: where what follows a few tokens begins, for their last occurrence that something follows.
        self._places: list[dict[tuple[int, ...], int]] = [{} for _ in range(n_rows)]
        self._indexed = [0] * n_rows

    def propose(self, texts: Texts, count: int, seen: Tensor | None) -> Draft:
        found = [self._continuation(row, text, count) for row, text in enumerate(texts)]
        width = max(map(len, found))
        padded = [ids + [0] * (width - len(ids)) for ids in found]
        return Draft(
            torch.tensor(padded, dtype=torch.int64, device=self._device).reshape(len(found), width),
            counts=torch.tensor([len(ids) for ids in found], device=self._device),
        )

    def _continuation(self, row: int, text: Sequence[int], count: int) -> list[int]:
        places = self._places[row]
        for end in range(self._indexed[row], len(text)):
            for size in self._sizes:
                if size <= end:
                    places[tuple(text[end - size : end])] = end
        self._indexed[row] = max(self._indexed[row], len(text))
        for size in self._sizes:
            place = places.get(tuple(text[-size:])) if size <= len(text) else None
            if place is not None and place < len(text):
                return list(text[place : place + count])
        return []

"""Samples for next-token prediction: windows of the stream of documents."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch

from flash_attn_train.data.batches import Batch


class Windows(Protocol):
    """Windows of ``seqlen`` + 1 tokens by number."""

    def __len__(self) -> int: ...

    def read(self, numbers: np.ndarray) -> np.ndarray: ...


class LanguageModelSamples:
    """``input_ids`` and ``labels``, (n, S) int64: the token after each.

    Args:
        windows: of S + 1 tokens.
        end_of_text: if given, the batch also says where documents are, for attention inside them:
            ``cu_seqlens``, int32 (documents + 1,), their ends in the n * S flattened tokens, and ``max_seqlen``.

    A document begins with the end-of-text token of the one before. So that token, which sees itself alone, predicts
    the first token of a text; every label counts, no token is predicted from another document, and a sample can be
    started from the end-of-text token. A row begins a document too, be it in the middle of one.
    """

    def __init__(self, windows: Windows, *, end_of_text: int | None = None) -> None:
        self.windows, self.end_of_text = windows, end_of_text

    def __len__(self) -> int:
        return len(self.windows)

    def batch(self, numbers: np.ndarray) -> Batch:
        return language_model_batch(self.windows.read(numbers), self.end_of_text)


def language_model_batch(rows: np.ndarray, end_of_text: int | None) -> Batch:
    """(n, S + 1) int64 -> the batch, see :class:`LanguageModelSamples`."""
    inputs = np.ascontiguousarray(rows[:, :-1])
    batch: Batch = {
        "input_ids": torch.from_numpy(inputs),
        "labels": torch.from_numpy(np.ascontiguousarray(rows[:, 1:])),
    }
    if end_of_text is not None:
        begins = inputs == end_of_text
        begins[:, 0] = True
        cu_seqlens = np.append(np.flatnonzero(begins), inputs.size).astype(np.int32)
        batch["cu_seqlens"] = torch.from_numpy(cu_seqlens)
        batch["max_seqlen"] = int(np.diff(cu_seqlens).max())
    return batch

"""Batches that say where documents are."""

from __future__ import annotations

import numpy as np
import torch
from flash_attn_train.data.language_model import LanguageModelSamples, language_model_batch
from flash_attn_train.data.tokens import Tokens
from flash_attn_train.data.windows import TrainWindows

END = 0


def test_documents_begin_with_the_end_of_the_one_before() -> None:
    rows = np.array([[5, 6, END, 7, 8, 9, END], [END, END, 4, 3, 2, 1, END]])
    batch = language_model_batch(rows, END)
    assert batch["input_ids"].tolist() == rows[:, :-1].tolist()
    assert batch["labels"].tolist() == rows[:, 1:].tolist()  # every label counts
    assert batch["cu_seqlens"].dtype == torch.int32
    # 5 6 | END 7 8 9 || END | END 4 3 2 1
    assert batch["cu_seqlens"].tolist() == [0, 2, 6, 7, 12]
    assert batch["max_seqlen"] == 5


def test_no_target_is_in_another_document_than_its_input() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 12, 4000).astype(np.uint16)
    samples = LanguageModelSamples(TrainWindows(Tokens([tokens]), seqlen=32, seed=3), end_of_text=END)
    batch = samples.batch(np.arange(8))
    inputs, labels, cu_seqlens = batch["input_ids"].flatten(), batch["labels"].flatten(), batch["cu_seqlens"]
    assert cu_seqlens[0] == 0 and cu_seqlens[-1] == 8 * 32
    assert set(range(0, 8 * 32, 32)) <= set(cu_seqlens.tolist())
    assert batch["max_seqlen"] == cu_seqlens.diff().max()
    for start, stop in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        assert stop > start
        assert END not in inputs[start + 1 : stop]  # no other document inside
        assert torch.equal(inputs[start + 1 : stop], labels[start : stop - 1])


def test_across_documents_has_no_boundaries() -> None:
    batch = language_model_batch(np.array([[5, END, 7]]), None)
    assert sorted(batch) == ["input_ids", "labels"]

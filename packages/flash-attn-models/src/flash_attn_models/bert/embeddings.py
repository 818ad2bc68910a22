"""Embeddings of texts for search and clustering: one vector of length 1 for each sequence."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from flash_attn_models.bert.heads import BertForMaskedLM, BertForPreTraining
from flash_attn_models.bert.model import BertModel
from flash_attn_models.bert.tokens import TokenBatch
from flash_attn_models.errors import bad_argument

Pooling = Literal["mean", "first"]


def encode(
    model: BertModel | BertForMaskedLM | BertForPreTraining,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    *,
    pooling: Pooling = "mean",
    normalize: bool = True,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    padding_free: bool | None = None,
) -> Tensor:
    """One vector for each sequence; the product of two is their cosine similarity.

    Put the model in evaluation mode, and call this under ``torch.inference_mode()`` unless it is being trained.

    Args:
        model: the encoder; of a model with heads, its encoder is taken.
        input_ids, attention_mask, token_type_ids, cu_seqlens, max_seqlen, padding_free: see ``BertModel.forward``.
        pooling: "mean" of a sequence's real tokens [Reimers & Gurevych 2019, Sentence-BERT, arXiv:1908.10084], or its
            "first" token. It is the one that the model was trained with.
        normalize: divide each vector by its length.

    Returns:
        (B,d_model), float32 (float64 of a float64 model). Zeros for a sequence without tokens.

    Raises:
        ValueError: as ``BertModel.forward``; an unknown pooling; a model of another kind.
    """
    if pooling not in ("mean", "first"):
        raise bad_argument("pooling", repr(pooling), "'mean' or 'first'", "use the model's own pooling")
    bert = model if isinstance(model, BertModel) else getattr(model, "bert", None)
    if not isinstance(bert, BertModel):
        raise bad_argument("model", f"a {type(model).__name__}", "a BERT model", "load one")
    batch = bert.prepare(input_ids, attention_mask, token_type_ids, cu_seqlens, max_seqlen, padding_free)
    hidden = bert.encode(batch)
    if hidden.element_size() < 4:  # sums of many tokens, and what comes of them, are worth more than 16 bits
        hidden = hidden.float()
    vectors = batch.first_of_each(hidden) if pooling == "first" else _mean_of_each(hidden, batch)
    return F.normalize(vectors, dim=-1) if normalize else vectors


def _mean_of_each(hidden: Tensor, batch: TokenBatch) -> Tensor:
    """The mean over each sequence of (B,S,N) or (T,N): (B,N)."""
    if batch.cu_seqlens is not None:
        lengths = batch.cu_seqlens.diff()
        # In a fixed order, unlike sums by index: the same vectors every time.
        sums = torch.segment_reduce(hidden, "sum", lengths=lengths.long(), axis=0, unsafe=True, initial=0)
        return sums / lengths.clamp(min=1)[:, None]
    if batch.is_real is None:
        return hidden.mean(dim=1)
    sums = hidden.masked_fill(~batch.is_real[..., None], 0.0).sum(dim=1)
    return sums / batch.is_real.sum(dim=1, keepdim=True).clamp(min=1)

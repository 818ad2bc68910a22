"""The tensors and options of one attention call, in the form that every path takes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .options import AttentionOptions


@dataclass(frozen=True)
class PackedLayout:
    """How packed (varlen) tensors divide into sequences.

    Token t of sequence b is row ``cu_seqlens[b] + t``. With ``block_table`` int32 (B, max_pages), keys and values are
    pages (num_pages, page_size, Hk, D) and ``cu_seqlens_k`` only gives the lengths.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    block_table: Tensor | None = None


@dataclass(frozen=True)
class AttentionInputs:
    """One call: dense (B, S, H, D) tensors, or packed (T, H, D) tensors with a layout."""

    q: Tensor
    k: Tensor
    v: Tensor
    options: AttentionOptions
    alibi_slopes: Tensor | None = None
    seed_and_offset: Tensor | None = None
    packed: PackedLayout | None = None

"""The tensors and options of one attention call, in the form that every path takes.

Named tuples, because every call makes some, and a frozen dataclass takes several times as long.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .options import AttentionOptions


class PackedLayout(NamedTuple):
    """How packed (varlen) tensors divide into sequences.

    Token t of sequence b is row ``cu_seqlens[b] + t``; with ``seqused`` int32 (B,) only the first ``seqused[b]`` of
    them exist. With ``block_table`` int32 (B, max_pages), keys and values are pages (num_pages, page_size, Hk, D), and
    ``cu_seqlens_k`` only gives the lengths.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    seqused_q: Tensor | None = None
    seqused_k: Tensor | None = None
    block_table: Tensor | None = None


class ScoreModifiers(NamedTuple):
    """Tensors that change the scores. B is the number of sequences; size 1 stands for every index of its dimension.

    Rows and columns of ``attn_bias`` and ``attn_mask`` are positions inside a sequence, in packed calls too. Where
    such a dimension is neither 1 nor long enough for a sequence, positions past its end get bias 0 and are invisible.
    """

    attn_bias: Tensor | None = None  # (1|B, 1|H, 1|Sq, 1|Sk) fp16, bf16 or fp32 (fp64 in the portable path)
    attn_mask: Tensor | None = None  # bool (1|B, 1|H, 1|Sq, 1|Sk), True is visible
    key_padding_mask: Tensor | None = None  # bool (B, Sk), True is a real key; others may hold NaN
    alibi_slopes: Tensor | None = None  # (1|B, H)
    learnable_sink: Tensor | None = None  # (H,): one more logit per row, without a value


NO_MODIFIERS = ScoreModifiers()  # this one, so that a call without any is told by identity


class AttentionInputs(NamedTuple):
    """One call: dense (B, S, H, D) tensors, or packed (T, H, D) tensors with a layout."""

    q: Tensor
    k: Tensor
    v: Tensor
    options: AttentionOptions
    modifiers: ScoreModifiers = NO_MODIFIERS
    seed_and_offset: Tensor | None = None
    packed: PackedLayout | None = None


class Gradients(NamedTuple):
    """Gradients of one call. Those of the modifiers are None where there is no such tensor or none was asked for."""

    q: Tensor
    k: Tensor
    v: Tensor
    attn_bias: Tensor | None = None  # in the shape of ``ScoreModifiers.attn_bias``
    alibi_slopes: Tensor | None = None  # (1|B, H)
    learnable_sink: Tensor | None = None  # (H,)

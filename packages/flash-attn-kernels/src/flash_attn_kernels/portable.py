"""The portable path: dense, packed and paged attention on any device, on top of the blockwise algorithm.

Packed sequences are handled one at a time, so nothing outside a sequence is ever read, whatever it holds. Their
lengths are read on the host; for tensors on a GPU that is one synchronisation per call.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import blockwise
from .blockwise_scores import Sequence, compute_dtype
from .inputs import AttentionInputs, Gradients, PackedLayout, ScoreModifiers
from .options import AttentionOptions


@dataclass(frozen=True)
class _Part:
    """What the blockwise algorithm does in one go: the whole of a dense call, or one sequence of a packed one.

    Its methods give the part's share of a tensor as a view in the layout (1|B, S, ...) of a dense call; only the keys
    of a paged call are gathered, into a copy.
    """

    index: int | None  # of the sequence; None for a dense call
    query: slice
    key: slice | Tensor  # rows or, when paged, row numbers

    def query_rows(self, x: Tensor) -> Tensor:
        return x if self.index is None else x[self.query].unsqueeze(0)

    def row_values(self, x_HT: Tensor) -> Tensor:
        return x_HT if self.index is None else x_HT[:, self.query].unsqueeze(0)

    def key_rows(self, x: Tensor) -> Tensor:
        return x if self.index is None else _token_rows(x)[self.key].unsqueeze(0)

    def of_batch(self, x: Tensor) -> Tensor:
        """Of a tensor (1|B, ...), the entry of this sequence."""
        return x if self.index is None or x.shape[0] == 1 else x[self.index : self.index + 1]

    def sequence(self, inputs: AttentionInputs) -> Sequence:
        modifiers = inputs.modifiers
        return Sequence(
            self.query_rows(inputs.q),
            self.key_rows(inputs.k),
            self.key_rows(inputs.v),
            inputs.options,
            ScoreModifiers(
                attn_bias=self._of_batch_or_none(modifiers.attn_bias),
                attn_mask=self._of_batch_or_none(modifiers.attn_mask),
                key_padding_mask=self._of_batch_or_none(modifiers.key_padding_mask),
                alibi_slopes=self._of_batch_or_none(modifiers.alibi_slopes),
                learnable_sink=modifiers.learnable_sink,
            ),
            inputs.seed_and_offset,
            batch_offset=self.index or 0,
        )

    def gradients(self, total: Gradients) -> Gradients:
        """Views of the total where this part adds its own; for gathered keys a buffer of zeros."""
        dk, dv = self.key_rows(total.k), self.key_rows(total.v)
        if isinstance(self.key, Tensor):
            dk, dv = torch.zeros_like(dk), torch.zeros_like(dv)
        return Gradients(
            self.query_rows(total.q),
            dk,
            dv,
            attn_bias=self._of_batch_or_none(total.attn_bias),
            alibi_slopes=self._of_batch_or_none(total.alibi_slopes),
            learnable_sink=total.learnable_sink,
        )

    def _of_batch_or_none(self, x: Tensor | None) -> Tensor | None:
        return None if x is None else self.of_batch(x)


def forward(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """``out`` in the layout of q with the head dim of v, and ``lse`` fp32 (fp64 for fp64): (B, H, Sq) or (H, Tq).

    Packed rows that belong to no sequence get 0 and -inf.
    """
    q, v = inputs.q, inputs.v
    H = q.shape[-2]
    lse_shape = (q.shape[0], H, q.shape[1]) if inputs.packed is None else (H, q.shape[0])
    out = q.new_zeros((*q.shape[:-1], v.shape[-1]))
    lse = q.new_full(lse_shape, float("-inf"), dtype=compute_dtype(q.dtype))
    for part in _parts(inputs):
        blockwise.forward(part.sequence(inputs), part.query_rows(out), part.row_values(lse))
    return out, lse


def plain_forward(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """:func:`forward` of a dense call without modifiers and dropout."""
    return forward(AttentionInputs(q, k, v, options))


def backward(
    inputs: AttentionInputs,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    *,
    needs_attn_bias: bool,
    needs_alibi_slopes: bool,
    needs_learnable_sink: bool,
) -> Gradients:
    """Gradients of ``sum(dout * out) + sum(dlse * lse)``, each in the shape and dtype of its tensor in ``inputs``.

    Sums are kept in compute precision and cast once at the end. Pages that several sequences share collect the
    gradients of all of them.
    """
    modifiers = inputs.modifiers
    dtype = compute_dtype(inputs.q.dtype)

    def zeros(x: Tensor) -> Tensor:
        return x.new_zeros(x.shape, dtype=dtype)  # contiguous, so that pages flatten to token rows as a view

    def zeros_if(needed: bool, x: Tensor | None) -> Tensor | None:
        return zeros(x) if needed and x is not None else None

    total = Gradients(
        zeros(inputs.q),
        zeros(inputs.k),
        zeros(inputs.v),
        zeros_if(needs_attn_bias, modifiers.attn_bias),
        zeros_if(needs_alibi_slopes, modifiers.alibi_slopes),
        zeros_if(needs_learnable_sink, modifiers.learnable_sink),
    )
    for part in _parts(inputs):
        gradients = part.gradients(total)
        blockwise.backward(
            part.sequence(inputs),
            part.query_rows(out),
            part.row_values(lse),
            part.query_rows(dout),
            None if dlse is None else part.row_values(dlse),
            gradients,
        )
        if isinstance(part.key, Tensor):
            _token_rows(total.k).index_put_((part.key,), gradients.k[0], accumulate=True)
            _token_rows(total.v).index_put_((part.key,), gradients.v[0], accumulate=True)
    return Gradients(
        total.q.to(inputs.q.dtype),
        total.k.to(inputs.k.dtype),
        total.v.to(inputs.v.dtype),
        _cast_like(total.attn_bias, modifiers.attn_bias),
        _cast_like(total.alibi_slopes, modifiers.alibi_slopes),
        _cast_like(total.learnable_sink, modifiers.learnable_sink),
    )


def probabilities(inputs: AttentionInputs, lse: Tensor) -> Tensor:
    """Normalised probabilities (B, H, Sq, Sk) in the dtype of q; quadratic memory.

    The sign bit is set where dropout removed an element, also where the probability is 0: that element is -0.0. For
    a packed call Sq and Sk are the lengths of the longest query and key sequence that there are, and what lies past
    the end of a shorter one is 0.
    """
    q, parts = inputs.q, list(_parts(inputs))
    H = q.shape[-2]
    sequences = [part.sequence(inputs) for part in parts]
    seqlen_q = max([0, *(sequence.q.shape[1] for sequence in sequences)])
    seqlen_k = max([0, *(sequence.k.shape[1] for sequence in sequences)])
    batch = q.shape[0] if inputs.packed is None else len(parts)
    result = q.new_zeros((batch, H, seqlen_q, seqlen_k))
    for part, sequence in zip(parts, sequences, strict=True):
        target = part.of_batch(result)[:, :, : sequence.q.shape[1], : sequence.k.shape[1]]
        blockwise.probabilities(sequence, part.row_values(lse), target)
    return result


def _parts(inputs: AttentionInputs) -> Iterator[_Part]:
    packed = inputs.packed
    if packed is None:
        yield _Part(None, slice(None), slice(None))
        return
    for index, (query_begin, query_length, key_begin, key_length) in enumerate(_begins_and_lengths(packed)):
        key: slice | Tensor = slice(key_begin, key_begin + key_length)
        if packed.block_table is not None:
            page_size = inputs.k.shape[1]
            position = torch.arange(key_length, device=inputs.k.device)
            key = packed.block_table[index, position // page_size].long() * page_size + position % page_size
        yield _Part(index, slice(query_begin, query_begin + query_length), key)


def _begins_and_lengths(packed: PackedLayout) -> list[list[int]]:
    """[query begin, query length, key begin, key length] of each sequence, read from the device in one go."""
    columns = []
    for cu_seqlens, seqused in (
        (packed.cu_seqlens_q, packed.seqused_q),
        (packed.cu_seqlens_k, packed.seqused_k),
    ):
        lengths = cu_seqlens.diff()
        columns += [cu_seqlens[:-1], lengths if seqused is None else torch.minimum(lengths, seqused)]
    return torch.stack(columns, dim=1).tolist()


def _token_rows(x: Tensor) -> Tensor:
    """Packed tensors are token rows already; pages (num_pages, page_size, ...) are flattened to them."""
    return x if x.dim() == 3 else x.flatten(0, 1)


def _cast_like(gradient: Tensor | None, like: Tensor | None) -> Tensor | None:
    return None if gradient is None or like is None else gradient.to(like.dtype)

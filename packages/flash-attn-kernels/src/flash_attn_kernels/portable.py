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
from .inputs import AttentionInputs


@dataclass(frozen=True)
class _Rows:
    """Where one sequence lives: query rows as a slice, key rows as a slice or, when paged, as row numbers."""

    index: int
    query: slice
    key: slice | Tensor


def forward(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """``out`` in the layout of q with the head dim of v, and ``lse`` fp32 (fp64 for fp64): (B, H, Sq) or (H, Tq)."""
    q, v = inputs.q, inputs.v
    lse_dtype = blockwise.compute_dtype(q.dtype)
    if inputs.packed is None:
        B, Sq, H, _ = q.shape
        out = q.new_empty((B, Sq, H, v.shape[-1]))
        lse = q.new_empty((B, H, Sq), dtype=lse_dtype)
        blockwise.forward(_dense_sequence(inputs), out, lse)
        return out, lse
    # Rows after the last sequence belong to nobody: they hold the result of an empty row.
    out = q.new_zeros((*q.shape[:2], v.shape[-1]))
    lse = q.new_full((q.shape[1], q.shape[0]), float("-inf"), dtype=lse_dtype)
    for rows in _sequences(inputs):
        sequence = _packed_sequence(inputs, rows)
        blockwise.forward(sequence, out[rows.query].unsqueeze(0), lse[:, rows.query].unsqueeze(0))
    return out, lse


def backward(
    inputs: AttentionInputs, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv in the layouts and dtypes of q, k, v, and the gradient of the ALiBi slopes (None without them)."""
    q, k, v, slopes = inputs.q, inputs.k, inputs.v, inputs.alibi_slopes
    dslopes = None if slopes is None else torch.zeros_like(slopes, dtype=blockwise.compute_dtype(q.dtype))
    if inputs.packed is None:
        sequence = _dense_sequence(inputs)
        gradients = _zero_gradients(sequence)
        blockwise.backward(sequence, out, lse, dout, dlse, gradients)
        _add_slopes(dslopes, gradients.dslopes, slice(None))
        dk, dv = (x.transpose(1, 2) for x in (gradients.dk, gradients.dv))
        dq = gradients.dq
    else:
        dq, dk, dv = (torch.zeros_like(x, dtype=blockwise.compute_dtype(q.dtype)) for x in (q, k, v))
        flat_dk, flat_dv = _token_rows(dk), _token_rows(dv)
        for rows in _sequences(inputs):
            sequence = _packed_sequence(inputs, rows)
            gradients = _zero_gradients(sequence)
            blockwise.backward(
                sequence,
                out[rows.query].unsqueeze(0),
                lse[:, rows.query].unsqueeze(0),
                dout[rows.query].unsqueeze(0),
                None if dlse is None else dlse[:, rows.query].unsqueeze(0),
                gradients,
            )
            dq[rows.query] = gradients.dq[0]
            # Sequences may share pages, so key rows are added to, not assigned.
            flat_dk[rows.key] += gradients.dk[0].transpose(0, 1)
            flat_dv[rows.key] += gradients.dv[0].transpose(0, 1)
            _add_slopes(dslopes, gradients.dslopes, slice(rows.index, rows.index + 1))
    return (
        dq.to(q.dtype),
        dk.to(k.dtype),
        dv.to(v.dtype),
        None if dslopes is None or slopes is None else dslopes.to(slopes.dtype),
    )


def probabilities(inputs: AttentionInputs, lse: Tensor) -> Tensor:
    """Normalised probabilities (B, H, Sq, Sk) of a dense call, negative where dropped."""
    return blockwise.probabilities(_dense_sequence(inputs), lse)


def _dense_sequence(inputs: AttentionInputs) -> blockwise.Sequence:
    slopes = None if inputs.alibi_slopes is None else inputs.alibi_slopes.reshape(-1, inputs.q.shape[2])
    return blockwise.Sequence(inputs.q, inputs.k, inputs.v, inputs.options, slopes, inputs.seed_and_offset)


def _packed_sequence(inputs: AttentionInputs, rows: _Rows) -> blockwise.Sequence:
    slopes = inputs.alibi_slopes
    if slopes is not None:
        slopes = (slopes if slopes.dim() == 1 else slopes[rows.index]).unsqueeze(0)
    return blockwise.Sequence(
        inputs.q[rows.query].unsqueeze(0),
        _token_rows(inputs.k)[rows.key].unsqueeze(0),
        _token_rows(inputs.v)[rows.key].unsqueeze(0),
        inputs.options,
        slopes,
        inputs.seed_and_offset,
        batch_offset=rows.index,
    )


def _token_rows(x: Tensor) -> Tensor:
    """Packed tensors are token rows already; pages (num_pages, page_size, ...) are flattened to them."""
    return x if x.dim() == 3 else x.flatten(0, 1)


def _sequences(inputs: AttentionInputs) -> Iterator[_Rows]:
    assert inputs.packed is not None
    query_ends, key_ends = inputs.packed.cu_seqlens_q.tolist(), inputs.packed.cu_seqlens_k.tolist()
    table = inputs.packed.block_table
    for b in range(len(query_ends) - 1):
        key: slice | Tensor = slice(key_ends[b], key_ends[b + 1])
        if table is not None:
            page_size = inputs.k.shape[1]
            position = torch.arange(key_ends[b + 1] - key_ends[b], device=table.device)
            key = table[b, position // page_size].long() * page_size + position % page_size
        yield _Rows(b, slice(query_ends[b], query_ends[b + 1]), key)


def _zero_gradients(sequence: blockwise.Sequence) -> blockwise.Gradients:
    dtype = blockwise.compute_dtype(sequence.q.dtype)
    B, _, H, _ = sequence.q.shape
    return blockwise.Gradients(
        dq=torch.zeros_like(sequence.q, dtype=dtype),
        dk=torch.zeros_like(sequence.k.transpose(1, 2), dtype=dtype),
        dv=torch.zeros_like(sequence.v.transpose(1, 2), dtype=dtype),
        dslopes=None if sequence.alibi_slopes is None else sequence.q.new_zeros((B, H), dtype=dtype),
    )


def _add_slopes(total: Tensor | None, part_BH: Tensor | None, batch: slice) -> None:
    if total is None or part_BH is None:
        return
    if total.dim() == 1:
        total += part_BH.sum(dim=0)
    else:
        total[batch] += part_BH

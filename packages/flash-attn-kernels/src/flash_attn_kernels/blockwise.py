"""Blockwise attention in plain torch operations: any device, any dtype, memory linear in sequence length.

The forward keeps a running row maximum and sum (online softmax, Milakov & Gimelshein 2018; Dao et al. 2022); the
backward recomputes the probabilities of a block from the saved log-sum-exp. A block of scores is the only quadratic
object that ever exists.

Shape letters: B batch, S/T query/key block, H query heads, K key-value heads, G = H / K, D head dim, V value dim.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .blockwise_scores import Sequence, modifier_window
from .inputs import Gradients

QUERY_BLOCK = 256
KEY_BLOCK = 512


def _query_blocks(sequence: Sequence) -> Iterator[tuple[slice, slice]]:
    """(query rows, keys that the window lets them see) of each query block; none without batch entries or heads."""
    if sequence.q.shape[0] == 0 or sequence.q.shape[2] == 0:
        return
    seqlen_q, seqlen_k = sequence.q.shape[1], sequence.k.shape[1]
    for begin in range(0, seqlen_q, QUERY_BLOCK):
        end = min(begin + QUERY_BLOCK, seqlen_q)
        yield slice(begin, end), slice(*sequence.options.visible_keys(begin, end, seqlen_q, seqlen_k))


def _key_blocks(columns: slice) -> Iterator[slice]:
    for begin in range(columns.start, columns.stop, KEY_BLOCK):
        yield slice(begin, min(begin + KEY_BLOCK, columns.stop))


def forward(sequence: Sequence, out: Tensor, lse: Tensor) -> None:
    """Fill ``out`` (B, Sq, H, V) and ``lse`` (B, H, Sq), natural log; rows that see nothing get 0 and -inf.

    A learnable sink is a score that every row has seen before its first key, and that has no value.
    """
    B, _, H, _ = sequence.q.shape
    K, V = sequence.v.shape[2:]
    sink = sequence.modifiers.learnable_sink
    for rows, visible in _query_blocks(sequence):
        S = rows.stop - rows.start
        q_block = sequence.rows_by_kv_head(sequence.q, rows)
        if sink is None:
            row_max = q_block.new_full((B, H, S), float("-inf"))
            row_sum = q_block.new_zeros((B, H, S))
        else:
            row_max = sink.to(q_block.dtype).reshape(1, H, 1).expand(B, H, S)
            row_sum = q_block.new_ones((B, H, S))
        accumulator = q_block.new_zeros((B, K, H // K * S, V))
        for columns in _key_blocks(visible):
            scores, _ = sequence.scores(q_block, rows, columns)
            new_max = torch.maximum(row_max, scores.amax(dim=-1))
            # A row that has seen nothing yet keeps -inf; subtracting 0 instead avoids (-inf) - (-inf).
            shift = new_max.masked_fill(new_max == float("-inf"), 0.0)
            correction = torch.exp(row_max - shift)
            weights = torch.exp(scores - shift.unsqueeze(-1))
            row_sum = row_sum * correction + weights.sum(dim=-1)
            row_max = new_max
            dropout = sequence.dropout_scale(rows, columns)
            if dropout is not None:
                weights = weights * dropout
            accumulator = accumulator * correction.reshape(B, K, -1, 1)
            accumulator += weights.reshape(B, K, -1, weights.shape[-1]) @ sequence.keys(sequence.v, columns)
        row_lse = row_max + torch.log(row_sum)
        normaliser = torch.where(row_sum > 0, 1.0 / row_sum, 0.0)
        # A NaN score makes the sum NaN, not 0: the row must come out NaN, not silently empty.
        normaliser = torch.where(row_sum.isnan(), row_sum, normaliser)
        out[:, rows] = sequence.rows_by_head(accumulator * normaliser.reshape(B, K, -1, 1)).to(out.dtype)
        lse[:, :, rows] = row_lse.to(lse.dtype)


def backward(
    sequence: Sequence, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, gradients: Gradients
) -> None:
    """Add the gradients of ``sum(dout * out) + sum(dlse * lse)`` to ``gradients``, which are in compute precision.

    With P the undropped probabilities and M the dropout scale: dV = (P∘M)^T dO, dP = (dO V^T)∘M,
    delta = rowsum(dO∘O) - dLSE, dS = P∘(dP - delta). dS, summed over what is broadcast, is the gradient of the bias,
    -sum(dS∘|distance|) that of the ALiBi slopes and -sum(exp(sink - lse)∘delta) that of the sink. Softcap multiplies
    dS by 1 - tanh^2; then dQ = c dS K, dK = c dS^T Q.
    """
    B, _, H, _ = sequence.q.shape
    K = sequence.k.shape[2]
    scale = sequence.options.softmax_scale
    dk, dv = gradients.k.transpose(1, 2), gradients.v.transpose(1, 2)
    for rows, visible in _query_blocks(sequence):
        q_block = sequence.rows_by_kv_head(sequence.q, rows)
        dout_block = sequence.rows_by_kv_head(dout, rows)
        out_block = sequence.rows_by_kv_head(out, rows)
        delta = (dout_block * out_block).sum(dim=-1).reshape(B, H, -1)
        if dlse is not None:
            delta = delta - dlse[:, :, rows].to(delta.dtype)
        row_lse = lse[:, :, rows].to(q_block.dtype)
        # The LSE of a row that sees nothing is a constant: nothing flows back, not even a NaN gradient of -inf.
        sees_nothing = row_lse == float("-inf")
        row_lse, delta = row_lse.masked_fill(sees_nothing, 0.0), delta.masked_fill(sees_nothing, 0.0)
        if gradients.learnable_sink is not None:
            _add_sink_gradient(sequence, row_lse, delta, gradients.learnable_sink)
        dq_block = torch.zeros_like(q_block)
        for columns in _key_blocks(visible):
            T = columns.stop - columns.start
            scores, tanh = sequence.scores(q_block, rows, columns)
            weights = probabilities = torch.exp(scores - row_lse.unsqueeze(-1))
            dprobabilities = dout_block @ sequence.keys(sequence.v, columns).transpose(-1, -2)
            dprobabilities = dprobabilities.reshape(scores.shape)
            dropout = sequence.dropout_scale(rows, columns)
            if dropout is not None:
                weights = probabilities * dropout
                dprobabilities = dprobabilities * dropout
            dv[:, :, columns].add_(weights.reshape(B, K, -1, T).transpose(-1, -2) @ dout_block)
            dscores = probabilities * (dprobabilities - delta.unsqueeze(-1))
            if gradients.attn_bias is not None:
                _add_bias_gradient(dscores, rows, columns, gradients.attn_bias)
            if gradients.alibi_slopes is not None:
                by_head = (dscores * sequence.key_distance(rows, columns).abs()).sum(dim=(-1, -2))
                gradients.alibi_slopes.sub_(by_head.sum_to_size(gradients.alibi_slopes.shape))
            if tanh is not None:
                dscores = dscores * (1.0 - tanh * tanh)
            dscores = dscores.reshape(B, K, -1, T)
            dq_block += dscores @ sequence.keys(sequence.k, columns)
            dk[:, :, columns].add_(dscores.transpose(-1, -2) @ q_block, alpha=scale)
        gradients.q[:, rows].add_(sequence.rows_by_head(dq_block), alpha=scale)


def _add_bias_gradient(dscores: Tensor, rows: slice, columns: slice, dbias: Tensor) -> None:
    """Add dS of a block to the part of ``dbias`` (1|B, 1|H, 1|Sq, 1|Sk) that the block met, broadcasts summed."""
    target = modifier_window(dbias, rows, columns)
    if dbias.shape[2] != 1:
        dscores = dscores[:, :, : target.shape[2]]
    if dbias.shape[3] != 1:
        dscores = dscores[..., : target.shape[3]]
    target.add_(dscores.sum_to_size(target.shape))


def _add_sink_gradient(sequence: Sequence, row_lse: Tensor, delta: Tensor, dsink: Tensor) -> None:
    """The sink's score has the probability exp(sink - lse) and the value 0."""
    sink = sequence.modifiers.learnable_sink
    assert sink is not None, "a gradient was asked for a sink that the call does not have"
    dsink.sub_((torch.exp(sink.to(row_lse.dtype)[:, None] - row_lse) * delta).sum(dim=(0, 2)))


def probabilities(sequence: Sequence, lse: Tensor, result: Tensor) -> None:
    """Fill ``result`` (B, H, Sq, Sk) with the normalised probabilities, sign bit set where dropout removed one.

    The whole matrix is visited, not only what the window shows, since a dropped 0 carries its sign too: -0.0.
    """
    for rows, _ in _query_blocks(sequence):
        q_block = sequence.rows_by_kv_head(sequence.q, rows)
        row_lse = lse[:, :, rows].to(q_block.dtype)
        row_lse = row_lse.masked_fill(row_lse == float("-inf"), 0.0)
        for columns in _key_blocks(slice(0, sequence.k.shape[1])):
            scores, _ = sequence.scores(q_block, rows, columns)
            block = torch.exp(scores - row_lse.unsqueeze(-1))
            kept = sequence.kept(rows, columns)
            if kept is not None:
                block = torch.where(kept, block, -block)
            result[:, :, rows, columns] = block.to(result.dtype)

"""Blockwise attention in plain torch operations: any device, any dtype, memory linear in sequence length.

The forward keeps a running row maximum and sum (online softmax, Milakov & Gimelshein 2018; Dao et al. 2022); the
backward recomputes the probabilities of a block from the saved log-sum-exp. A block of scores is the only quadratic
object that ever exists.

Shape letters: B batch, S/T query/key block, H query heads, K key-value heads, G = H / K, D head dim, V value dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .options import AttentionOptions
from .philox import keep_mask

QUERY_BLOCK = 256
KEY_BLOCK = 512


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Precision of the arithmetic: fp64 stays fp64, everything else is computed in fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Sequence:
    """Attention of one dense batch, or of one sequence of a packed batch (then B is 1).

    ``alibi_slopes`` is (B or 1, H) or None. ``seed_and_offset`` is int64 (2,) when there is dropout.
    ``batch_offset`` is the index of the first batch entry, which keys the dropout mask.
    """

    q: Tensor  # (B, Sq, H, D)
    k: Tensor  # (B, Sk, K, D)
    v: Tensor  # (B, Sk, K, V)
    options: AttentionOptions
    alibi_slopes: Tensor | None = None
    seed_and_offset: Tensor | None = None
    batch_offset: int = 0

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """(query rows, visible key range) of each query block; none without batch entries or heads."""
        if self.q.shape[0] == 0 or self.q.shape[2] == 0:
            return
        seqlen_q, seqlen_k = self.q.shape[1], self.k.shape[1]
        for begin in range(0, seqlen_q, QUERY_BLOCK):
            end = min(begin + QUERY_BLOCK, seqlen_q)
            yield slice(begin, end), slice(*self.options.visible_keys(begin, end, seqlen_q, seqlen_k))

    def rows_by_kv_head(self, x_BSHD: Tensor, rows: slice) -> Tensor:
        """Query rows as (B, K, G*S, D) in compute precision: heads that share a key head become more rows."""
        B, _, H, D = x_BSHD.shape
        K = self.k.shape[2]
        block = x_BSHD[:, rows].to(compute_dtype(self.q.dtype))
        return block.reshape(B, -1, K, H // K, D).permute(0, 2, 3, 1, 4).reshape(B, K, -1, D)

    def rows_by_head(self, x_BKRD: Tensor) -> Tensor:
        """Inverse of :meth:`rows_by_kv_head`: (B, K, G*S, D) to (B, S, H, D)."""
        B, K, rows, D = x_BKRD.shape
        H = self.q.shape[2]
        return x_BKRD.reshape(B, H, rows * K // H, D).transpose(1, 2)

    def keys(self, x_BTKD: Tensor, columns: slice) -> Tensor:
        """Key or value rows as (B, K, T, D) in compute precision."""
        return x_BTKD[:, columns].to(compute_dtype(self.q.dtype)).transpose(1, 2)

    def scores(self, q_BKRD: Tensor, rows: slice, columns: slice) -> tuple[Tensor, Tensor | None]:
        """Scores (B, H, S, T), -inf where invisible, and tanh of the capped scores for the backward."""
        B, _K, _, _ = q_BKRD.shape
        H, S, T = self.q.shape[2], rows.stop - rows.start, columns.stop - columns.start
        options = self.options
        scores = (q_BKRD @ self.keys(self.k, columns).transpose(-1, -2)).mul_(options.softmax_scale)
        scores = scores.reshape(B, H, S, T)
        tanh = None
        if options.softcap > 0:
            tanh = torch.tanh(scores / options.softcap)
            scores = options.softcap * tanh
        if options.is_full and self.alibi_slopes is None:
            return scores, tanh
        distance = self.key_distance(rows, columns)
        if self.alibi_slopes is not None:
            scores = scores - self.alibi_slopes.to(scores)[:, :, None, None] * distance.abs()
        if options.window_left is not None:
            scores = scores.masked_fill(distance < -options.window_left, float("-inf"))
        if options.window_right is not None:
            scores = scores.masked_fill(distance > options.window_right, float("-inf"))
        return scores, tanh

    def key_distance(self, rows: slice, columns: slice) -> Tensor:
        """int64 (S, T): key position minus the query's diagonal position."""
        device = self.q.device
        diagonal = torch.arange(rows.start, rows.stop, device=device) + (self.k.shape[1] - self.q.shape[1])
        return torch.arange(columns.start, columns.stop, device=device) - diagonal.unsqueeze(-1)

    def dropout_scale(self, rows: slice, columns: slice) -> Tensor | None:
        """(B, H, S, T) of 0 and 1/(1-p), or None without dropout."""
        p = self.options.dropout_p
        if p == 0.0 or self.seed_and_offset is None:
            return None
        B, H, device = self.q.shape[0], self.q.shape[2], self.q.device
        flat_heads = self.batch_offset * H + torch.arange(B * H, device=device).reshape(B, H, 1, 1)
        kept = keep_mask(
            self.seed_and_offset,
            flat_heads,
            torch.arange(rows.start, rows.stop, device=device),
            torch.arange(columns.start, columns.stop, device=device),
            p,
        )
        return kept.to(compute_dtype(self.q.dtype)) / (1.0 - p)


def _split(columns: slice) -> Iterator[slice]:
    for begin in range(columns.start, columns.stop, KEY_BLOCK):
        yield slice(begin, min(begin + KEY_BLOCK, columns.stop))


def forward(sequence: Sequence, out: Tensor, lse: Tensor) -> None:
    """Fill ``out`` (B, Sq, H, V) and ``lse`` (B, H, Sq), natural log; rows that see nothing get 0 and -inf."""
    B, _, H, _ = sequence.q.shape
    K, V = sequence.v.shape[2:]
    for rows, visible in sequence.blocks():
        S = rows.stop - rows.start
        q_block = sequence.rows_by_kv_head(sequence.q, rows)
        row_max = q_block.new_full((B, H, S), float("-inf"))
        row_sum = q_block.new_zeros((B, H, S))
        accumulator = q_block.new_zeros((B, K, H // K * S, V))
        for columns in _split(visible):
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


@dataclass(frozen=True)
class Gradients:
    """Where :func:`backward` puts its results, in compute precision: dk, dv and dslopes are added to."""

    dq: Tensor  # (B, Sq, H, D)
    dk: Tensor  # (B, K, Sk, D)
    dv: Tensor  # (B, K, Sk, V)
    dslopes: Tensor | None  # (B, H)


def backward(
    sequence: Sequence, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, gradients: Gradients
) -> None:
    """Gradients of ``sum(dout * out) + sum(dlse * lse)``.

    With P the undropped probabilities and M the dropout scale: dV = (P∘M)^T dO, dP = (dO V^T)∘M,
    dS = P∘(dP - rowsum(dO∘O) + dLSE), softcap multiplies dS by 1 - tanh^2, dQ = c dS K, dK = c dS^T Q.
    """
    B, _, H, _ = sequence.q.shape
    K = sequence.k.shape[2]
    scale = sequence.options.softmax_scale
    for rows, visible in sequence.blocks():
        q_block = sequence.rows_by_kv_head(sequence.q, rows)
        dout_block = sequence.rows_by_kv_head(dout, rows)
        out_block = sequence.rows_by_kv_head(out, rows)
        row_lse = lse[:, :, rows].to(q_block.dtype)
        row_lse = row_lse.masked_fill(row_lse == float("-inf"), 0.0)
        delta = (dout_block * out_block).sum(dim=-1).reshape(B, H, -1)
        if dlse is not None:
            delta = delta - dlse[:, :, rows].to(delta.dtype)
        dq_block = torch.zeros_like(q_block)
        for columns in _split(visible):
            T = columns.stop - columns.start
            scores, tanh = sequence.scores(q_block, rows, columns)
            probabilities = torch.exp(scores - row_lse.unsqueeze(-1))
            dropout = sequence.dropout_scale(rows, columns)
            dprobabilities = (dout_block @ sequence.keys(sequence.v, columns).transpose(-1, -2)).reshape(
                scores.shape
            )
            weights = probabilities
            if dropout is not None:
                weights = probabilities * dropout
                dprobabilities = dprobabilities * dropout
            gradients.dv[:, :, columns] += weights.reshape(B, K, -1, T).transpose(-1, -2) @ dout_block
            dscores = probabilities * (dprobabilities - delta.unsqueeze(-1))
            if gradients.dslopes is not None:
                gradients.dslopes.sub_(
                    (dscores * sequence.key_distance(rows, columns).abs()).sum(dim=(-1, -2))
                )
            if tanh is not None:
                dscores = dscores * (1.0 - tanh * tanh)
            dscores = dscores.reshape(B, K, -1, T)
            dq_block += dscores @ sequence.keys(sequence.k, columns)
            gradients.dk[:, :, columns] += dscores.transpose(-1, -2) @ q_block * scale
        gradients.dq[:, rows] = sequence.rows_by_head(dq_block * scale)


def probabilities(sequence: Sequence, lse: Tensor) -> Tensor:
    """Normalised probabilities (B, H, Sq, Sk) in the dtype of q, sign bit set where dropout removed the element."""
    B, Sq, H, _ = sequence.q.shape
    result = sequence.q.new_zeros((B, H, Sq, sequence.k.shape[1]))
    for rows, visible in sequence.blocks():
        q_block = sequence.rows_by_kv_head(sequence.q, rows)
        row_lse = lse[:, :, rows].to(q_block.dtype)
        row_lse = row_lse.masked_fill(row_lse == float("-inf"), 0.0)
        for columns in _split(visible):
            scores, _ = sequence.scores(q_block, rows, columns)
            block = torch.exp(scores - row_lse.unsqueeze(-1))
            dropout = sequence.dropout_scale(rows, columns)
            if dropout is not None:
                block = torch.where(dropout > 0, block, -block)
            result[:, :, rows, columns] = block.to(result.dtype)
    return result

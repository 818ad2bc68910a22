"""The scores of one block of attention, with everything that changes them, in plain torch operations.

Shape letters: B batch, S/T query/key block, H query heads, K key-value heads, G = H / K, R = G * S, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from .inputs import ScoreModifiers
from .options import AttentionOptions
from .philox import keep_mask


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Precision of the arithmetic: fp64 stays fp64, everything else is computed in fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def modifier_window(x: Tensor, rows: slice, columns: slice) -> Tensor:
    """View of the part of a (1|B, 1|H, 1|Sq, 1|Sk) tensor that a block meets: less than the block at x's own end."""
    every = slice(None)
    return x[:, :, every if x.shape[2] == 1 else rows, every if x.shape[3] == 1 else columns]


@dataclass(frozen=True)
class Sequence:
    """Attention of one dense batch, or of one sequence of a packed batch (then B is 1).

    ``modifiers`` are those of this sequence. ``seed_and_offset`` is int64 (2,) when there is dropout.
    ``batch_offset`` is the index of the first batch entry, which keys the dropout mask.
    """

    q: Tensor  # (B, Sq, H, D)
    k: Tensor  # (B, Sk, K, D)
    v: Tensor  # (B, Sk, K, V)
    options: AttentionOptions
    modifiers: ScoreModifiers = field(default_factory=ScoreModifiers)
    seed_and_offset: Tensor | None = None
    batch_offset: int = 0

    def rows_by_kv_head(self, x_BSHD: Tensor, rows: slice) -> Tensor:
        """Query rows as (B, K, R, D) in compute precision: heads that share a key head become more rows."""
        B, _, H, D = x_BSHD.shape
        K = self.k.shape[2]
        block = x_BSHD[:, rows].to(compute_dtype(self.q.dtype))
        return block.reshape(B, -1, K, H // K, D).permute(0, 2, 3, 1, 4).reshape(B, K, -1, D)

    def rows_by_head(self, x_BKRD: Tensor) -> Tensor:
        """Inverse of :meth:`rows_by_kv_head`: (B, K, R, D) to (B, S, H, D)."""
        B, K, rows, D = x_BKRD.shape
        H = self.q.shape[2]
        return x_BKRD.reshape(B, H, rows * K // H, D).transpose(1, 2)

    def keys(self, x_BTKD: Tensor, columns: slice) -> Tensor:
        """Key or value rows as (B, K, T, D) in compute precision; 0 where the padding mask hides what they hold."""
        block = x_BTKD[:, columns].to(compute_dtype(self.q.dtype)).transpose(1, 2)
        real = self._real_keys(columns)
        return block if real is None else block.masked_fill(~real.unsqueeze(-1), 0.0)

    def scores(self, q_BKRD: Tensor, rows: slice, columns: slice) -> tuple[Tensor, Tensor | None]:
        """Scores (B, H, S, T), -inf where invisible, and tanh of the capped scores for the backward."""
        B, H, S, T = self.q.shape[0], self.q.shape[2], rows.stop - rows.start, columns.stop - columns.start
        options, modifiers = self.options, self.modifiers
        scores = (q_BKRD @ self.keys(self.k, columns).transpose(-1, -2)).mul_(options.softmax_scale)
        scores = scores.reshape(B, H, S, T)
        tanh = None
        if options.softcap > 0:
            tanh = torch.tanh(scores / options.softcap)
            scores = options.softcap * tanh
        if modifiers.attn_bias is not None:
            scores = scores + self._modifier_block(modifiers.attn_bias, rows, columns).to(scores.dtype)
        if modifiers.alibi_slopes is not None:
            slopes = modifiers.alibi_slopes.to(scores.dtype)[:, :, None, None]
            scores = scores - slopes * self.key_distance(rows, columns).abs()
        visible = self._visible(rows, columns)
        return scores if visible is None else scores.masked_fill(~visible, float("-inf")), tanh

    def key_distance(self, rows: slice, columns: slice) -> Tensor:
        """int64 (S, T): key position minus the query's diagonal position."""
        device = self.q.device
        shift = self.options.diagonal_shift(self.q.shape[1], self.k.shape[1])
        diagonal = torch.arange(rows.start + shift, rows.stop + shift, device=device)
        return torch.arange(columns.start, columns.stop, device=device) - diagonal.unsqueeze(-1)

    def kept(self, rows: slice, columns: slice) -> Tensor | None:
        """bool (B, H, S, T), False where dropout removes the element; None without dropout."""
        p = self.options.dropout_p
        if p == 0.0:
            return None
        assert self.seed_and_offset is not None, "dropout needs its seed and offset"
        B, H, device = self.q.shape[0], self.q.shape[2], self.q.device
        flat_heads = self.batch_offset * H + torch.arange(B * H, device=device).reshape(B, H, 1, 1)
        return keep_mask(
            self.seed_and_offset,
            flat_heads,
            torch.arange(rows.start, rows.stop, device=device),
            torch.arange(columns.start, columns.stop, device=device),
            p,
        )

    def dropout_scale(self, rows: slice, columns: slice) -> Tensor | None:
        """(B, H, S, T) of 0 and 1/(1-p), or None without dropout."""
        kept = self.kept(rows, columns)
        return None if kept is None else kept.to(compute_dtype(self.q.dtype)) / (1.0 - self.options.dropout_p)

    def _visible(self, rows: slice, columns: slice) -> Tensor | None:
        """bool, broadcasts to (B, H, S, T): what window, mask and key padding let through; None without any of them."""
        options, mask = self.options, self.modifiers.attn_mask
        conditions = []
        if not options.is_full:
            distance = self.key_distance(rows, columns)
            if options.window_left is not None:
                conditions.append(distance >= -options.window_left)
            if options.window_right is not None:
                conditions.append(distance <= options.window_right)
        if mask is not None:
            conditions.append(self._modifier_block(mask, rows, columns))
        real = self._real_keys(columns)
        if real is not None:
            conditions.append(real.unsqueeze(2))
        if not conditions:
            return None
        visible = conditions[0]
        for condition in conditions[1:]:
            visible = visible & condition
        return visible

    def _real_keys(self, columns: slice) -> Tensor | None:
        """bool (B, 1, T) from the key-padding mask: keys past its end are not real; None without a mask."""
        mask = self.modifiers.key_padding_mask
        if mask is None:
            return None
        block = mask[:, columns]
        return pad(block, (0, columns.stop - columns.start - block.shape[1])).unsqueeze(1)

    @staticmethod
    def _modifier_block(x: Tensor, rows: slice, columns: slice) -> Tensor:
        """The block of a bias or mask, filled with 0 or False past its end; dimensions of size 1 stay so."""
        block = modifier_window(x, rows, columns)
        missing_rows = 0 if x.shape[2] == 1 else rows.stop - rows.start - block.shape[2]
        missing_columns = 0 if x.shape[3] == 1 else columns.stop - columns.start - block.shape[3]
        return pad(block, (0, missing_columns, 0, missing_rows)) if missing_rows or missing_columns else block

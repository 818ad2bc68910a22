"""Rotary position embedding (RoPE): dimensions in pairs, turned by an angle that grows with the position.

For the pair i of R/2 pairs and position p, with cos[p, i] and sin[p, i] from a table:

    out_first  = first * cos - second * sin
    out_second = first * sin + second * cos                       [Su et al. 2021, arXiv:2104.09864]

The pair (first, second) is dimensions (i, i + R/2) in the GPT-NeoX layout and (2i, 2i + 1) in the interleaved
GPT-J layout. Arithmetic is float32 (float64 for float64 x) whatever the inputs, autocast or not; the result
has x's dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from flash_attn_ops.arguments import (
    bad_argument,
    check_floating,
    check_integer,
    check_same_device,
    check_shape,
)
from flash_attn_ops.dispatch import runs_on_triton

from . import operators, reference

__all__ = ["RotaryEmbedding", "apply_rotary_emb"]


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Rotate the first R dimensions of every head; dimensions from R on pass through.

    Args:
        x: (B, S, H, D), or (T, H, D) with cu_seqlens. Any floating-point dtype and strides.
        cos, sin: (P, R/2) for positions 0 .. P - 1, R <= D, any floating-point dtype; constants for autograd.
        interleaved: pairs are neighbours (GPT-J) instead of halves (GPT-NeoX).
        inplace: write the result into x and return it. x needs a last dimension without gaps.
        seqlen_offsets: position of each sequence's first token; one int, or (B,) int32 or int64 on x's
            device.
        cu_seqlens: (B + 1,) int32 or int64, non-decreasing; sequence b is tokens cu_seqlens[b] up to, not
            including, cu_seqlens[b + 1] of x. Tokens outside every sequence are not rotated.
        max_seqlen: the longest sequence of cu_seqlens, if it is known: lets a table that is too short be
            refused here. It never changes the result.

    Returns:
        The rotated x, contiguous (x itself if inplace). Backward rotates the gradient by the negative angles.

    Raises:
        ValueError: arguments that do not fit, or a position that the table does not have. Positions that only
            the GPU knows (tensor offsets, cu_seqlens) are not waited for: tokens beyond the table become NaN
            there.
    """
    _check(x, cos, sin, inplace, seqlen_offsets, cu_seqlens, max_seqlen)
    if not runs_on_triton("apply_rotary_emb", x, cos, sin):
        rows = reference.rows_of_tokens(x, cos, sin, seqlen_offsets, cu_seqlens)
        out = reference.rotate(x, *rows, interleaved)
        return x.copy_(out) if inplace else out
    offsets, offset = (seqlen_offsets, 0) if isinstance(seqlen_offsets, Tensor) else (None, seqlen_offsets)
    table_and_positions = (cos, sin, offsets, offset, cu_seqlens)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Rotate.apply(x, *table_and_positions, interleaved, inplace)
    if not inplace:
        return operators.rotate(x, *table_and_positions, interleaved, False)
    operators.rotate_(x, *table_and_positions, interleaved, False)
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(x)  # the kernel writes behind autograd's back
    return x


class _Rotate(torch.autograd.Function):
    """A rotation is orthogonal, so its gradient is the rotation back; nothing of x is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        offsets: Tensor | None,
        offset: int,
        cu_seqlens: Tensor | None,
        interleaved: bool,
        inplace: bool,
    ) -> Tensor:
        ctx.save_for_backward(cos, sin, offsets, cu_seqlens)
        ctx.offset, ctx.interleaved = offset, interleaved
        if not inplace:
            return operators.rotate(x, cos, sin, offsets, offset, cu_seqlens, interleaved, False)
        ctx.mark_dirty(x)
        operators.rotate_(x, cos, sin, offsets, offset, cu_seqlens, interleaved, False)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin, offsets, cu_seqlens = ctx.saved_tensors
        # Never in place: other consumers of the gradient may hold the same memory.
        dx = operators.rotate(d_out, cos, sin, offsets, ctx.offset, cu_seqlens, ctx.interleaved, True)
        return dx, None, None, None, None, None, None, None


def _check(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    inplace: bool,
    seqlen_offsets: int | Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
) -> None:
    check_floating(x=x, cos=cos, sin=sin)
    tensor_offsets = seqlen_offsets if isinstance(seqlen_offsets, Tensor) else None
    check_same_device(x=x, cos=cos, sin=sin, seqlen_offsets=tensor_offsets, cu_seqlens=cu_seqlens)
    layout = "(B, S, H, D)" if cu_seqlens is None else "(T, H, D), which cu_seqlens asks for"
    if x.dim() != (4 if cu_seqlens is None else 3):
        fix = "add the missing dimension, or give cu_seqlens with packed sequences only"
        raise bad_argument("x", f"shape {tuple(x.shape)}", layout, fix)
    if cos.dim() != 2:
        raise bad_argument(
            "cos", f"shape {tuple(cos.shape)}", "(positions, R/2)", "pass one row for each position"
        )
    check_shape("sin", sin, cos.shape, "the shape of cos")
    if not 0 < 2 * cos.shape[1] <= x.shape[-1]:
        got = f"{cos.shape[1]} columns, for R = {2 * cos.shape[1]} rotated dimensions"
        expected = f"0 < R <= {x.shape[-1]}, the last dimension of x"
        raise bad_argument("cos", got, expected, "build the table for half of the rotated dimensions")
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        raise bad_argument("cos or sin", "a tensor that requires grad", "constants", "detach the tables")
    if (
        inplace
        and x.numel()
        and (x.stride(-1) != 1 or any(s == 0 < n - 1 for n, s in zip(x.shape, x.stride(), strict=True)))
    ):
        got = f"x of strides {x.stride()}"
        raise bad_argument(
            "inplace", got, "a last dimension without gaps, nothing expanded", "use inplace=False"
        )

    if inplace and x.requires_grad and x.is_leaf and torch.is_grad_enabled():
        got = "a leaf tensor x that requires grad"
        raise bad_argument("inplace", got, "an x that may be overwritten", "use inplace=False")

    num_sequences = x.shape[0]
    if cu_seqlens is not None:
        check_integer("cu_seqlens", cu_seqlens, (torch.int32, torch.int64))
        if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
            got = f"shape {tuple(cu_seqlens.shape)}"
            raise bad_argument(
                "cu_seqlens", got, "(B + 1,) with B >= 1", "pass the boundaries, starting with 0"
            )
        num_sequences = len(cu_seqlens) - 1
    elif max_seqlen is not None:
        raise bad_argument(
            "max_seqlen", max_seqlen, "None without cu_seqlens", "leave it out: x has the length"
        )
    if tensor_offsets is not None:
        check_integer("seqlen_offsets", tensor_offsets, (torch.int32, torch.int64))
        check_shape("seqlen_offsets", tensor_offsets, (num_sequences,), "one offset for each sequence")
    elif not isinstance(seqlen_offsets, int):
        got = type(seqlen_offsets).__name__
        raise bad_argument("seqlen_offsets", got, "an int or an integer tensor", "pass int(seqlen_offsets)")
    _check_positions(x, cos, seqlen_offsets, cu_seqlens, max_seqlen)


def _check_positions(
    x: Tensor, cos: Tensor, seqlen_offsets: int | Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None
) -> None:
    """The table has every position, as far as the host knows the positions."""
    host_reads = x.device.type == "cpu" and not torch.compiler.is_compiling()
    lengths: int | Tensor = x.shape[1] if cu_seqlens is None else max_seqlen or 0
    if cu_seqlens is not None and host_reads:
        lengths = cu_seqlens.diff()
        if lengths.min() < 0 or cu_seqlens[0] < 0 or cu_seqlens[-1] > x.shape[0]:
            expected = f"non-decreasing values from 0 to {x.shape[0]}, the tokens of x"
            raise bad_argument("cu_seqlens", cu_seqlens.tolist(), expected, "pass cumulative lengths")
    if isinstance(seqlen_offsets, Tensor):
        if not host_reads or not len(seqlen_offsets):
            return
        ends = torch.where(torch.as_tensor(lengths) > 0, seqlen_offsets + lengths, 0)
        first, end = int(seqlen_offsets.min()), int(ends.max())
    else:
        longest = int(lengths.max()) if isinstance(lengths, Tensor) else lengths
        first, end = seqlen_offsets, seqlen_offsets + longest if longest else 0
    if first < 0:
        raise bad_argument("seqlen_offsets", first, "no negative position", "count positions from 0")
    if end > len(cos):
        expected = f"positions below {len(cos)}, the rows of cos"
        raise bad_argument(
            "seqlen_offsets", f"tokens at positions up to {end - 1}", expected, "build a longer table"
        )


class RotaryEmbedding(nn.Module):
    """Rotates queries and keys, with a table of cos and sin that grows with the positions asked for.

    The angle of pair i at position p is ``p * base ** (-2 i / dim)``, computed in float64 and stored in
    float32: a row of the table depends on its position alone, so growing never changes a value and decoding
    token by token equals one pass over the sequence. The table is no parameter or buffer:
    ``module.bfloat16()`` leaves it exact, and checkpoints do not hold it.

    Args:
        dim: R, the rotated dimensions of every head, even.
        base: of the frequencies.
        interleaved: GPT-J pairs instead of GPT-NeoX halves.
        device: where to build a first table; it follows the queries anyway.
    """

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if dim <= 0 or dim % 2:
            raise bad_argument("dim", dim, "a positive even number", "rotate an even number of dimensions")
        if not base > 0:
            raise bad_argument("base", base, "a positive number", "use the default, 10000.0")
        self.dim = dim
        self.base = base
        self.interleaved = interleaved
        device = torch.get_default_device() if device is None else torch.device(device)
        self._cos, self._sin = self._table(0, device)

    def forward(
        self, q: Tensor, k: Tensor, seqlen_offset: int | Tensor = 0, max_seqlen: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """``(q, k)`` rotated, new tensors.

        Args:
            q, k: (B, S, H, D) and (B, S, Hk, D), D >= dim, any floating-point dtype.
            seqlen_offset: position of the first token; an int, or (B,) int32 or int64.
            max_seqlen: positions that the table must have; needed with a tensor offset, which is not read
                here.
        """
        if q.dim() != 4 or k.dim() != 4 or q.shape[1] != k.shape[1]:
            got = f"shapes {tuple(q.shape)} and {tuple(k.shape)}"
            raise bad_argument(
                "q and k", got, "(B, S, H, D) and (B, S, Hk, D)", "pass queries and keys of equal S"
            )
        if max_seqlen is None:
            if isinstance(seqlen_offset, Tensor):
                expected = "the number of positions, with a tensor seqlen_offset"
                raise bad_argument("max_seqlen", None, expected, "pass the capacity of the cache")
            max_seqlen = seqlen_offset + q.shape[1]
        cos, sin = self.tables(max_seqlen, q.device)
        rotated_q = apply_rotary_emb(q, cos, sin, self.interleaved, seqlen_offsets=seqlen_offset)
        rotated_k = apply_rotary_emb(k, cos, sin, self.interleaved, seqlen_offsets=seqlen_offset)
        return rotated_q, rotated_k

    def tables(self, positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin, float32, (at least ``positions``, dim / 2): for :func:`apply_rotary_emb`."""
        if len(self._cos) < positions:
            self._cos, self._sin = self._table(max(positions, 2 * len(self._cos)), device)
        elif self._cos.device != device:
            self._cos, self._sin = self._table(len(self._cos), device)
        return self._cos, self._sin

    @torch.inference_mode(False)  # a table made while generating must serve training too
    def _table(self, positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
        pair = torch.arange(0, self.dim, 2, dtype=torch.float64, device="cpu")
        position = torch.arange(positions, dtype=torch.float64, device="cpu")
        angle = position[:, None] * self.base ** (-pair / self.dim)
        return angle.cos().float().to(device), angle.sin().float().to(device)

    def extra_repr(self) -> str:
        return f"{self.dim}, base={self.base}, interleaved={self.interleaved}"

"""The Triton kernel of rotary embedding: one or two tensors (queries and keys) in one launch, both layouts, dense and
packed, forward and (conjugated) backward.

It moves as many bytes as a copy. A program takes a few tokens with all or many of their heads of one tensor, so that a
row of cos and sin is read once for them, and finds each token's sequence itself (binary search in cu_seqlens for
packed input): no launch depends on the longest sequence.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from flash_attn_ops.launch import ceil_div, next_power_of_2
from flash_attn_ops.triton_launch import launch

PAIRS_PER_PROGRAM = 2048  # 128 threads with 16 rotated pairs each; no fewer, so that no pair has two threads
MAX_HEADS = 32
_NO_POINTERS, _NO_STRIDES, _NO_COUNTS = (None,) * 4, (0,) * 8, (0,) * 2  # of a second tensor


@dataclass(frozen=True)
class Tile:
    """Tokens and heads of one program: as many heads as there are, up to a limit, then tokens."""

    tokens: int
    heads: int

    @staticmethod
    @functools.lru_cache
    def of(num_heads: int, half_block: int) -> Tile:
        heads = min(MAX_HEADS, next_power_of_2(num_heads), max(1, PAIRS_PER_PROGRAM // half_block))
        return Tile(max(1, PAIRS_PER_PROGRAM // (half_block * heads)), heads)


def rotate(
    parts: Sequence[tuple[Tensor, Tensor]],
    tables: Sequence[tuple[Tensor, Tensor]],
    offsets: Tensor | None,
    offset: int,
    cu_seqlens: Tensor | None,
    position_ids: Tensor | None,
    interleaved: bool,
    conjugate: bool,
) -> None:
    """Writes each x of one or two ``parts`` (x, out), rotated (by the negative angles if ``conjugate``), to its out,
    which may be x. Each has its table of cos and sin. x are (B, S, H, D), or (T, H, D), with the same tokens and D.

    Positions are ``position_ids`` (contiguous) if given; else they count from a sequence's value of ``offsets``, or
    from ``offset`` without them.
    """
    x, out = parts[0]
    head_dim = x.shape[-1]
    rotary_half = tables[0][0].shape[1]
    packed = x.dim() == 3
    seqlen = x.shape[0] if packed else x.shape[1]
    num_tokens = seqlen if packed else x.shape[0] * seqlen
    num_sequences = len(cu_seqlens) - 1 if cu_seqlens is not None else 0
    half_block = max(8, next_power_of_2(rotary_half))
    rest = 0 if out is x or out.data_ptr() == x.data_ptr() else head_dim - 2 * rotary_half
    pointers: list[Tensor | None] = []
    strides: list[int] = []
    counts: list[int] = []
    tiles: list[Tile] = []
    programs: list[int] = []
    for (x, out), (cos, sin) in zip(parts, tables, strict=True):
        num_heads = x.shape[-2]
        tile = Tile.of(num_heads, half_block)
        head_blocks = ceil_div(num_heads, tile.heads)
        tiles.append(tile)
        programs.append(ceil_div(num_tokens, tile.tokens) * head_blocks)
        pointers += (x, out, cos, sin)
        strides += (*_token_strides(x), *_token_strides(out), cos.stride(0), sin.stride(0))
        counts += (num_heads, head_blocks)
    if len(parts) == 1:
        pointers += _NO_POINTERS
        strides += _NO_STRIDES
        counts += _NO_COUNTS
    if sum(programs) == 0:
        return
    launch(
        _rotate,
        (sum(programs), 1),
        (*pointers, offsets, cu_seqlens, position_ids),
        strides,
        (*counts, programs[0], num_tokens, seqlen, num_sequences, tables[0][0].shape[0], offset),
        (),
        (
            *(rotary_half, rest, interleaved, conjugate, num_sequences.bit_length()),
            *(tiles[0].tokens, tiles[0].heads, tiles[-1].tokens, tiles[-1].heads),
            *(half_block, max(16, next_power_of_2(rest)) if rest else 0),
        ),
        num_warps=4,
    )


def _token_strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of (sequence, token, head)."""
    stride = x.stride()
    if len(stride) == 4:
        return stride[0], stride[1], stride[2]
    return 0, stride[0], stride[1]


@triton.jit
def _turn(first, second, cos, sin):
    """The pair turned. Fused by hand: left to the compiler, another kernel could round the same pair otherwise."""
    return tl.fma(first, cos, -(second * sin)), tl.fma(first, sin, second * cos)


@triton.jit(
    do_not_specialize=[
        "num_heads",
        "head_blocks",
        "k_num_heads",
        "k_head_blocks",
        "first_programs",
        "num_tokens",
        "seqlen",
        "num_sequences",
        "table_rows",
        "offset",
    ]
)
def _rotate(
    x_ptr,
    out_ptr,
    cos_ptr,
    sin_ptr,
    k_x_ptr,  # None: there is one tensor
    k_out_ptr,
    k_cos_ptr,
    k_sin_ptr,
    offsets_ptr,  # None: every sequence starts at the same offset
    cu_seqlens_ptr,  # None: dense, seqlen tokens a sequence
    position_ids_ptr,  # None: positions count from the sequence's start
    x_sequence_stride,
    x_token_stride,
    x_head_stride,
    out_sequence_stride,
    out_token_stride,
    out_head_stride,
    cos_row_stride,
    sin_row_stride,
    k_x_sequence_stride,
    k_x_token_stride,
    k_x_head_stride,
    k_out_sequence_stride,
    k_out_token_stride,
    k_out_head_stride,
    k_cos_row_stride,
    k_sin_row_stride,
    num_heads,
    head_blocks,
    k_num_heads,
    k_head_blocks,
    first_programs,
    num_tokens,
    seqlen,
    num_sequences,
    table_rows,
    offset,
    HALF: tl.constexpr,
    REST: tl.constexpr,  # dimensions behind the rotated ones that must be copied
    INTERLEAVED: tl.constexpr,
    CONJUGATE: tl.constexpr,
    SEARCH_STEPS: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    K_TOKENS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
):
    """Programs from ``first_programs`` on take the second tensor. A branch for each, rather than pointers that are
    chosen between, because the compiler keeps what it knows of their alignment."""
    program = tl.program_id(0)
    if program < first_programs:
        _rotate_tile(
            program, x_ptr, out_ptr, cos_ptr, sin_ptr, x_sequence_stride, x_token_stride, x_head_stride,
            out_sequence_stride, out_token_stride, out_head_stride, cos_row_stride, sin_row_stride, num_heads,
            head_blocks, offsets_ptr, cu_seqlens_ptr, position_ids_ptr, num_tokens, seqlen, num_sequences,
            table_rows, offset, HALF, REST, INTERLEAVED, CONJUGATE, SEARCH_STEPS, TOKENS, HEADS, HALF_BLOCK,
            REST_BLOCK,
        )  # fmt: skip
    if k_x_ptr is not None:  # noqa: SIM102 (the compiler's choice, then the GPU's)
        if program >= first_programs:
            _rotate_tile(
                program - first_programs, k_x_ptr, k_out_ptr, k_cos_ptr, k_sin_ptr, k_x_sequence_stride,
                k_x_token_stride, k_x_head_stride, k_out_sequence_stride, k_out_token_stride, k_out_head_stride,
                k_cos_row_stride, k_sin_row_stride, k_num_heads, k_head_blocks, offsets_ptr, cu_seqlens_ptr,
                position_ids_ptr, num_tokens, seqlen, num_sequences, table_rows, offset, HALF, REST, INTERLEAVED,
                CONJUGATE, SEARCH_STEPS, K_TOKENS, K_HEADS, HALF_BLOCK, REST_BLOCK,
            )  # fmt: skip


@triton.jit
def _rotate_tile(
    program,
    x_ptr,
    out_ptr,
    cos_ptr,
    sin_ptr,
    x_sequence_stride,
    x_token_stride,
    x_head_stride,
    out_sequence_stride,
    out_token_stride,
    out_head_stride,
    cos_row_stride,
    sin_row_stride,
    num_heads,
    head_blocks,
    offsets_ptr,
    cu_seqlens_ptr,
    position_ids_ptr,
    num_tokens,
    seqlen,
    num_sequences,
    table_rows,
    offset,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    CONJUGATE: tl.constexpr,
    SEARCH_STEPS: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
):
    index = (program // head_blocks) * TOKENS + tl.arange(0, TOKENS)
    head = (program % head_blocks) * HEADS + tl.arange(0, HEADS)
    token_mask = index < num_tokens
    if cu_seqlens_ptr is None:
        sequence = index // seqlen
        token = index % seqlen
        position = token + offset
        inside = token_mask
    else:
        # The last sequence that starts at or before the token: empty ones in front of it start there too.
        sequence = tl.zeros((TOKENS,), tl.int32)
        behind = tl.zeros((TOKENS,), tl.int32) + num_sequences
        for _ in tl.static_range(SEARCH_STEPS):
            middle = (sequence + behind) // 2
            starts_before = tl.load(cu_seqlens_ptr + middle) <= index
            sequence = tl.where(starts_before, middle, sequence)
            behind = tl.where(starts_before, behind, middle)
        token = index
        start = tl.load(cu_seqlens_ptr + sequence)
        position = index - start + offset
        inside = (index >= start) & (index < tl.load(cu_seqlens_ptr + num_sequences))
    if offsets_ptr is not None:
        position += tl.load(offsets_ptr + sequence, mask=token_mask, other=0)
    if position_ids_ptr is not None:
        position = tl.load(position_ids_ptr + index, mask=token_mask, other=0)
    known = (position >= 0) & (position < table_rows)

    half = tl.arange(0, HALF_BLOCK)
    half_mask = half < HALF
    table_mask = known[:, None] & half_mask[None, :]
    row = position.to(tl.int64)
    nan = float("nan")
    cos = tl.load(cos_ptr + (row * cos_row_stride)[:, None] + half[None, :], mask=table_mask, other=nan).to(
        tl.float32
    )
    sin = tl.load(sin_ptr + (row * sin_row_stride)[:, None] + half[None, :], mask=table_mask, other=nan).to(
        tl.float32
    )
    cos = tl.where(inside[:, None], cos, 1.0)[:, None, :]
    sin = tl.where(inside[:, None], sin, 0.0)[:, None, :]
    if CONJUGATE:
        sin = -sin

    sequence = sequence.to(tl.int64)
    token = token.to(tl.int64)
    wide_head = head.to(tl.int64)
    x_start = sequence * x_sequence_stride + token * x_token_stride
    x_ptrs = x_ptr + x_start[:, None, None] + (wide_head * x_head_stride)[None, :, None]
    out_start = sequence * out_sequence_stride + token * out_token_stride
    out_ptrs = out_ptr + out_start[:, None, None] + (wide_head * out_head_stride)[None, :, None]
    mask = token_mask[:, None, None] & (head < num_heads)[None, :, None]
    if INTERLEAVED:
        both = tl.arange(0, 2 * HALF_BLOCK)[None, None, :]
        both_mask = mask & (both < 2 * HALF)
        x = tl.load(x_ptrs + both, mask=both_mask, other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(x, (TOKENS, HEADS, HALF_BLOCK, 2)))
        first, second = _turn(first, second, cos, sin)
        turned = tl.join(first, second)
        tl.store(out_ptrs + both, tl.reshape(turned, (TOKENS, HEADS, 2 * HALF_BLOCK)), mask=both_mask)
    else:
        col = half[None, None, :]
        pair_mask = mask & half_mask[None, None, :]
        first = tl.load(x_ptrs + col, mask=pair_mask, other=0.0).to(tl.float32)
        second = tl.load(x_ptrs + HALF + col, mask=pair_mask, other=0.0).to(tl.float32)
        first, second = _turn(first, second, cos, sin)
        tl.store(out_ptrs + col, first, mask=pair_mask)
        tl.store(out_ptrs + HALF + col, second, mask=pair_mask)
    if REST > 0:
        rest = tl.arange(0, REST_BLOCK)[None, None, :]
        rest_mask = mask & (rest < REST)
        tl.store(
            out_ptrs + 2 * HALF + rest, tl.load(x_ptrs + 2 * HALF + rest, mask=rest_mask), mask=rest_mask
        )

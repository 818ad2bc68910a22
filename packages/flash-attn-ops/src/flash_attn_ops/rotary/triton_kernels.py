"""The Triton kernel of rotary embedding, both layouts, dense and packed, forward and (conjugated) backward.

It moves as many bytes as a copy. A program takes a few tokens with all or many of their heads, so that a row
of cos and sin is read once for them, and finds each token's sequence itself (binary search in cu_seqlens for
packed input): no launch depends on the longest sequence.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from flash_attn_ops.launch import ceil_div, next_power_of_2, on_device_of

PAIRS_PER_PROGRAM = 2048  # 128 threads with 16 rotated pairs each; no fewer, so that no pair has two threads
MAX_HEADS = 32


def rotate(
    x: Tensor,
    out: Tensor,
    cos: Tensor,
    sin: Tensor,
    offsets: Tensor | None,
    offset: int,
    cu_seqlens: Tensor | None,
    interleaved: bool,
    conjugate: bool,
) -> None:
    """Writes x (B, S, H, D), or (T, H, D) with cu_seqlens, rotated (by the negative angles if ``conjugate``) to
    ``out``, which may be x. A sequence starts at its value of ``offsets``, or at ``offset`` without them."""
    num_heads, head_dim = x.shape[-2:]
    rotary_half = cos.shape[1]
    packed = cu_seqlens is not None
    seqlen = x.shape[0] if packed else x.shape[1]
    num_tokens = seqlen if packed else x.shape[0] * seqlen
    num_sequences = len(cu_seqlens) - 1 if cu_seqlens is not None else x.shape[0]
    half_block = max(8, next_power_of_2(rotary_half))
    heads_block = min(MAX_HEADS, next_power_of_2(num_heads), max(1, PAIRS_PER_PROGRAM // half_block))
    tokens_block = max(1, PAIRS_PER_PROGRAM // (half_block * heads_block))
    head_blocks = ceil_div(num_heads, heads_block)
    rest = 0 if out is x else head_dim - 2 * rotary_half
    with on_device_of(x):
        _rotate[(ceil_div(num_tokens, tokens_block) * head_blocks,)](
            *(x, out, cos, sin, offsets, cu_seqlens),
            *_token_strides(x, packed),
            *_token_strides(out, packed),
            *(cos.stride(0), sin.stride(0)),
            *(num_tokens, seqlen, num_sequences, num_heads, head_blocks, len(cos)),
            offset,
            HALF=rotary_half,
            REST=rest,
            INTERLEAVED=interleaved,
            CONJUGATE=conjugate,
            SEARCH_STEPS=num_sequences.bit_length() if packed else 0,
            TOKENS=tokens_block,
            HEADS=heads_block,
            HALF_BLOCK=half_block,
            REST_BLOCK=max(16, next_power_of_2(rest)) if rest else 0,
            num_warps=4,
        )


def _token_strides(x: Tensor, packed: bool) -> tuple[int, int, int]:
    """Strides of (sequence, token, head)."""
    return (0, x.stride(0), x.stride(1)) if packed else (x.stride(0), x.stride(1), x.stride(2))


@triton.jit
def _turn(first, second, cos, sin):
    """The pair turned. Fused by hand: left to the compiler, another kernel could round the same pair otherwise."""
    return tl.fma(first, cos, -(second * sin)), tl.fma(first, sin, second * cos)


@triton.jit(
    do_not_specialize=[
        "num_tokens",
        "seqlen",
        "num_sequences",
        "num_heads",
        "head_blocks",
        "table_rows",
        "offset",
    ]
)
def _rotate(
    x_ptr,
    out_ptr,
    cos_ptr,
    sin_ptr,
    offsets_ptr,  # None: every sequence starts at the same offset
    cu_seqlens_ptr,  # None: dense, seqlen tokens a sequence
    x_sequence_stride,
    x_token_stride,
    x_head_stride,
    out_sequence_stride,
    out_token_stride,
    out_head_stride,
    cos_row_stride,
    sin_row_stride,
    num_tokens,
    seqlen,
    num_sequences,
    num_heads,
    head_blocks,
    table_rows,
    offset,
    HALF: tl.constexpr,
    REST: tl.constexpr,  # dimensions behind the rotated ones that must be copied
    INTERLEAVED: tl.constexpr,
    CONJUGATE: tl.constexpr,
    SEARCH_STEPS: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
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

"""Argument checks of the public functions: every rejection names the argument, what came, what is accepted, the fix."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .errors import bad_argument


def check_tensors(q: Tensor, k: Tensor, v: Tensor, *, layout: str) -> None:
    """Ranks, devices, dtypes, head dims and head counts of q, k, v.

    ``layout`` is "dense" (B, S, H, D), "packed" (T, H, D) or "paged" (packed q, paged k and v).
    """
    query_rank, key_rank = {"dense": (4, 4), "packed": (3, 3), "paged": (3, 4)}[layout]
    shapes = {
        "dense": "(batch, seqlen, heads, head_dim)",
        "packed": "(total_tokens, heads, head_dim)",
        "paged": "(num_pages, page_size, heads, head_dim)",
    }
    for name, x, rank in (("q", q, query_rank), ("k", k, key_rank), ("v", v, key_rank)):
        if not isinstance(x, Tensor):
            raise bad_argument(name, type(x).__name__, "a torch.Tensor", "convert it with torch.as_tensor")
        if x.dim() != rank:
            expected = shapes["packed"] if name == "q" and layout == "paged" else shapes[layout]
            raise bad_argument(name, f"shape {tuple(x.shape)}", f"shape {expected}", f"reshape {name}")
    for name, x in (("k", k), ("v", v)):
        if x.device != q.device:
            raise bad_argument(
                name, f"device {x.device}", f"the device of q, {q.device}", f"move {name} with .to"
            )
        if x.dtype != q.dtype:
            raise bad_argument(
                name, f"dtype {x.dtype}", f"the dtype of q, {q.dtype}", "cast q, k, v to one dtype"
            )
    if not q.dtype.is_floating_point:
        raise bad_argument(
            "q", f"dtype {q.dtype}", "a floating-point dtype", "cast q, k, v to bfloat16 or float32"
        )
    if k.shape[:-1] != v.shape[:-1]:
        raise bad_argument(
            "v",
            f"shape {tuple(v.shape)}",
            f"the leading shape of k, {tuple(k.shape[:-1])}",
            "pass k and v of one length",
        )
    if q.shape[-1] != k.shape[-1]:
        raise bad_argument(
            "k",
            f"head_dim {k.shape[-1]}",
            f"the head_dim of q, {q.shape[-1]}",
            "project q and k to one head_dim",
        )
    if layout == "dense" and q.shape[0] != k.shape[0]:
        raise bad_argument(
            "k", f"batch {k.shape[0]}", f"the batch of q, {q.shape[0]}", "expand k and v over the batch"
        )
    heads, kv_heads = q.shape[-2], k.shape[-2]
    if kv_heads == 0 or heads % kv_heads != 0:
        hint = "pass q with a multiple of k's heads"
        if layout == "dense" and q.shape[1] == k.shape[1] and q.shape[1] != heads:
            hint += ", or transpose (batch, heads, seqlen, head_dim) tensors with .transpose(1, 2)"
        raise bad_argument("q", f"{heads} heads", f"a multiple of the {kv_heads} heads of k and v", hint)


def check_alibi_slopes(slopes: Tensor | None, q: Tensor, batch: int) -> None:
    """ALiBi slopes are (H,) or (B, H) on the device of q."""
    if slopes is None:
        return
    heads = q.shape[-2]
    if slopes.shape not in ((heads,), (batch, heads)):
        raise bad_argument(
            "alibi_slopes",
            f"shape {tuple(slopes.shape)}",
            f"({heads},) or ({batch}, {heads})",
            "pass one slope per head",
        )
    if slopes.device != q.device:
        raise bad_argument(
            "alibi_slopes", f"device {slopes.device}", f"the device of q, {q.device}", "move it with .to"
        )


def check_cu_seqlens(name: str, cu_seqlens: Tensor, q: Tensor) -> None:
    """Cumulative lengths are int32 (B + 1,) on the device of q; values are checked where that costs no GPU sync."""
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        got = (
            f"shape {tuple(cu_seqlens.shape)}"
            if isinstance(cu_seqlens, Tensor)
            else type(cu_seqlens).__name__
        )
        raise bad_argument(
            name, got, "an int32 tensor of shape (batch + 1,)", "pass cumulative lengths starting at 0"
        )
    if cu_seqlens.dtype != torch.int32:
        raise bad_argument(name, f"dtype {cu_seqlens.dtype}", "torch.int32", f"{name}.to(torch.int32)")
    if cu_seqlens.device != q.device:
        raise bad_argument(
            name, f"device {cu_seqlens.device}", f"the device of q, {q.device}", "move it with .to"
        )
    if cu_seqlens.device.type == "cpu" and not isinstance(cu_seqlens, torch._subclasses.FakeTensor):
        values = cu_seqlens.tolist()
        if values[0] != 0 or any(a > b for a, b in itertools.pairwise(values)):
            raise bad_argument(
                name, values[:8], "cumulative lengths that start at 0 and never fall", "use cumsum"
            )


def check_cu_seqlens_range(name: str, cu_seqlens: Tensor, tokens: int) -> None:
    """The last cumulative length fits into the tensor it divides (checked on the CPU only)."""
    if cu_seqlens.device.type == "cpu" and int(cu_seqlens[-1]) > tokens:
        raise bad_argument(
            name, f"a total of {int(cu_seqlens[-1])}", f"at most {tokens} tokens", "check the lengths"
        )


def check_block_table(block_table: Tensor, batch: int, q: Tensor) -> None:
    """The page table is int32 (B, max_pages) on the device of q."""
    if block_table.dim() != 2 or block_table.shape[0] != batch:
        raise bad_argument(
            "block_table",
            f"shape {tuple(block_table.shape)}",
            f"({batch}, max_pages)",
            "pass one row per sequence",
        )
    if block_table.dtype != torch.int32:
        raise bad_argument(
            "block_table", f"dtype {block_table.dtype}", "torch.int32", "block_table.to(torch.int32)"
        )
    if block_table.device != q.device:
        raise bad_argument(
            "block_table", f"device {block_table.device}", f"the device of q, {q.device}", "move it with .to"
        )

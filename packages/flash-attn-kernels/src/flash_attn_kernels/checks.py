"""Checks of q, k, v and of packed layouts: every rejection names the argument, what came, what is accepted, the fix.

``check_tensors`` runs on every call, so it first asks all questions in one cheap expression; only if an answer is no
are they asked one by one, to say which.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .errors import bad_argument
from .inputs import PackedLayout

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

_RANKS = {"dense": (4, 4), "packed": (3, 3), "paged": (3, 4)}
_DENSE_SHAPE = "(batch, seqlen, heads, head_dim)"
_PACKED_SHAPE = "(total_tokens, heads, head_dim)"
_SHAPES = {
    "dense": (_DENSE_SHAPE, _DENSE_SHAPE),
    "packed": (_PACKED_SHAPE, _PACKED_SHAPE),
    "paged": (_PACKED_SHAPE, "(num_pages, page_size, heads, head_dim)"),
}


def check_tensors(q: Tensor, k: Tensor, v: Tensor, *, layout: str) -> tuple[int, int]:
    """Ranks, devices, dtypes, head dims and head counts of q, k, v; returns the head dims of q and v.

    ``layout`` is "dense" (B, S, H, D), "packed" (T, H, D) or "paged" (packed q, paged k and v).
    """
    query_rank, key_rank = _RANKS[layout]
    if isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor):
        q_shape, k_shape, v_shape = q.shape, k.shape, v.shape
        dtype, device = q.dtype, q.device
        if (
            len(q_shape) == query_rank
            and len(k_shape) == key_rank
            and (v_shape == k_shape or (v_shape[:-1] == k_shape[:-1] and v_shape[-1] > 0))
            and (head_dim := q_shape[-1]) == k_shape[-1]
            and head_dim > 0
            and (heads := q_shape[-2]) >= (kv_heads := k_shape[-2]) > 0
            and heads % kv_heads == 0
            and (layout != "dense" or q_shape[0] == k_shape[0])
            and dtype in DTYPES
            and k.dtype is dtype
            and v.dtype is dtype
            and k.device == device
            and v.device == device
        ):
            return head_dim, v_shape[-1]
    _check_one_by_one(q, k, v, layout)
    return q.shape[-1], v.shape[-1]


def _check_one_by_one(q: Tensor, k: Tensor, v: Tensor, layout: str) -> None:
    query_rank, key_rank = _RANKS[layout]
    query_shape, key_shape = _SHAPES[layout]
    for name, x, rank, shape in (
        ("q", q, query_rank, query_shape),
        ("k", k, key_rank, key_shape),
        ("v", v, key_rank, key_shape),
    ):
        if not isinstance(x, Tensor):
            raise bad_argument(name, type(x).__name__, "a torch.Tensor", "convert it with torch.as_tensor")
        if x.dim() != rank:
            raise bad_argument(name, f"shape {tuple(x.shape)}", f"shape {shape}", f"reshape {name}")
    for name, x in (("k", k), ("v", v)):
        check_device(name, x, q)
        if x.dtype != q.dtype:
            raise bad_argument(
                name, f"dtype {x.dtype}", f"the dtype of q, {q.dtype}", "cast q, k, v to one dtype"
            )
    if q.dtype not in DTYPES:
        raise bad_argument(
            "q",
            f"dtype {q.dtype}",
            "a floating-point dtype: float16, bfloat16, float32 or float64",
            "cast q, k, v to bfloat16 or float32",
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
    for name, x in (("q", q), ("v", v)):
        if x.shape[-1] == 0:
            raise bad_argument(
                name, "head_dim 0", "a head_dim of at least 1", "pass tensors with a last dimension"
            )
    if layout == "dense" and q.shape[0] != k.shape[0]:
        raise bad_argument(
            "k", f"batch {k.shape[0]}", f"the batch of q, {q.shape[0]}", "expand k and v over the batch"
        )
    heads, kv_heads = q.shape[-2], k.shape[-2]
    for name, count in (("q", heads), ("k", kv_heads)):
        if count == 0:
            raise bad_argument(
                name, "0 heads", "at least 1 head", "skip the call: there is nothing to compute"
            )
    if heads % kv_heads != 0:
        hint = "pass q with a multiple of k's heads"
        if layout == "dense" and k.shape[1] > 0 and q.shape[1] != heads and q.shape[1] % k.shape[1] == 0:
            hint += f", or {transposed_layout_hint()}"
        raise bad_argument("q", f"{heads} heads", f"a multiple of the {kv_heads} heads of k and v", hint)


def transposed_layout_hint() -> str:
    """What to do about tensors in the layout of torch's own attention."""
    return "transpose (batch, heads, seqlen, head_dim) tensors with .transpose(1, 2)"


def check_device(name: str, x: Tensor, q: Tensor) -> None:
    """``x`` is on the device of q."""
    if x.device != q.device:
        raise bad_argument(name, f"device {x.device}", f"the device of q, {q.device}", "move it with .to")


def check_packed(q: Tensor, k: Tensor, v: Tensor, packed: PackedLayout) -> tuple[int, int]:
    """q, k, v and the tensors that divide them into sequences; returns the head dims of q and v."""
    head_dims = check_tensors(q, k, v, layout="packed" if packed.block_table is None else "paged")
    cu_seqlens_q, cu_seqlens_k = packed.cu_seqlens_q, packed.cu_seqlens_k
    _check_index_tensor("cu_seqlens_q", cu_seqlens_q, q, None)
    _check_index_tensor("cu_seqlens_k", cu_seqlens_k, q, None)
    batch = cu_seqlens_q.shape[0] - 1
    if cu_seqlens_k.shape[0] - 1 != batch:
        raise bad_argument(
            "cu_seqlens_k",
            f"{cu_seqlens_k.shape[0] - 1} sequences",
            f"the {batch} of cu_seqlens_q",
            "align them",
        )
    if packed.seqused_q is not None:
        _check_index_tensor("seqused_q", packed.seqused_q, q, batch)
    if packed.seqused_k is not None:
        _check_index_tensor("seqused_k", packed.seqused_k, q, batch)
    if packed.block_table is not None:
        _check_block_table(packed.block_table, batch, q)
    if _values_are_readable(cu_seqlens_q):
        _check_values(q, k, packed)
    return head_dims


def _check_index_tensor(name: str, x: Tensor, q: Tensor, length: int | None) -> None:
    """int32, one-dimensional (of ``length``, or at least 1) and on the device of q."""
    if (
        not isinstance(x, Tensor)
        or x.dim() != 1
        or (x.shape[0] < 1 if length is None else x.shape[0] != length)
    ):
        got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        if length is None:
            expected, fix = "(batch + 1,)", "pass cumulative lengths starting at 0"
        else:
            expected, fix = f"({length},)", "pass one length per sequence"
        raise bad_argument(name, got, f"an int32 tensor of shape {expected}", fix)
    if x.dtype != torch.int32:
        raise bad_argument(name, f"dtype {x.dtype}", "torch.int32", f"{name}.to(torch.int32)")
    check_device(name, x, q)


def _check_block_table(block_table: Tensor, batch: int, q: Tensor) -> None:
    """The page table is int32 (B, max_pages) on the device of q."""
    if not isinstance(block_table, Tensor) or block_table.dim() != 2 or block_table.shape[0] != batch:
        is_tensor = isinstance(block_table, Tensor)
        raise bad_argument(
            "block_table",
            f"shape {tuple(block_table.shape)}" if is_tensor else type(block_table).__name__,
            f"({batch}, max_pages)",
            "pass one row per sequence",
        )
    if block_table.dtype != torch.int32:
        raise bad_argument(
            "block_table", f"dtype {block_table.dtype}", "torch.int32", "block_table.to(torch.int32)"
        )
    check_device("block_table", block_table, q)


def _values_are_readable(x: Tensor) -> bool:
    """Reading values costs a synchronisation on a GPU, and there are none while tracing."""
    return x.is_cpu and not torch.compiler.is_compiling() and not isinstance(x, torch._subclasses.FakeTensor)


def _check_values(q: Tensor, k: Tensor, packed: PackedLayout) -> None:
    """Lengths and page numbers point into the tensors (on the CPU only)."""
    table = packed.block_table
    key_tokens = k.shape[0]
    if table is not None:
        key_tokens = table.shape[0] * table.shape[1] * k.shape[1]
    _check_lengths("q", packed.cu_seqlens_q, packed.seqused_q, q.shape[0])
    lengths_k = _check_lengths("k", packed.cu_seqlens_k, packed.seqused_k, key_tokens)
    if table is None:
        return
    page_size = k.shape[1]
    for b, length in enumerate(lengths_k):
        if length > table.shape[1] * page_size:
            raise bad_argument(
                "block_table",
                f"{table.shape[1]} pages of {page_size} for the {length} keys of sequence {b}",
                "pages for every key",
                "add columns",
            )
        pages = table[b, : -(-length // page_size)].tolist() if length > 0 else []
        if any(page < 0 or page >= k.shape[0] for page in pages):
            raise bad_argument(
                "block_table",
                f"{pages[:8]} for sequence {b}",
                f"pages in [0, {k.shape[0]})",
                "check the page table",
            )


def _check_lengths(side: str, cu_seqlens: Tensor, seqused: Tensor | None, tokens: int) -> list[int]:
    """The lengths of the sequences, after checking that they exist."""
    name = f"cu_seqlens_{side}"
    ends = cu_seqlens.tolist()
    lengths = [end - begin for begin, end in itertools.pairwise(ends)]
    if ends[0] != 0 or any(length < 0 for length in lengths):
        raise bad_argument(name, ends[:8], "cumulative lengths that start at 0 and never fall", "use cumsum")
    if ends[-1] > tokens:
        raise bad_argument(name, f"a total of {ends[-1]}", f"at most {tokens} tokens", "check the lengths")
    if seqused is None:
        return lengths
    used = seqused.tolist()
    if any(n < 0 or n > length for n, length in zip(used, lengths, strict=True)):
        raise bad_argument(
            f"seqused_{side}",
            used[:8],
            f"lengths within those of {name}, {lengths[:8]}",
            "pass at most those",
        )
    return used

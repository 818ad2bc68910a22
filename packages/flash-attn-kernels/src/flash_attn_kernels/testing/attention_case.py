"""One attention problem of a test matrix: what describes it, and the tensors of a call made from that.

Every row of q, k and v that the call must not read holds NaN: rows after the last sequence, rows from ``seqused`` on,
page tails, and the keys that a key-padding mask hides from every query.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import bad_argument
from ..options import AttentionOptions, make_options

LAYOUTS = ("dense", "packed", "seqused", "paged", "paged seqused")
STRIDES = ("contiguous", "transposed", "padded", "misaligned", "every other", "expanded")
_SPARE_ROWS = 5  # after the last packed sequence
_SHARED_PAGE = 0  # the last sequence shares this page of the first, where both have it in full


@dataclass(frozen=True)
class AttentionCase:
    """What describes an attention problem; every field has an ordinary value to start from.

    ``attn_bias`` and ``attn_mask`` name by the letters b, h, q, k the dimensions that they have in full ("" is one
    value for all); None is no such tensor. ``alibi_slopes`` is "h" for (H,), "bh" for (B, H). ``strides`` are those of
    q, k and v, ``gradient_strides`` those of the gradient of the output; see :data:`STRIDES`.
    """

    dtype: torch.dtype = torch.bfloat16
    head_dims: tuple[int, int] = (64, 64)  # of q and k, and of v
    heads: tuple[int, int] = (4, 2)  # of q, and of k and v
    lengths: tuple[tuple[int, int], ...] = ((100, 100), (100, 100))  # (Sq, Sk) of each sequence
    layout: str = "dense"
    page_size: int = 16
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    causal_alignment: str = "bottom-right"
    softmax_scale: float | None = None
    softcap: float = 0.0
    dropout_p: float = 0.0
    deterministic: bool = False
    attn_bias: str | None = None
    bias_dtype: torch.dtype = torch.float32
    attn_mask: str | None = None
    key_padding: bool = False
    alibi_slopes: str | None = None
    sink_dtype: torch.dtype | None = None
    strides: str = "contiguous"
    gradient_strides: str = "contiguous"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, got, known in (
            ("layout", self.layout, LAYOUTS),
            ("strides", self.strides, STRIDES),
            ("gradient_strides", self.gradient_strides, STRIDES),
        ):
            if got not in known:
                raise bad_argument(name, repr(got), f"one of {known}", "see AttentionCase")
        if self.layout == "dense" and len(set(self.lengths)) > 1:
            raise bad_argument("lengths", self.lengths, "equal lengths", "use another layout")

    @property
    def options(self) -> AttentionOptions:
        """The options as the paths and the reference take them."""
        return make_options(
            head_dim=self.head_dims[0],
            softmax_scale=self.softmax_scale,
            causal=self.causal,
            window_size=self.window_size,
            softcap=self.softcap,
            dropout_p=self.dropout_p,
            deterministic=self.deterministic,
            causal_alignment=self.causal_alignment,
        )

    @property
    def is_paged(self) -> bool:
        return self.layout.startswith("paged")

    @property
    def has_seqused(self) -> bool:
        return self.layout.endswith("seqused")


@dataclass(frozen=True)
class Rows:
    """Where sequences lie in the tensors of a call: which batch indices, and how to take their rows out of a tensor.

    ``query`` and ``key`` take q-like and k-like tensors to (batch, rows, heads, head_dim); ``query_lse`` takes an
    LSE-like one to (batch, heads, rows). Differentiable.
    """

    batch: slice
    query: Callable[[Tensor], Tensor]
    query_lse: Callable[[Tensor], Tensor]
    key: Callable[[Tensor], Tensor]


@dataclass
class AttentionTensors:
    """The tensors of one call, and for each group of sequences where to find it in them."""

    case: AttentionCase
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor  # gradients of the output and of the LSE
    dlse: Tensor
    modifiers: dict[str, Tensor] = field(default_factory=dict)  # by argument name
    layout: dict[str, Any] = field(default_factory=dict)  # cu_seqlens and what else the packed function takes
    rows: list[Rows] = field(default_factory=list)

    @property
    def arguments(self) -> dict[str, Any]:
        """Everything after q, k, v in a call of the public functions and of ``explain``."""
        case = self.case
        return {
            "dropout_p": case.dropout_p,
            "softmax_scale": case.softmax_scale,
            "causal": case.causal,
            "window_size": case.window_size,
            "softcap": case.softcap,
            "deterministic": case.deterministic,
            "causal_alignment": case.causal_alignment,
            **self.modifiers,
            **self.layout,
        }


def make_tensors(case: AttentionCase, device: torch.device | str = "cuda") -> AttentionTensors:
    """Random tensors of the case, the same for the same seed on the same device."""
    generator = torch.Generator(device=device).manual_seed(case.seed)

    def randn(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype, generator=generator)

    (H, Hk), (D, Dv) = case.heads, case.head_dims
    modifiers = _make_modifiers(case, generator, device)
    query_shape: tuple[int, ...]
    key_shape: tuple[int, ...]
    if case.layout == "dense":
        B, (Sq, Sk) = len(case.lengths), case.lengths[0]
        layout: dict[str, Any] = {}
        rows = [Rows(slice(None), _same, _same, _same)]
        query_shape, key_shape = (B, Sq), (B, Sk)
    else:
        layout, rows, Tq, key_shape = _make_layout(case, generator, device)
        query_shape = (Tq,)
    lse_shape = (*query_shape[:-1], H, query_shape[-1])
    q = randn(*query_shape, H, D)
    k, v = randn(*key_shape, Hk, D), randn(*key_shape, Hk, Dv)
    dout, dlse = randn(*query_shape, H, Dv), randn(*lse_shape, dtype=torch.float32)
    if case.gradient_strides == "expanded":  # one row of gradients for all queries
        dout = dout[..., :1, :, :].expand(dout.shape) if dout.shape[-3] else dout
    else:
        _poison(dout, rows, lambda r, x: r.query(x))
        dout = with_strides(dout, case.gradient_strides)
    _poison(q, rows, lambda r, x: r.query(x))
    if case.layout != "dense":
        dlse.masked_fill_(q[:, 0, 0].isnan(), math.nan)
    padding = modifiers.get("key_padding_mask")
    for x in (k, v):
        _poison(x, rows, lambda r, x: _visible_keys(r.key(x), r.batch, padding))
    if case.strides == "expanded":  # one head of keys and values for all
        k, v = (x[..., :1, :].expand(x.shape) for x in (k, v))
    else:
        q, k, v = (with_strides(x, case.strides) for x in (q, k, v))
    return AttentionTensors(case, q, k, v, dout, dlse, modifiers, layout, rows)


def with_strides(x: Tensor, strides: str) -> Tensor:
    """The same values with the named strides; what lies between them is NaN.

    "transposed" swaps rows and heads in memory, "padded" leaves 8 elements after every head, "misaligned" starts one
    element after an aligned address and leaves no row aligned, "every other" has a last stride of 2.
    """
    *shape, D = x.shape
    if strides == "transposed":
        return x.transpose(-3, -2).contiguous().transpose(-3, -2)
    if strides == "contiguous":
        return x
    width, view = {
        "padded": (D + 8, slice(0, D)),
        "misaligned": (D + 1 + D % 2, slice(1, D + 1)),
        "every other": (2 * D, slice(0, None, 2)),
    }[strides]
    spaced = x.new_full((*shape, width), math.nan)[..., view]
    return spaced.copy_(x)


def _same(x: Tensor) -> Tensor:
    return x


def _visible_keys(x: Tensor, batch: slice, key_padding_mask: Tensor | None) -> Tensor:
    """The rows of (batch, Sk, ...) that a key-padding mask leaves, as (rows, ...)."""
    if key_padding_mask is None:
        return x.flatten(0, 1)
    return x[key_padding_mask[batch, : x.shape[1]]]


def _poison(x: Tensor, rows: list[Rows], used: Callable[[Rows, Tensor], Tensor]) -> None:
    """NaN in every row of x that ``used`` returns for no group of sequences. Rows are found by their number."""
    row_shape = x.shape[:-2]
    numbers = torch.arange(math.prod(row_shape), device=x.device).reshape(*row_shape, 1, 1)
    is_used = torch.zeros(math.prod(row_shape), dtype=torch.bool, device=x.device)
    for group in rows:
        is_used[used(group, numbers).flatten()] = True
    x.masked_fill_(~is_used.reshape(numbers.shape), math.nan)


def _make_layout(
    case: AttentionCase, generator: torch.Generator, device: torch.device | str
) -> tuple[dict[str, Any], list[Rows], int, tuple[int, ...]]:
    """The packed function's arguments, where each sequence lies, the rows of q and the row dimensions of k."""
    lengths_q, lengths_k = ([pair[side] for pair in case.lengths] for side in (0, 1))
    unused = [(b % 3 + (b == 0)) * case.has_seqused for b in range(len(case.lengths))]
    begins_q, begins_k = (
        _cumulative(length + more for length, more in zip(lengths, unused, strict=True))
        for lengths in (lengths_q, lengths_k)
    )
    layout: dict[str, Any] = {
        "cu_seqlens_q": torch.tensor(begins_q, dtype=torch.int32, device=device),
        "cu_seqlens_k": torch.tensor(begins_k, dtype=torch.int32, device=device),
        "max_seqlen_q": max(lengths_q, default=0),
        "max_seqlen_k": max(lengths_k, default=0),
    }
    if case.has_seqused:
        layout["seqused_q"] = torch.tensor(lengths_q, dtype=torch.int32, device=device)
        layout["seqused_k"] = torch.tensor(lengths_k, dtype=torch.int32, device=device)
    key_shape: tuple[int, ...] = (begins_k[-1] + _SPARE_ROWS,)
    table = None
    if case.is_paged:
        slots = [end - begin for begin, end in itertools.pairwise(begins_k)]
        table, num_pages = _make_block_table(slots, case.page_size, generator, device)
        layout["block_table"] = table
        key_shape = (num_pages, case.page_size)
    rows = []
    for b, (Sq, Sk) in enumerate(case.lengths):
        query = slice(begins_q[b], begins_q[b] + Sq)
        position = torch.arange(Sk, device=device)
        key = begins_k[b] + position
        if table is not None:
            key = table[b, position // case.page_size].long() * case.page_size + position % case.page_size
        rows.append(_rows_of_sequence(b, query, key))
    return layout, rows, begins_q[-1] + _SPARE_ROWS, key_shape


def _rows_of_sequence(b: int, query: slice, key: Tensor) -> Rows:
    """A packed sequence, from its query rows and the numbers of its key rows in pages laid end to end."""
    return Rows(
        slice(b, b + 1),
        query=lambda x: x[query].unsqueeze(0),
        query_lse=lambda x: x[:, query].unsqueeze(0),
        key=lambda x: x.reshape(-1, *x.shape[-2:])[key].unsqueeze(0),
    )


def _cumulative(lengths: Any) -> list[int]:
    begins = [0]
    for length in lengths:
        begins.append(begins[-1] + length)
    return begins


def _make_block_table(
    lengths: list[int], page_size: int, generator: torch.Generator, device: torch.device | str
) -> tuple[Tensor, int]:
    """Pages in random order, -1 where a sequence needs none; the first and the last sequence share their first page."""
    needed = [-(-length // page_size) for length in lengths]
    num_pages = sum(needed) + 1
    order = torch.randperm(num_pages, generator=generator, device=device).to(torch.int32)
    table = torch.full((len(lengths), max([1, *needed])), -1, dtype=torch.int32, device=device)
    first = 0
    for b, count in enumerate(needed):
        table[b, :count] = order[first : first + count]
        first += count
    if len(lengths) > 1 and min(lengths[0], lengths[-1]) >= page_size:
        table[-1, _SHARED_PAGE] = table[0, _SHARED_PAGE]
    return table, num_pages


def _make_modifiers(
    case: AttentionCase, generator: torch.Generator, device: torch.device | str
) -> dict[str, Tensor]:
    B, H = len(case.lengths), case.heads[0]
    longest = {
        "q": max((pair[0] for pair in case.lengths), default=0),
        "k": max((pair[1] for pair in case.lengths), default=0),
    }
    sizes = {"b": B, "h": H, **longest}

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, device=device, generator=generator)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator)

    def broadcast_shape(pattern: str) -> list[int]:
        return [sizes[letter] if letter in pattern else 1 for letter in "bhqk"]

    modifiers = {}
    if case.attn_bias is not None:
        modifiers["attn_bias"] = normal(*broadcast_shape(case.attn_bias)).to(case.bias_dtype)
    if case.attn_mask is not None:
        # A single value for all says True: nothing would be left to compare.
        modifiers["attn_mask"] = (uniform(*broadcast_shape(case.attn_mask)) < 0.8) | (not case.attn_mask)
    if case.key_padding:
        modifiers["key_padding_mask"] = uniform(B, longest["k"]) < 0.7
    if case.alibi_slopes is not None:
        modifiers["alibi_slopes"] = 0.01 + 0.2 * uniform(*(sizes[letter] for letter in case.alibi_slopes))
    if case.sink_dtype is not None:
        modifiers["learnable_sink"] = (normal(H) + 1.0).to(case.sink_dtype)
    return modifiers

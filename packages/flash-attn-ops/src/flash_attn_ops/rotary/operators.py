"""The launcher of the rotary kernel as operators: heads of one tensor, or of two, new or overwritten.

In one tensor the first ``num_first`` heads take cos and sin, the ``num_second`` behind them cos_k and sin_k (cos and
sin if None), and the rest, the values of packed queries, keys and values, is left or copied.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flash_attn_ops.launch import empty_like
from flash_attn_ops.library import kernels_of, opaque

_kernels = kernels_of(__package__)

_TABLES = "Tensor cos, Tensor sin, Tensor? cos_k, Tensor? sin_k"
_POSITIONS = "Tensor? offsets, SymInt offset, Tensor? cu_seqlens, Tensor? position_ids"
_OPTIONS = f"{_TABLES}, {_POSITIONS}, bool interleaved, bool conjugate"


@opaque(
    f"rotate_heads(Tensor x, SymInt num_first, SymInt num_second, {_OPTIONS}) -> Tensor",
    lambda x, *_: x.new_empty(x.shape),
)
def rotate_heads(x: Tensor, num_first: int, num_second: int, *options: Any) -> Tensor:
    """x (..., heads, D) rotated, contiguous."""
    x = _dense(x)
    out = empty_like(x)
    _launch_heads(x, out, num_first, num_second, *options)
    rest = num_first + num_second
    if rest < x.shape[-2]:
        out[..., rest:, :].copy_(x[..., rest:, :])
    return out


@opaque(
    f"rotate_heads_(Tensor(a!) x, SymInt num_first, SymInt num_second, {_OPTIONS}) -> ()", lambda *_: None
)
def rotate_heads_(x: Tensor, num_first: int, num_second: int, *options: Any) -> None:
    """The same, written into x, whose last dimension has no gaps."""
    _launch_heads(x, x, num_first, num_second, *options)


@opaque(
    f"rotate_pair(Tensor q, Tensor k, {_OPTIONS}) -> (Tensor, Tensor)",
    lambda q, k, *_: (q.new_empty(q.shape), k.new_empty(k.shape)),
)
def rotate_pair(q: Tensor, k: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """Two tensors of the same tokens rotated in one launch, contiguous."""
    q, k = _dense(q), _dense(k)
    out_q, out_k = empty_like(q), empty_like(k)
    _launch([(q, out_q), (k, out_k)], *options)
    return out_q, out_k


@opaque(f"rotate_pair_(Tensor(a!) q, Tensor(b!) k, {_OPTIONS}) -> ()", lambda *_: None)
def rotate_pair_(q: Tensor, k: Tensor, *options: Any) -> None:
    """The same, written into q and k, whose last dimensions have no gaps."""
    _launch([(q, q), (k, k)], *options)


def _launch_heads(x: Tensor, out: Tensor, num_first: int, num_second: int, *options: Any) -> None:
    if num_second and options[2] is None:  # one table for both: they are heads like others
        num_first, num_second = num_first + num_second, 0
    parts = [(x, out)]
    if num_first < x.shape[-2]:
        parts = [(x[..., :num_first, :], out[..., :num_first, :])]
    if num_second:
        keys = slice(num_first, num_first + num_second)
        parts.append((x[..., keys, :], out[..., keys, :]))
    _launch(parts, *options)


def _launch(
    parts: list[tuple[Tensor, Tensor]],
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None,
    sin_k: Tensor | None,
    offsets: Tensor | None,
    offset: int,
    cu_seqlens: Tensor | None,
    position_ids: Tensor | None,
    interleaved: bool,
    conjugate: bool,
) -> None:
    tables = [(_dense(cos), _dense(sin))]
    if len(parts) == 2:
        tables.append(tables[0] if cos_k is None or sin_k is None else (_dense(cos_k), _dense(sin_k)))
    if position_ids is not None:
        position_ids = position_ids.contiguous()
    _kernels().rotate(parts, tables, offsets, offset, cu_seqlens, position_ids, interleaved, conjugate)


def _dense(tensor: Tensor) -> Tensor:
    """With neighbouring values in the last dimension."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()

"""What the rotary functions accept. Everything is refused before anything is written."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_attn_ops.arguments import (
    bad_argument,
    check_floating,
    check_given,
    check_integer,
    check_same_device,
    check_shape,
)
from flash_attn_ops.dispatch import has_memory, once_for_like_calls

INTEGERS = (torch.int32, torch.int64)


class Tables(NamedTuple):
    """cos and sin, and those of keys where they have their own."""

    cos: Tensor
    sin: Tensor
    cos_k: Tensor | None = None
    sin_k: Tensor | None = None


class Positions(NamedTuple):
    """Which row of the table a token takes."""

    seqlen_offsets: int | Tensor = 0
    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None
    position_ids: Tensor | None = None


def check(tensors: dict[str, Tensor], tables: Tables, positions: Positions, inplace: bool) -> None:
    """``tensors`` are one or two by the names of their arguments: (B, S, H, D), or (T, H, D) if packed."""
    offsets, cu_seqlens, max_seqlen, position_ids = positions
    start: Any = offsets
    if isinstance(offsets, Tensor):
        start = None
    elif type(offsets) is int:
        start = int(offsets != 0)  # nothing but this is looked at
    _check_fit(
        (*tensors.values(), *tables, offsets if start is None else None, cu_seqlens, position_ids),
        *(tuple(tensors), type(offsets), start, max_seqlen if cu_seqlens is None else None),
    )
    if torch.is_grad_enabled():
        for table in tables:
            if table is not None and table.requires_grad:
                got = "a tensor that requires grad"
                raise bad_argument("cos or sin", got, "constants", "detach the tables")
    if inplace:
        for name, x in tensors.items():
            _check_overwritable(name, x)
    check_positions(next(iter(tensors.values())), tables.cos, positions)


@once_for_like_calls
def _check_fit(
    given: tuple[Any, ...], names: tuple[str, ...], _: type, start: Any, max_seqlen: int | None
) -> None:
    """Types, devices and shapes of the tensors of these names, the tables, and the tensors that positions come in."""
    tensors: dict[str, Tensor] = dict(zip(names, given, strict=False))
    tables = Tables(*given[len(names) : -3])
    offsets, cu_seqlens, position_ids = given[-3:]
    positions = Positions(start if offsets is None else offsets, cu_seqlens, max_seqlen, position_ids)
    check_given(**tensors, cos=tables.cos, sin=tables.sin)
    check_floating(**tensors, **tables._asdict())
    indices = {"seqlen_offsets": offsets, "cu_seqlens": cu_seqlens, "position_ids": position_ids}
    for name, tensor in indices.items():
        if tensor is not None:
            check_integer(name, tensor, INTEGERS)
    check_same_device(**tensors, **tables._asdict(), **indices)
    for name, x in tensors.items():
        _check_layout(name, x, positions)
    name, x = next(iter(tensors.items()))
    for other_name, other in tensors.items():
        if other.shape[:-2] != x.shape[:-2] or other.shape[-1] != x.shape[-1]:
            got = f"shapes {tuple(x.shape)} and {tuple(other.shape)}"
            fix = "pass queries and keys of the same tokens and head dimension"
            raise bad_argument(f"{name} and {other_name}", got, "shapes that differ in H only", fix)
    _check_tables(name, x, tables)
    _check_sequences(x, positions)


def _check_layout(name: str, x: Tensor, positions: Positions) -> None:
    layout, dims = "(B, S, H, D)", 4
    if positions.cu_seqlens is not None:
        layout, dims = "(T, H, D), which cu_seqlens asks for", 3
    elif positions.position_ids is not None and positions.position_ids.dim() == 1:
        layout, dims = "(T, H, D), which position_ids (T,) ask for", 3
    if x.dim() != dims:
        fix = "add the missing dimension, or give cu_seqlens with packed sequences only"
        raise bad_argument(name, f"shape {tuple(x.shape)}", layout, fix)


def _check_tables(name: str, x: Tensor, tables: Tables) -> None:
    cos = tables.cos
    if cos.dim() != 2:
        raise bad_argument(
            "cos", f"shape {tuple(cos.shape)}", "(positions, R/2)", "pass one row for each position"
        )
    if (tables.cos_k is None) != (tables.sin_k is None):
        given, absent = ("sin_k", "cos_k") if tables.cos_k is None else ("cos_k", "sin_k")
        raise bad_argument(absent, None, f"a table, as {given} is", "give both or neither")
    for other_name, other in tables._asdict().items():
        if other is not None:
            check_shape(other_name, other, cos.shape, "the shape of cos")
    if not 0 < 2 * cos.shape[1] <= x.shape[-1]:
        got = f"{cos.shape[1]} columns, for R = {2 * cos.shape[1]} rotated dimensions"
        expected = f"0 < R <= {x.shape[-1]}, the last dimension of {name}"
        raise bad_argument("cos", got, expected, "build the table for half of the rotated dimensions")


def _check_overwritable(name: str, x: Tensor) -> None:
    if x.numel() and (
        x.stride(-1) != 1 or any(s == 0 < n - 1 for n, s in zip(x.shape, x.stride(), strict=True))
    ):
        got = f"{name} of strides {x.stride()}"
        raise bad_argument(
            "inplace", got, "a last dimension without gaps, nothing expanded", "use inplace=False"
        )
    if x.requires_grad and x.is_leaf and torch.is_grad_enabled():
        got = f"a leaf tensor {name} that requires grad"
        raise bad_argument(
            "inplace", got, f"{'an' if name == 'x' else 'a'} {name} that may be overwritten", "use a copy"
        )


def _check_sequences(x: Tensor, positions: Positions) -> None:
    offsets, cu_seqlens, max_seqlen, position_ids = positions
    num_sequences = x.shape[0]
    if position_ids is not None:
        check_shape("position_ids", position_ids, x.shape[:-2], "one position for each token")
        if cu_seqlens is not None or isinstance(offsets, Tensor) or offsets != 0:
            got = "position_ids together with seqlen_offsets or cu_seqlens"
            raise bad_argument(
                "position_ids", got, "one way to say positions", "add the offsets to position_ids"
            )
    if cu_seqlens is not None:
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
    if isinstance(offsets, Tensor):
        check_shape("seqlen_offsets", offsets, (num_sequences,), "one offset for each sequence")
    elif type(offsets) is not int and not isinstance(offsets, int | torch.SymInt):
        got = type(offsets).__name__
        raise bad_argument("seqlen_offsets", got, "an int or an integer tensor", "pass int(seqlen_offsets)")


def check_positions(x: Tensor, cos: Tensor, positions: Positions) -> None:
    """The table has every position, as far as the host knows the positions."""
    offsets, cu_seqlens, max_seqlen, position_ids = positions
    host_reads = x.device.type == "cpu" and not torch.compiler.is_compiling() and has_memory(x)
    if position_ids is not None:
        if host_reads and position_ids.numel():
            first, last = int(position_ids.min()), int(position_ids.max())
            _check_range("position_ids", first, last + 1, len(cos))
        return
    lengths: int | Tensor = x.shape[1] if cu_seqlens is None else max_seqlen or 0
    if cu_seqlens is not None and host_reads:
        lengths = cu_seqlens.diff()
        if lengths.min() < 0 or cu_seqlens[0] < 0 or cu_seqlens[-1] > x.shape[0]:
            expected = f"non-decreasing values from 0 to {x.shape[0]}, the tokens of x"
            raise bad_argument("cu_seqlens", cu_seqlens.tolist(), expected, "pass cumulative lengths")
    if isinstance(offsets, Tensor):
        if not host_reads or not len(offsets):
            return
        ends = torch.where(torch.as_tensor(lengths, device=offsets.device) > 0, offsets + lengths, 0)
        first, end = int(offsets.min()), int(ends.max())
    else:
        longest = int(lengths.max()) if isinstance(lengths, Tensor) else lengths
        first, end = offsets, offsets + longest if longest else 0
    _check_range("seqlen_offsets", first, end, cos.shape[0])


def _check_range(name: str, first: int, end: int, rows: int) -> None:
    if first < 0:
        raise bad_argument(name, first, "no negative position", "count positions from 0")
    if end > rows:
        expected = f"positions below {rows}, the rows of cos"
        raise bad_argument(name, f"tokens at positions up to {end - 1}", expected, "build a longer table")

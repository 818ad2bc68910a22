"""Dropout, addition and norm where a branch has only some of the rows, for stochastic depth."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flash_attn_ops.arguments import bad_argument, check_floating, check_integer
from flash_attn_ops.dispatch import has_memory

from .functions import layer_norm, rms_norm

Results = Tensor | tuple[Any, ...]


def dropout_add_layer_norm_subset(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    epsilon: float,
    layerscale: Tensor | None = None,
    x0_subset: Tensor | None = None,
    out_subset: Tensor | None = None,
    rowscale_const: float = 1.0,
    out_numrows: int = 0,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Results:
    """:func:`dropout_add_layer_norm` where x0 has only some of the rows, and only some rows of the norm are wanted
    (stochastic depth that skips the dropped rows' computation).

    Args:
        x0: (rows of the branch, N), multiplied by ``rowscale_const``.
        x0_subset: int32 (rows of the sum,): which row of x0, counted from 1, is added to this row; 0: none. None: x0
            has every row.
        out_subset: int32 (rows of the sum,): which row of out, counted from 1, takes this row's norm; 0: none. None:
            out has every row.
        out_numrows: rows of out, with ``out_subset``; those that no row maps to are 0.

    The maps are gathers and a scatter around the kernel: one more pass over x0 and over out.
    """
    return _subset(
        *(layer_norm, x0, residual, weight, bias, dropout_p, epsilon, layerscale, x0_subset, out_subset),
        *(rowscale_const, out_numrows, prenorm, residual_in_fp32, return_dropout_mask),
    )


def dropout_add_rms_norm_subset(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    epsilon: float,
    layerscale: Tensor | None = None,
    x0_subset: Tensor | None = None,
    out_subset: Tensor | None = None,
    rowscale_const: float = 1.0,
    out_numrows: int = 0,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Results:
    """:func:`dropout_add_layer_norm_subset` with RMSNorm."""
    return _subset(
        *(rms_norm, x0, residual, weight, bias, dropout_p, epsilon, layerscale, x0_subset, out_subset),
        *(rowscale_const, out_numrows, prenorm, residual_in_fp32, return_dropout_mask),
    )


def sum_options(
    residual: Tensor | None, residual_in_fp32: bool, prenorm: bool, return_dropout_mask: bool
) -> dict[str, Any]:
    """Options in the sense of this family: a residual keeps its dtype, whatever ``residual_in_fp32`` says."""
    return {
        "residual": residual,
        "residual_in_fp32": residual_in_fp32 and residual is None,
        "prenorm": prenorm,
        "return_dropout_mask": return_dropout_mask,
    }


def _subset(
    norm: Any,
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    epsilon: float,
    layerscale: Tensor | None,
    x0_subset: Tensor | None,
    out_subset: Tensor | None,
    rowscale_const: float,
    out_numrows: int,
    prenorm: bool,
    residual_in_fp32: bool,
    return_dropout_mask: bool,
) -> Results:
    check_floating(x0=x0)
    if x0.dim() != 2:
        raise bad_argument("x0", f"shape {tuple(x0.shape)}", "(rows, N)", "flatten the leading dimensions")
    num_rows = x0.shape[0]
    if x0_subset is not None:
        check_integer("x0_subset", x0_subset, (torch.int32, torch.int64))
        num_rows = x0_subset.numel()
        _check_map("x0_subset", x0_subset, num_rows, x0.shape[0], "the rows of x0")
    if out_subset is not None:
        check_integer("out_subset", out_subset, (torch.int32, torch.int64))
        _check_map("out_subset", out_subset, num_rows, out_numrows, "out_numrows")
    x = x0
    if x0_subset is not None:  # row 0 is the one that adds nothing
        x = torch.cat([x0.new_zeros(1, x0.shape[1]), x0]).index_select(0, x0_subset)
    rowscale = (
        None if rowscale_const == 1.0 else x0.new_full((num_rows,), rowscale_const, dtype=torch.float32)
    )
    results = norm(
        *(x, weight, bias),
        **sum_options(residual, residual_in_fp32, prenorm, return_dropout_mask),
        eps=epsilon,
        dropout_p=dropout_p,
        rowscale=rowscale,
        layerscale=layerscale,
    )
    out, *rest = results if isinstance(results, tuple) else (results,)
    if out_subset is not None:  # rows that are not wanted meet in row 0, which is cut off
        all_rows = out.new_zeros(out_numrows + 1, out.shape[1])
        out = all_rows.index_copy(0, out_subset.long(), out)[1:]
    if return_dropout_mask:
        mask = torch.ones_like(x, dtype=torch.uint8) if rest[-2] is None else rest[-2].to(torch.uint8)
        if x0_subset is not None:  # from rows of the sum back to rows of x0
            rows_of_x0 = mask.new_ones(x0.shape[0] + 1, x0.shape[1])
            mask = rows_of_x0.index_copy(0, x0_subset.long(), mask)[1:]
        rest[-2:] = [mask]
    return (out, *rest) if rest else out


def _check_map(name: str, rows: Tensor, num_rows: int, most: int, meaning: str) -> None:
    """One row for each row of the sum, of so many at most; values are looked at on a CPU only, where that waits for
    nothing."""
    if rows.shape != (num_rows,):
        expected = f"({num_rows},), one for each row of the sum"
        raise bad_argument(name, f"shape {tuple(rows.shape)}", expected, "map every row, to 0 if to none")
    is_read = rows.is_cpu and has_memory(rows) and not torch.compiler.is_compiling()
    if is_read and num_rows > 0:
        first, last = (int(value) for value in rows.aminmax())
        if first < 0 or last > most:
            got, expected = f"values from {first} to {last}", f"0 to {most}, {meaning}"
            raise bad_argument(name, got, expected, "count rows from 1; 0 is none")

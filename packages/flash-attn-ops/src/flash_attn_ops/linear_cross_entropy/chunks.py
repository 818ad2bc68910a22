"""Losses and gradients of a language model's head, a chunk of rows at a time.

For every chunk: logits by a matrix product, into one buffer that all chunks share; their losses; the gradient of the
losses' sum in place of the logits; and from it the gradients of hidden, weight and bias. The logits of all rows
together never exist.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from flash_attn_ops.autocast import without_autocast
from flash_attn_ops.cross_entropy import losses_of_rows, reference
from flash_attn_ops.cross_entropy.options import Options
from flash_attn_ops.launch import ceil_div

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

CHUNK_ROWS, CHUNK_BYTES = 4096, 2**30  # at most, of a chunk's logits
SUMMED_ROWS, SUMMED_BYTES = 16384, 2**31  # where every chunk costs another pass over the weight's gradient
TILE_ROWS = 128  # of a matrix product
ALIGNED_BYTES = 16
PADDED_COLUMNS = 64

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # of hidden, weight and bias
Wanted = tuple[bool, bool, bool]


def choose_chunk_rows(
    num_rows: int, num_columns: int, element_bytes: int, rows_of_sum: int | None = None
) -> int:
    """Rows of a chunk, divided evenly: up to 4096 rows and 1 GiB of logits, or, with a sum of the weight's gradient in
    float32, up to 16384 and 2 GiB.

    Every chunk reads and writes that sum, 8 bytes an element, in which time a GPU of 800 TFLOP/s and 3 TB/s does all
    three products for some 350 rows: a twelfth of the time of a chunk of 4096, a fiftieth of one of 16384.

    Args:
        rows_of_sum: the rows of logits that fit into the memory that one chunk saves, which needs no sum; None is no
            sum in any case. So many rows beyond the limit still are one chunk, which takes no more memory than the
            largest of several and the sum.
    """
    most_rows, most_bytes = (CHUNK_ROWS, CHUNK_BYTES) if rows_of_sum is None else (SUMMED_ROWS, SUMMED_BYTES)
    limit = min(most_rows, most_bytes // max(1, num_columns * element_bytes))
    limit = max(limit // TILE_ROWS, 1) * TILE_ROWS
    if num_rows <= limit + (rows_of_sum or 0):
        return max(num_rows, 1)
    even = ceil_div(num_rows, ceil_div(num_rows, limit))
    return ceil_div(even, TILE_ROWS) * TILE_ROWS


def result_dtype(dtype: torch.dtype, accumulate_in_float32: bool) -> torch.dtype:
    """What the gradient of a weight of this dtype is returned in: its own, but for float16, in which the gradient of a
    sum of losses may be too large."""
    return torch.float32 if dtype == torch.float16 and accumulate_in_float32 else dtype


@dataclass(frozen=True)
class Plan:
    """Rows of a chunk, and the dtypes of the products for the weight's gradient and of their sum in the end."""

    chunk_rows: int
    sum_dtype: torch.dtype
    result_dtype: torch.dtype

    @staticmethod
    def choose(
        hidden: Tensor,
        weight: Tensor,
        num_columns: int,
        chunk_rows: int | None,
        d_weight: bool,
        accumulate_in_float32: bool,
    ) -> Plan:
        dtype, num_rows = weight.dtype, hidden.shape[0]
        result = result_dtype(dtype, accumulate_in_float32)
        wide = accumulate_in_float32 and dtype in (torch.float16, torch.bfloat16)
        if chunk_rows is None:
            rows_of_sum = None
            if d_weight and wide:  # a sum twice as long as the result, if that is not as long itself
                rows_of_sum = weight.shape[1] if result == dtype else 0
            chunk_rows = choose_chunk_rows(num_rows, num_columns, weight.element_size(), rows_of_sum)
        return Plan(chunk_rows, torch.float32 if wide and num_rows > chunk_rows else result, result)


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    options: Options,
    wanted: Wanted,
    *,
    d_loss: Tensor | None,
    on_triton: bool,
    chunk_rows: int | None,
    accumulate_in_float32: bool,
    process_group: ProcessGroup | None = None,
) -> tuple[Tensor | None, ...]:
    """``(losses, maximum, log_total, d_hidden, d_weight, d_bias)`` of hidden (M, E), weight (V, E), labels (M,); the
    gradients are those of the losses' sum, times d_loss (a scalar, None is 1). Not wanted ones are None; d_weight and
    d_bias may have more precision than their tensors."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    results = tuple(hidden.new_empty(hidden.shape[0], dtype=dtype) for _ in range(3))

    def losses_then_gradient(logits: Tensor, rows: slice) -> None:
        if on_triton and process_group is None and any(wanted):
            from flash_attn_ops.cross_entropy import triton_kernels

            found = triton_kernels.losses_and_gradient_(logits, labels[rows], options, d_loss)
        else:
            found = losses_of_rows(logits, labels[rows], None, options, on_triton, process_group)
            if any(wanted):
                factor = logits.new_ones((), dtype=dtype) if d_loss is None else d_loss
                _gradient_(logits, labels[rows], found[1], found[2], factor, options, on_triton)
        for result, part in zip(results, found, strict=True):
            result[rows] = part

    columns = weight.shape[0]
    if (
        process_group is not None
    ):  # its ranks reduce chunk by chunk, and may have unequal parts of the classes
        columns = ceil_div(options.num_classes, process_group.size())
    plan = Plan.choose(hidden, weight, columns, chunk_rows, wanted[1], accumulate_in_float32)
    return *results, *_for_each_chunk(hidden, weight, bias, wanted, losses_then_gradient, plan)


def backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    lse_parts: tuple[Tensor, Tensor],
    d_losses: Tensor,
    options: Options,
    wanted: Wanted,
    *,
    on_triton: bool,
    chunk_rows: int | None,
    accumulate_in_float32: bool,
) -> Gradients:
    """The gradients for a gradient of each loss, d_losses (M,); logits are computed again."""
    maximum, log_total = lse_parts

    def gradient(logits: Tensor, rows: slice) -> None:
        row_parts = (labels[rows], maximum[rows], log_total[rows])
        _gradient_(logits, *row_parts, d_losses[rows], options, on_triton)

    plan = Plan.choose(hidden, weight, weight.shape[0], chunk_rows, wanted[1], accumulate_in_float32)
    return _for_each_chunk(hidden, weight, bias, wanted, gradient, plan)


def _gradient_(
    logits: Tensor,
    labels: Tensor,
    maximum: Tensor,
    log_total: Tensor,
    d_loss: Tensor,
    options: Options,
    on_triton: bool,
) -> None:
    """Logits become their gradient; d_loss is (M,) or one value for all."""
    if on_triton:
        from flash_attn_ops.cross_entropy import triton_kernels

        triton_kernels.d_logits(logits, labels, maximum, log_total, d_loss, None, options, inplace=True)
    else:
        d_losses = d_loss.expand(labels.shape)
        logits.copy_(reference.d_logits(d_losses, logits, labels, maximum, log_total, options))


def _for_each_chunk(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    wanted: Wanted,
    to_gradient: Callable[[Tensor, slice], None],
    plan: Plan,
) -> Gradients:
    """The gradients of the three, with ``to_gradient`` making a chunk's logits, (rows, V), their gradient."""
    num_columns = weight.shape[0]
    with without_autocast(hidden):  # which has chosen the dtype of the logits, not that of sums over chunks
        d_hidden, d_weight, d_bias = _sum_over_chunks(
            hidden, *_with_aligned_columns(weight, bias), num_columns, wanted, to_gradient, plan
        )
    if wanted[1]:  # the logits are gone, so that the result takes no memory beside both them and its sum
        d_weight = (
            weight.new_zeros(weight.shape, dtype=plan.result_dtype)
            if d_weight is None
            else d_weight[:num_columns].to(plan.result_dtype)
        )
    if wanted[2]:
        wider = torch.promote_types(weight.dtype, torch.float32)
        d_bias = weight.new_zeros(num_columns, dtype=wider) if d_bias is None else d_bias[:num_columns]
    return d_hidden, d_weight, d_bias


def _sum_over_chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    num_columns: int,
    wanted: Wanted,
    to_gradient: Callable[[Tensor, slice], None],
    plan: Plan,
) -> Gradients:
    """The gradients, None without rows; of weight and bias, which may have more columns of logits than there are, in
    the dtypes of their sums."""
    num_rows = hidden.shape[0]
    buffer = hidden.new_empty(min(plan.chunk_rows, num_rows), weight.shape[0])
    d_hidden = hidden.new_empty(hidden.shape) if wanted[0] else None
    d_weight: Tensor | None = None
    d_bias: Tensor | None = None
    for start in range(0, num_rows, plan.chunk_rows):
        rows = slice(start, min(start + plan.chunk_rows, num_rows))
        chunk = hidden[rows]
        logits = buffer[: len(chunk)]
        if bias is None:
            torch.mm(chunk, weight.t(), out=logits)
        else:
            torch.addmm(bias, chunk, weight.t(), out=logits)
        to_gradient(logits[:, :num_columns], rows)
        if any(wanted) and num_columns < logits.shape[1]:
            logits[:, num_columns:].zero_()
        if d_hidden is not None:
            torch.mm(logits, weight, out=d_hidden[rows])
        if wanted[1]:
            d_weight = _add_product(d_weight, logits.t(), chunk, plan.sum_dtype)
        if wanted[2]:
            sums = logits.sum(0, dtype=torch.promote_types(logits.dtype, torch.float32))
            d_bias = sums if d_bias is None else d_bias.add_(sums)
    return d_hidden, d_weight, d_bias


def _with_aligned_columns(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The two with classes of zeros behind them, where rows of logits would not begin on 16-byte boundaries: products
    of such sizes take up to five times as long, which a copy of the weight is nothing against."""
    if weight.shape[0] * weight.element_size() % ALIGNED_BYTES == 0:
        return weight, bias
    more = -weight.shape[0] % PADDED_COLUMNS
    return pad(weight, (0, 0, 0, more)), None if bias is None else pad(bias, (0, more))


def _add_product(total: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``total + a @ b`` in dtype, written over total."""
    if dtype == a.dtype:
        return torch.mm(a, b) if total is None else total.addmm_(a, b)
    if not a.is_cuda:
        return _add_product(total, a.to(dtype), b.to(dtype), dtype)
    if total is None:
        return torch.mm(a, b, out_dtype=dtype)
    return torch.addmm(total, a, b, out_dtype=dtype, out=total)

"""Triton kernels of softmax cross-entropy: one read of the logits forward, one read and one write backward.

A row is taken in groups of 16 bytes that lie on 16-byte boundaries, whatever the vocabulary; the few logits before the
first and behind the last group, of rows that do not begin and end on one, go by themselves. ``_losses`` walks a row
with one program, in which every group keeps its own running maximum (online softmax), so that nothing is exchanged
between threads before the end of the row. ``_d_logits`` needs nothing but the row's log-sum-exp, so its programs take
blocks; it comes in two parts, maximum and rest, whose sum would cost large logits their digits. Offsets are 64-bit; the
arithmetic is float32.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_attn_ops.launch import ceil_div, empty_like, next_power_of_2
from flash_attn_ops.triton_launch import launch

from .options import Options
from .triton_rows import (
    groups_of_row,
    label_column,
    statistics_of_row,
    write_edge_gradient,
    write_gradient,
)

GROUP_BYTES = 16
MEAN_BLOCK = 4096
MAX_ROWS_OF_MEAN = 2**15  # one program reads some 100 GB/s


@dataclass(frozen=True)
class Walk:
    """How a program takes a row: so many groups in a step, by so many warps."""

    groups: int
    num_warps: int

    @staticmethod
    @functools.lru_cache
    def forward(num_groups: int) -> Walk:
        """4 groups a thread, which are loads in flight; 8 warps, so that several programs share a multiprocessor and
        one reduces while others read."""
        groups = min(1024, max(32, next_power_of_2(num_groups)))
        return Walk(groups, max(1, groups // 128))

    @staticmethod
    @functools.lru_cache
    def with_gradient(num_groups: int) -> Walk:
        """Rows that are read again for their gradient should still be in the L2 cache (50 MB): 1024 threads for one
        long row, so that a multiprocessor has few of them at once."""
        groups = min(2048, max(32, next_power_of_2(num_groups)))
        return Walk(groups, max(1, groups // 64))

    @staticmethod
    @functools.lru_cache
    def backward(num_groups: int) -> Walk:
        """2 groups a thread, one step."""
        groups = min(512, max(32, next_power_of_2(num_groups)))
        return Walk(groups, max(1, groups // 64))


def losses(
    logits: Tensor, labels: Tensor, lse: Tensor | None, options: Options
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``(losses, maximum, log_total)``, float32 (M,), of logits (M, V) with neighbouring values in a row. The last two
    sum to the log-sum-exp; they are None for a given lse."""
    loss = logits.new_empty(logits.shape[0], dtype=torch.float32)
    parts = (torch.empty_like(loss), torch.empty_like(loss)) if lse is None else (None, None)
    _launch_losses(logits, labels, lse, None, (loss, *parts), options, gradient=False)
    return loss, *parts


def losses_and_gradient_(
    logits: Tensor, labels: Tensor, options: Options, d_loss: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`losses` returns; logits become the gradient of the losses' sum, times ``d_loss`` (a scalar) if given.
    The second read of a row comes from the cache."""
    loss, maximum, log_total = (logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(3))
    _launch_losses(logits, labels, None, d_loss, (loss, maximum, log_total), options, gradient=True)
    return loss, maximum, log_total


def _launch_losses(
    logits: Tensor,
    labels: Tensor,
    lse: Tensor | None,
    d_loss: Tensor | None,
    results: tuple[Tensor, Tensor | None, Tensor | None],
    options: Options,
    gradient: bool,
) -> None:
    num_rows, columns = logits.shape
    classes = options.columns_that_count(columns)
    vector = GROUP_BYTES // logits.element_size()
    walk = (Walk.with_gradient if gradient else Walk.forward)(ceil_div(columns, vector))
    row_stride, smooth = logits.stride(0), options.label_smoothing != 0
    launch(
        _losses,
        (num_rows, 1),
        (logits, labels, lse, d_loss, *results),
        (row_stride, columns, classes),
        _integers(options),
        _numbers(options),
        (
            *(lse is None or smooth, smooth, options.logit_scale != 1, classes < columns),
            *(_has_edges(row_stride, classes, vector), gradient, _has_edges(row_stride, columns, vector)),
            *(walk.groups, vector),
        ),
        walk.num_warps,
    )


def statistics(
    logits: Tensor, labels: Tensor, lse: Tensor | None, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """``(maximum, total, target)``, float32 (M,), as :func:`.reference.statistics` has them. With a given lse only
    target is computed."""
    num_rows, columns = logits.shape
    maximum, total, target = (logits.new_empty(num_rows, dtype=torch.float32) for _ in range(3))
    classes = options.columns_that_count(columns)
    vector = GROUP_BYTES // logits.element_size()
    walk = Walk.forward(ceil_div(columns, vector))
    row_stride, smooth = logits.stride(0), options.label_smoothing != 0
    launch(
        _statistics,
        (num_rows, 1),
        (logits, labels, maximum, total, target),
        (row_stride, classes),
        _integers(options)[:2],
        _numbers(options)[:2],
        (
            *(lse is None or smooth, smooth, options.logit_scale != 1),
            *(_has_edges(row_stride, classes, vector), walk.groups, vector),
        ),
        walk.num_warps,
    )
    return maximum, total, target


def d_logits(
    logits: Tensor,
    labels: Tensor,
    maximum: Tensor,
    log_total: Tensor,
    d_loss: Tensor,
    divisor: Tensor | None,
    options: Options,
    *,
    inplace: bool,
) -> Tensor:
    """Gradient (M, V), from the parts of each row's log-sum-exp; d_loss is (M,) or one value for all rows, divided by
    the ``divisor`` (a scalar) if given."""
    num_rows, columns = logits.shape
    gradient = logits if inplace else empty_like(logits)
    vector = GROUP_BYTES // logits.element_size()
    num_groups = ceil_div(columns, vector)
    walk = Walk.backward(num_groups)
    blocks = ceil_div(num_groups, walk.groups)
    row_stride, gradient_stride = logits.stride(0), gradient.stride(0)
    edges = _has_edges(row_stride, columns, vector)
    classes = options.columns_that_count(columns)
    launch(
        _d_logits,
        (num_rows * blocks, 1),
        (d_loss, divisor, logits, labels, maximum, log_total, gradient),
        (d_loss.stride(0) if d_loss.dim() else 0, row_stride, gradient_stride, columns, classes),
        (*_integers(options), blocks),
        _numbers(options),
        (
            *(options.logit_scale != 1, classes < columns),
            *(edges, not edges or gradient_stride == row_stride, walk.groups, vector),
        ),
        walk.num_warps,
    )
    return gradient


def mean(losses: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """``(mean, count)`` of the losses whose label is not ignored, float32 and int64: one small launch instead of
    four."""
    if losses.shape[0] > MAX_ROWS_OF_MEAN:
        count = (labels != ignore_index).sum()
        return losses.sum() / count, count
    mean, count = losses.new_empty(()), losses.new_empty((), dtype=torch.int64)
    block = min(MEAN_BLOCK, max(128, next_power_of_2(losses.shape[0])))
    launch(
        _mean,
        (1, 1),
        (losses, labels, mean, count),
        *((), (losses.shape[0], ignore_index), ()),
        (block,),
        max(1, block // 256),
    )
    return mean, count


def _integers(options: Options) -> tuple[int, int, int]:
    return options.class_start, options.num_classes, options.ignore_index


def _numbers(options: Options) -> tuple[float, float, float]:
    return options.label_smoothing, options.logit_scale, options.z_loss


def _has_edges(row_stride: int, columns: int, vector: int) -> bool:
    return row_stride % vector != 0 or columns % vector != 0


@triton.jit(do_not_specialize=["class_start", "num_classes"])
def _statistics(
    logits_ptr,
    labels_ptr,
    maximum_ptr,
    total_ptr,
    target_ptr,
    row_stride,
    classes,
    class_start,
    num_classes,
    label_smoothing,
    logit_scale,
    READS: tl.constexpr,
    SMOOTH: tl.constexpr,
    SCALED: tl.constexpr,
    EDGES: tl.constexpr,
    GROUPS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    _, maximum, total, target = statistics_of_row(
        logits_ptr, labels_ptr, row, row_stride, classes, class_start, num_classes, label_smoothing, logit_scale,
        READS, SMOOTH, SCALED, EDGES, GROUPS, VECTOR,
    )  # fmt: skip
    tl.store(maximum_ptr + row, maximum)
    tl.store(total_ptr + row, total)
    tl.store(target_ptr + row, target)


@triton.jit(do_not_specialize=["class_start", "num_classes", "ignore_index"])
def _losses(
    logits_ptr,
    labels_ptr,
    given_lse_ptr,  # None: computed
    d_loss_ptr,  # of the sum of losses, for GRADIENT; None: 1
    loss_ptr,
    maximum_ptr,  # None: not wanted, nor is log_total
    log_total_ptr,
    row_stride,
    columns,
    classes,
    class_start,
    num_classes,
    ignore_index,
    label_smoothing,
    logit_scale,
    z_loss,
    READS: tl.constexpr,
    SMOOTH: tl.constexpr,
    SCALED: tl.constexpr,
    PADDED: tl.constexpr,  # columns from ``classes`` on
    EDGES: tl.constexpr,
    GRADIENT: tl.constexpr,  # logits become the gradient of the losses' sum
    GRADIENT_EDGES: tl.constexpr,
    GROUPS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label, maximum, total, target = statistics_of_row(
        logits_ptr, labels_ptr, row, row_stride, classes, class_start, num_classes, label_smoothing, logit_scale,
        READS, SMOOTH, SCALED, EDGES, GROUPS, VECTOR,
    )  # fmt: skip
    if given_lse_ptr is None:
        log_total = tl.log(total)
    else:
        maximum = tl.load(given_lse_ptr + row)
        log_total = 0.0
    lse = maximum + log_total
    loss = (maximum - target) + log_total + z_loss * lse * lse  # in this order, for the sake of large logits
    ignored = label == ignore_index
    tl.store(loss_ptr + row, tl.where(ignored, 0.0, loss))
    if maximum_ptr is not None:
        tl.store(maximum_ptr + row, maximum)
        tl.store(log_total_ptr + row, log_total)
    if GRADIENT:
        tl.debug_barrier()  # another thread may overwrite the label's logit before this one has read it
        begin = row * row_stride
        head, middle, groups = groups_of_row(begin, columns, VECTOR)
        column = label_column(label, class_start, classes)
        scale = logit_scale
        if d_loss_ptr is not None:
            scale *= tl.load(d_loss_ptr).to(tl.float32)
        scale = tl.where((label >= 0) & (label < num_classes), scale, float("nan"))
        for start in tl.range(0, groups, GROUPS):
            write_gradient(
                logits_ptr + middle, logits_ptr + middle, start, head, groups, classes, column, maximum, log_total,
                scale, ignored, num_classes, label_smoothing, logit_scale, z_loss, SCALED, PADDED, GROUPS, VECTOR,
            )  # fmt: skip
        if GRADIENT_EDGES:
            write_edge_gradient(
                logits_ptr + begin, logits_ptr + begin, head, groups, columns, classes, column, maximum, log_total,
                scale, ignored, num_classes, label_smoothing, logit_scale, z_loss, SCALED, PADDED, VECTOR,
            )  # fmt: skip


@triton.jit(do_not_specialize=["class_start", "num_classes", "ignore_index", "blocks"])
def _d_logits(
    d_loss_ptr,
    divisor_ptr,  # None: nothing to divide by
    logits_ptr,
    labels_ptr,
    maximum_ptr,
    log_total_ptr,
    gradient_ptr,
    d_loss_stride,
    row_stride,
    gradient_row_stride,
    columns,
    classes,
    class_start,
    num_classes,
    ignore_index,
    blocks,
    label_smoothing,
    logit_scale,
    z_loss,
    SCALED: tl.constexpr,
    PADDED: tl.constexpr,  # columns from ``classes`` on
    EDGES: tl.constexpr,
    ALIGNED_GRADIENT: tl.constexpr,  # its groups lie on 16-byte boundaries too
    GROUPS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    begin = row * row_stride
    head, middle, groups = groups_of_row(begin, columns, VECTOR)
    gradient_begin = row * gradient_row_stride
    gradient_middle = gradient_begin + head
    if ALIGNED_GRADIENT:
        gradient_middle = gradient_middle // VECTOR * VECTOR
    label = tl.load(labels_ptr + row)
    maximum = tl.load(maximum_ptr + row)
    log_total = tl.load(log_total_ptr + row)
    scale = tl.load(d_loss_ptr + row * d_loss_stride).to(tl.float32) * logit_scale
    if divisor_ptr is not None:
        scale /= tl.load(divisor_ptr).to(tl.float32)
    scale = tl.where((label >= 0) & (label < num_classes), scale, float("nan"))
    ignored = label == ignore_index
    column = label_column(label, class_start, classes)
    write_gradient(
        logits_ptr + middle, gradient_ptr + gradient_middle, block * GROUPS, head, groups, classes, column, maximum,
        log_total, scale, ignored, num_classes, label_smoothing, logit_scale, z_loss, SCALED, PADDED, GROUPS,
        VECTOR,
    )  # fmt: skip
    if EDGES:  # noqa: SIM102 (the compiler's choice, then the GPU's)
        if block == 0:
            write_edge_gradient(
                logits_ptr + begin, gradient_ptr + gradient_begin, head, groups, columns, classes, column, maximum,
                log_total, scale, ignored, num_classes, label_smoothing, logit_scale, z_loss, SCALED, PADDED,
                VECTOR,
            )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "ignore_index"])
def _mean(losses_ptr, labels_ptr, mean_ptr, count_ptr, num_rows, ignore_index, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.int32)
    for start in tl.range(0, num_rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        mask = row < num_rows
        total += tl.load(losses_ptr + row, mask=mask, other=0.0)
        count += (tl.load(labels_ptr + row, mask=mask, other=ignore_index) != ignore_index).to(tl.int32)
    rows = tl.sum(count, axis=0)
    tl.store(mean_ptr, tl.sum(total, axis=0) / rows)
    tl.store(count_ptr, rows)

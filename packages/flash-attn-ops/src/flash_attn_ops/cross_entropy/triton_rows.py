"""What the cross-entropy kernels do with a row of logits: walk its groups of 16 bytes, and write their gradient."""

# Device code: its arguments are Triton's.
# mypy: disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def groups_of_row(begin, columns, VECTOR: tl.constexpr):
    """``(head, middle, groups)``: columns before the first whole group, its offset, and how many there are."""
    first = (begin + VECTOR - 1) // VECTOR
    groups = tl.maximum((begin + columns) // VECTOR - first, 0).to(tl.int32)
    return (first * VECTOR - begin).to(tl.int32), first * VECTOR, groups


@triton.jit
def _edge_columns(head, groups, columns, VECTOR: tl.constexpr):
    """``(column, whether it exists)`` of the fewer than VECTOR columns at either end of a row."""
    lane = tl.arange(0, 2 * VECTOR)
    column = tl.where(lane < VECTOR, lane, head + groups * VECTOR + lane - VECTOR)
    return column, ((lane >= VECTOR) | (lane < head)) & (column < columns)


@triton.jit
def label_column(label, class_start, classes):
    """32 bits, which every logit's column is compared with; -1 where other processes have the label."""
    column = label - class_start
    return tl.where((column >= 0) & (column < classes), column, -1).to(tl.int32)


@triton.jit
def statistics_of_row(
    logits_ptr,
    labels_ptr,
    row,
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
    """``(label, maximum, total, target)``; see the reference."""
    begin = row * row_stride
    label = tl.load(labels_ptr + row)
    column = label - class_start
    is_here = (column >= 0) & (column < classes)
    target = tl.load(logits_ptr + begin + column, mask=is_here, other=0.0).to(tl.float32)
    if SCALED:
        target *= logit_scale
    target = tl.where(is_here, (1 - label_smoothing) * target, 0.0)
    target = tl.where((label >= 0) & (label < num_classes), target, float("nan"))
    maximum = -float("inf")
    total = 0.0
    if READS:
        head, middle, groups = groups_of_row(begin, classes, VECTOR)
        if EDGES:
            edge_column, is_edge = _edge_columns(head, groups, classes, VECTOR)
            edge = tl.load(logits_ptr + begin + edge_column, mask=is_edge, other=0.0).to(tl.float32)
            if SCALED:
                edge *= logit_scale
        maxima = tl.full((GROUPS,), -float("inf"), tl.float32)
        totals = tl.zeros((GROUPS,), tl.float32)
        sums = tl.zeros((GROUPS,), tl.float32)
        offset = tl.arange(0, GROUPS)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
        for start in tl.range(0, groups, GROUPS):
            exists = (start + tl.arange(0, GROUPS) < groups)[:, None]
            z = tl.load(logits_ptr + middle + start * VECTOR + offset, mask=exists, other=0.0).to(tl.float32)
            if SCALED:
                z *= logit_scale
            if SMOOTH:
                sums += tl.sum(z, axis=1)
            z = tl.where(exists, z, -float("inf"))
            new_maxima = tl.maximum(maxima, tl.max(z, axis=1))
            shift = tl.where(new_maxima == -float("inf"), 0.0, new_maxima)  # -inf - -inf is NaN
            exponentials = tl.exp2((z - shift[:, None]) * LOG2_E)
            totals = totals * tl.exp2((maxima - shift) * LOG2_E) + tl.sum(exponentials, axis=1)
            maxima = new_maxima
        maximum = tl.max(maxima, axis=0)
        if EDGES:
            edge_exponent = tl.where(is_edge, edge, -float("inf"))
            maximum = tl.maximum(maximum, tl.max(edge_exponent, axis=0))
        shift = tl.where(maximum == -float("inf"), 0.0, maximum)
        total = tl.sum(totals * tl.exp2((maxima - shift) * LOG2_E), axis=0)
        if EDGES:
            total += tl.sum(tl.exp2((edge_exponent - shift) * LOG2_E), axis=0)
        if SMOOTH:
            sum_of_z = tl.sum(sums, axis=0)
            if EDGES:
                sum_of_z += tl.sum(edge, axis=0)
            target += label_smoothing * (sum_of_z / num_classes)
    return label, maximum, total, target


@triton.jit
def write_gradient(
    logits_ptr,
    gradient_ptr,
    start,
    head,
    groups,
    classes,
    label_column,
    maximum,
    log_total,
    scale,
    ignored,
    num_classes,
    label_smoothing,
    logit_scale,
    z_loss,
    SCALED: tl.constexpr,
    PADDED: tl.constexpr,  # columns from ``classes`` on
    GROUPS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Of GROUPS groups from ``start`` on; pointers are at the row's first whole group."""
    offset = start * VECTOR + tl.arange(0, GROUPS)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    exists = (start + tl.arange(0, GROUPS) < groups)[:, None]
    z = tl.load(logits_ptr + offset, mask=exists, other=0.0).to(tl.float32)
    gradient = _gradient(
        z, head + offset, classes, label_column, maximum, log_total, scale, ignored, num_classes, label_smoothing,
        logit_scale, z_loss, SCALED, PADDED,
    )  # fmt: skip
    tl.store(gradient_ptr + offset, gradient, mask=exists)


@triton.jit
def write_edge_gradient(
    logits_ptr,
    gradient_ptr,
    head,
    groups,
    columns,
    classes,
    label_column,
    maximum,
    log_total,
    scale,
    ignored,
    num_classes,
    label_smoothing,
    logit_scale,
    z_loss,
    SCALED: tl.constexpr,
    PADDED: tl.constexpr,  # columns from ``classes`` on
    VECTOR: tl.constexpr,
):
    """Of the columns at the row's ends; pointers are at its first column."""
    column, is_edge = _edge_columns(head, groups, columns, VECTOR)
    z = tl.load(logits_ptr + column, mask=is_edge, other=0.0).to(tl.float32)
    gradient = _gradient(
        z, column, classes, label_column, maximum, log_total, scale, ignored, num_classes, label_smoothing,
        logit_scale, z_loss, SCALED, PADDED,
    )  # fmt: skip
    tl.store(gradient_ptr + column, gradient, mask=is_edge)


@triton.jit
def _gradient(
    z,
    column,
    classes,
    label_column,
    maximum,
    log_total,
    scale,
    ignored,
    num_classes,
    label_smoothing,
    logit_scale,
    z_loss,
    SCALED: tl.constexpr,
    PADDED: tl.constexpr,
):
    if SCALED:
        z *= logit_scale
    softmax = tl.exp2((z - maximum) * LOG2_E - log_total * LOG2_E)
    gradient = softmax * (1 + 2 * z_loss * (maximum + log_total)) - label_smoothing / num_classes
    gradient = tl.where(column == label_column, gradient - (1 - label_smoothing), gradient) * scale
    gradient = tl.where(ignored, 0.0, gradient)
    if PADDED:
        gradient = tl.where(column < classes, gradient, 0.0)
    return gradient

"""Triton kernels of softmax cross-entropy: one read of the logits forward, one read and one write backward.

``_forward`` walks a row in blocks with a running maximum (online softmax), one program a row, while
asynchronous copies bring the next blocks. ``_backward`` needs nothing but the row's log-sum-exp, so its
programs take blocks. Offsets are 64-bit; the arithmetic is float32, with exponentials in base 2, which is
what the hardware has.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_attn_ops.launch import ceil_div, next_power_of_2, on_device_of

MAX_BLOCK = 4096


def _block(vocab_size: int) -> tuple[int, int]:
    """Columns and warps of a program: 16 logits a thread, one block for a small vocabulary."""
    cols = min(MAX_BLOCK, max(256, next_power_of_2(vocab_size)))
    return cols, max(1, cols // 512)


def losses(
    logits: Tensor,
    labels: Tensor,
    label_smoothing: float,
    logit_scale: float,
    z_loss: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """``(losses, lse)``, float32 (M,), of logits (M, V) with neighbouring values in a row."""
    num_rows, vocab_size = logits.shape
    loss = logits.new_empty(num_rows, dtype=torch.float32)
    lse = torch.empty_like(loss)
    cols, num_warps = _block(vocab_size)
    with on_device_of(logits):
        _forward[(num_rows,)](
            *(logits, labels, loss, lse, logits.stride(0), vocab_size),
            *(float(label_smoothing), float(logit_scale), float(z_loss), ignore_index),
            SMOOTH=label_smoothing != 0,
            COLS=cols,
            STAGES=3 if vocab_size > cols else 1,
            num_warps=num_warps,
        )
    return loss, lse


def d_logits(
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    d_loss: Tensor,
    divisor: Tensor | None,
    label_smoothing: float,
    logit_scale: float,
    z_loss: float,
    ignore_index: int,
    *,
    inplace: bool,
) -> Tensor:
    """Gradient (M, V); d_loss is (M,) or one value for all rows, divided by the ``divisor`` (a scalar) if
    given."""
    num_rows, vocab_size = logits.shape
    gradient = logits if inplace else logits.new_empty(logits.shape)
    cols, num_warps = _block(vocab_size)
    blocks = ceil_div(vocab_size, cols)
    with on_device_of(logits):
        _backward[(num_rows * blocks,)](
            *(d_loss, divisor, logits, labels, lse, gradient),
            *(
                d_loss.stride(0) if d_loss.dim() else 0,
                logits.stride(0),
                gradient.stride(0),
                vocab_size,
                blocks,
            ),
            *(float(label_smoothing), float(logit_scale), float(z_loss), ignore_index),
            COLS=cols,
            num_warps=num_warps,
        )
    return gradient


@triton.jit(do_not_specialize=["ignore_index"])
def _forward(
    logits_ptr,
    labels_ptr,
    loss_ptr,
    lse_ptr,
    row_stride,
    vocab_size,
    label_smoothing,
    logit_scale,
    z_loss,
    ignore_index,
    SMOOTH: tl.constexpr,
    COLS: tl.constexpr,
    STAGES: tl.constexpr,
):
    LOG2_E: tl.constexpr = 1.4426950408889634
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    maximum = -float("inf")
    exponentials = tl.zeros(
        (COLS,), tl.float32
    )  # of this thread's columns, relative to the row's maximum so far
    total = tl.zeros((COLS,), tl.float32)
    for start in tl.range(0, vocab_size, COLS, num_stages=STAGES):
        col = start + tl.arange(0, COLS)
        mask = col < vocab_size
        logit = tl.load(row_ptr + col, mask=mask, other=0.0).to(tl.float32) * logit_scale
        if SMOOTH:
            total += logit
        exponent = tl.where(mask, logit * LOG2_E, -float("inf"))
        new_maximum = tl.maximum(maximum, tl.max(exponent, axis=0))
        shift = tl.where(new_maximum == -float("inf"), 0.0, new_maximum)  # -inf - -inf is NaN
        exponentials = exponentials * tl.exp2(maximum - shift) + tl.exp2(exponent - shift)
        maximum = new_maximum
    lse = (maximum + tl.log2(tl.sum(exponentials, axis=0))) / LOG2_E
    label = tl.load(labels_ptr + row)
    valid = (label >= 0) & (label < vocab_size)
    label_logit = tl.load(row_ptr + label, mask=valid, other=float("nan")).to(tl.float32) * logit_scale
    loss = lse - (1 - label_smoothing) * label_logit + z_loss * lse * lse
    if SMOOTH:
        loss -= label_smoothing * (tl.sum(total, axis=0) / vocab_size)
    tl.store(loss_ptr + row, tl.where(label == ignore_index, 0.0, loss))
    tl.store(lse_ptr + row, lse)


@triton.jit(do_not_specialize=["ignore_index", "blocks"])
def _backward(
    d_loss_ptr,
    divisor_ptr,  # None: nothing to divide by
    logits_ptr,
    labels_ptr,
    lse_ptr,
    gradient_ptr,
    d_loss_stride,
    row_stride,
    gradient_row_stride,
    vocab_size,
    blocks,
    label_smoothing,
    logit_scale,
    z_loss,
    ignore_index,
    COLS: tl.constexpr,
):
    LOG2_E: tl.constexpr = 1.4426950408889634
    row = (tl.program_id(0) // blocks).to(tl.int64)
    col = (tl.program_id(0) % blocks) * COLS + tl.arange(0, COLS)
    mask = col < vocab_size
    label = tl.load(labels_ptr + row)
    lse = tl.load(lse_ptr + row)
    scale = tl.load(d_loss_ptr + row * d_loss_stride).to(tl.float32) * logit_scale
    if divisor_ptr is not None:
        scale /= tl.load(divisor_ptr).to(tl.float32)
    ignored = label == ignore_index
    valid = (label >= 0) & (label < vocab_size)
    scale = tl.where(valid, scale, float("nan"))
    logit = tl.load(logits_ptr + row * row_stride + col, mask=mask, other=0.0).to(tl.float32)
    softmax = tl.exp2(logit * (logit_scale * LOG2_E) - lse * LOG2_E)
    gradient = softmax * (1 + 2 * z_loss * lse) - label_smoothing / vocab_size
    gradient = tl.where(col == label, gradient - (1 - label_smoothing), gradient) * scale
    gradient = tl.where(ignored, 0.0, gradient)
    tl.store(gradient_ptr + row * gradient_row_stride + col, gradient, mask=mask)

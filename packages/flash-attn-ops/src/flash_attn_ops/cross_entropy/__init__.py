"""Softmax cross-entropy for language models, with label smoothing, z-loss and an in-place gradient.

For a row z = logit_scale * logits of V classes, its label y, and smoothing s:

    loss = lse(z) - (1 - s) * z[y] - s * mean(z) + z_loss * lse(z)^2

[label smoothing: Szegedy et al. 2016, arXiv:1512.00567; z-loss: de Brébisson & Vincent 2016,
arXiv:1604.08859]. Losses are float32 (float64 for float64 logits), as the arithmetic is, autocast or not;
gradients have the dtype of the logits.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from flash_attn_ops.arguments import (
    bad_argument,
    check_floating,
    check_integer,
    check_same_device,
    check_shape,
)
from flash_attn_ops.dispatch import runs_on_triton

from . import operators, reference

__all__ = ["CrossEntropyLoss", "cross_entropy"]

Reduction = Literal["none", "mean", "sum"]


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    inplace_backward: bool = False,
) -> Tensor:
    """Cross-entropy of softmax(logit_scale * logits) against integer labels.

    Args:
        logits: (..., V), any floating-point dtype, any V >= 1.
        labels: (...) int64, each in [0, V) or equal to ``ignore_index``.
        label_smoothing: in [0, 1]; the share of the target that is spread evenly over all classes.
        logit_scale: finite; multiplies the logits.
        z_loss: >= 0; weight of the squared log-sum-exp, which keeps the logits from drifting.
        ignore_index: rows with this label have loss 0 and gradient 0, and do not count in the mean.
        reduction: ``"none"`` gives the losses in the shape of labels, ``"sum"`` and ``"mean"`` a scalar. The
            mean over no row is NaN, as in ``torch.nn.functional.cross_entropy``.
        inplace_backward: backward overwrites the logits with their gradient, which saves the memory of one
            more tensor of their size. Backward through the same loss a second time is then an error. Under
            torch.compile the gradient gets its own memory.

    Returns:
        The loss, float32 (float64 for float64 logits).

    Raises:
        ValueError: arguments that do not fit, among them labels out of range on a CPU. On a GPU the host does
            not wait
            for the labels: one that is out of range makes its loss and its gradient NaN.
        RuntimeError: a second backward with ``inplace_backward``.
    """
    _check(logits, labels, label_smoothing, logit_scale, z_loss, ignore_index, reduction, inplace_backward)
    rows = logits.reshape(-1, logits.shape[-1])
    flat_labels = labels.reshape(-1)
    on_triton = runs_on_triton("cross_entropy", logits)
    loss = _CrossEntropy.apply(
        rows,
        flat_labels,
        *(label_smoothing, logit_scale, z_loss, ignore_index),
        *(reduction, inplace_backward, on_triton),
    )
    return loss.view(labels.shape) if reduction == "none" else loss


def _reduce(
    losses: Tensor, labels: Tensor, ignore_index: int, reduction: Reduction
) -> tuple[Tensor, Tensor | None]:
    """The loss, and what the sum was divided by."""
    if reduction == "none":
        return losses, None
    if reduction == "sum":
        return losses.sum(), None
    count = (labels != ignore_index).sum()
    return losses.sum() / count, count


class _CrossEntropy(torch.autograd.Function):
    """An explicit gradient, which can overwrite the logits; by the kernels or by the reference."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        label_smoothing: float,
        logit_scale: float,
        z_loss: float,
        ignore_index: int,
        reduction: Reduction,
        inplace_backward: bool,
        on_triton: bool,
    ) -> Tensor:
        options = (label_smoothing, logit_scale, z_loss, ignore_index)
        if on_triton:
            logits = logits if logits.stride(-1) == 1 else logits.contiguous()
            labels = labels.contiguous()
            losses, lse = operators.losses(logits, labels, *options)
        else:
            losses, lse = reference.losses(logits, labels, *options), None
        loss, count = _reduce(losses, labels, ignore_index, reduction)
        ctx.save_for_backward(logits, labels, lse, count)
        ctx.options, ctx.on_triton, ctx.overwritten = options, on_triton, False
        # Compiled graphs do not see that a tensor they saved was overwritten, so that a second backward would
        # pass.
        ctx.inplace = inplace_backward and not torch.compiler.is_compiling()
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.overwritten:
            raise RuntimeError(
                "cross_entropy: backward ran a second time, and the first run overwrote the logits with "
                "their gradient. Use inplace_backward=False to keep the graph for another backward."
            )
        logits, labels, lse, count = ctx.saved_tensors
        ctx.overwritten = ctx.inplace
        if ctx.on_triton and ctx.inplace:
            from . import triton_kernels

            saved = (logits.detach(), labels, lse)
            gradient = triton_kernels.d_logits(*saved, d_loss, count, *ctx.options, inplace=True)
            torch.autograd.graph.increment_version(logits)  # the kernel writes behind autograd's back
        elif ctx.on_triton:
            gradient = operators.d_logits(logits.detach(), labels, lse, d_loss, count, *ctx.options)
        else:
            d_losses = (d_loss if count is None else d_loss / count).expand(labels.shape)
            gradient = reference.d_logits(d_losses, logits.detach(), labels, *ctx.options)
            if ctx.inplace:
                gradient = logits.detach().copy_(gradient)
        return gradient, None, None, None, None, None, None, None, None


def _check(
    logits: Tensor,
    labels: Tensor,
    label_smoothing: float,
    logit_scale: float,
    z_loss: float,
    ignore_index: int,
    reduction: str,
    inplace_backward: bool,
) -> None:
    check_floating(logits=logits)
    check_integer("labels", labels, (torch.int64,))
    check_same_device(logits=logits, labels=labels)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        got = f"shape {tuple(logits.shape)}"
        raise bad_argument("logits", got, "(..., V) with V >= 1", "pass the scores of at least one class")
    check_shape("labels", labels, logits.shape[:-1], "the shape of logits without its last dimension")
    if reduction not in ("none", "mean", "sum"):
        raise bad_argument("reduction", repr(reduction), "'none', 'mean' or 'sum'", "use one of these")
    if not 0 <= label_smoothing <= 1:
        raise bad_argument("label_smoothing", label_smoothing, "a number in [0, 1]", "use 0 for none")
    if not -float("inf") < logit_scale < float("inf"):
        raise bad_argument("logit_scale", logit_scale, "a finite number", "use 1 for none")
    if not 0 <= z_loss < float("inf"):
        raise bad_argument("z_loss", z_loss, "a finite number >= 0", "use 0 for none")
    if inplace_backward and not _overwritable(logits):
        got = f"logits of strides {logits.stride()}"
        raise bad_argument("inplace_backward", got, "rows that a view can reach", "pass logits.contiguous()")
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        outside = ((labels < 0) | (labels >= logits.shape[-1])) & (labels != ignore_index)
        if outside.any():
            expected = f"classes in [0, {logits.shape[-1]}) or ignore_index ({ignore_index})"
            raise bad_argument(
                "labels", int(labels[outside][0]), expected, "map the labels to the logits' classes"
            )


def _overwritable(logits: Tensor) -> bool:
    """Whether a (M, V) view reaches the rows, with neighbouring values in a row and no value twice."""
    if logits.is_contiguous():
        return True
    return logits.dim() == 2 and logits.stride(1) == 1 and logits.stride(0) >= logits.shape[1]


class CrossEntropyLoss(nn.Module):
    """:func:`cross_entropy` with its options fixed."""

    def __init__(
        self,
        *,
        label_smoothing: float = 0.0,
        logit_scale: float = 1.0,
        z_loss: float = 0.0,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        inplace_backward: bool = False,
    ) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        self.logit_scale = logit_scale
        self.z_loss = z_loss
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.inplace_backward = inplace_backward

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(
            logits,
            labels,
            label_smoothing=self.label_smoothing,
            logit_scale=self.logit_scale,
            z_loss=self.z_loss,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            inplace_backward=self.inplace_backward,
        )

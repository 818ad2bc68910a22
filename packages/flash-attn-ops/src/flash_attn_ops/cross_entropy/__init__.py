"""Softmax cross-entropy for language models, with label smoothing, z-loss and an in-place gradient.

For a row z = logit_scale * logits of V classes, its label y, and smoothing s:

    loss = lse(z) - (1 - s) * z[y] - s * mean(z) + z_loss * lse(z)^2

[label smoothing: Szegedy et al. 2016, arXiv:1512.00567; z-loss: de Brébisson & Vincent 2016,
arXiv:1604.08859]. Losses are float32 (float64 for float64 logits), as the arithmetic is, autocast or not;
gradients have the dtype of the logits.

The gradient is made in the backward, from the logits and each row's log-sum-exp. A forward that left it in the logits
would save one read of the three passes, but only for upstream gradients that are one number for all rows, and it would
destroy logits that somebody may still look at. :func:`~flash_attn_ops.linear_cross_entropy.linear_cross_entropy`,
which owns its logits, does so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from flash_attn_ops.arguments import (
    bad_argument,
    check_floating,
    check_given,
    check_integer,
    check_number,
    check_same_device,
    check_shape,
)
from flash_attn_ops.dispatch import once_for_like_calls, runs_on_triton
from flash_attn_ops.distributed.group import GroupLike, process_group_of
from flash_attn_ops.library import once_differentiable, tell_autograd

from . import operators, reference
from .labels import check_labels
from .options import Options
from .parallel import combine, place_classes

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

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
    return_z_loss: bool = False,
    precomputed_lse: Tensor | None = None,
    vocab_size: int | None = None,
    process_group: GroupLike = None,
    vocab_start: int | None = None,
    validate: bool | None = None,
) -> Any:
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
        return_z_loss: also return the part of the loss that is ``z_loss * lse^2``, for logging: not differentiable.
        precomputed_lse: (...), the log-sum-exp of each row of logit_scale * logits, if it is known: the forward then
            reads one logit a row (all of them with label_smoothing). A constant for autograd: the gradient of the
            logits is the same as without it.
        vocab_size: classes that exist, at most V without process_group: columns from there on are padding, take no
            part in any sum, and have gradient 0.
        process_group: logits hold the columns of this process of a vocabulary split over the group, whose
            processes have the same labels and get the same losses: two small all-reduces forward, none backward. Not
            inside torch.compile. A ProcessGroup, a one-dimensional DeviceMesh, or None for a single process.
        vocab_start: the class of the first column of this process. By default shards are of equal size, the last
            ones padded up to it (say vocab_size); shards of other sizes need vocab_start and vocab_size.
        validate: True finds labels out of range on a GPU too, for which it waits; None does where the environment has
            ``FLASH_ATTN_OPS_VALIDATE_LABELS=1``, and on a CPU.

    Returns:
        The loss, float32 (float64 for float64 logits); with return_z_loss ``(loss, z_loss)``.

    Raises:
        ValueError: arguments that do not fit, among them labels out of range on a CPU or if validated. Otherwise the
            host does not wait for the labels of a GPU: one that is out of range makes its loss and its gradient NaN.
        RuntimeError: a second backward with ``inplace_backward``.
    """
    group = process_group_of(process_group)
    on_triton = _plan((logits, labels, precomputed_lse), label_smoothing, logit_scale, z_loss, reduction)
    lse = precomputed_lse
    if lse is not None:
        lse = lse.detach().reshape(-1).to(torch.promote_types(logits.dtype, torch.float32)).contiguous()
    if inplace_backward and not _overwritable(logits):
        got = f"logits of strides {logits.stride()}"
        raise bad_argument("inplace_backward", got, "rows that a view can reach", "pass logits.contiguous()")
    place = place_classes(logits.shape[-1], vocab_size, vocab_start, group)
    check_labels(labels, place[1], ignore_index, validate)

    options = Options(label_smoothing, logit_scale, z_loss, ignore_index, *place)
    is_flat = logits.dim() == 2
    rows = logits if is_flat else logits.reshape(-1, logits.shape[-1])
    row_labels = labels if is_flat else labels.reshape(-1)
    how = (options, reduction, on_triton, return_z_loss, group)
    if torch.is_grad_enabled() and logits.requires_grad:
        results = _CrossEntropy.apply(rows, row_labels, lse, inplace_backward, *how)
    else:
        loss, z_part, _ = _loss(rows, row_labels, lse, *how)
        results = (loss, z_part) if return_z_loss else loss
    if is_flat or reduction != "none":
        return results
    if return_z_loss:
        return tuple(result.view(labels.shape) for result in results)
    return results.view(labels.shape)


def _loss(
    logits: Tensor,
    labels: Tensor,
    lse: Tensor | None,
    options: Options,
    reduction: Reduction,
    on_triton: bool,
    return_z_loss: bool,
    process_group: ProcessGroup | None,
) -> tuple[Tensor, Tensor | None, tuple[Tensor | None, ...]]:
    """The loss, the z-loss's part of it if wanted, and what a backward reads."""
    if on_triton and logits.stride(-1) != 1:
        logits = logits.contiguous()
    labels = labels.contiguous()
    losses, *lse_parts = losses_of_rows(logits, labels, lse, options, on_triton, process_group)
    loss, count = reduce(losses, labels, options.ignore_index, reduction, on_triton)
    z_part = None
    if return_z_loss:
        z_part = z_part_of(lse_parts[0] + lse_parts[1], labels, options, reduction, on_triton)
    return loss, z_part, (logits, labels, *lse_parts, count)


@once_for_like_calls
def _plan(
    tensors: tuple[Tensor, Tensor, Tensor | None],
    label_smoothing: float,
    logit_scale: float,
    z_loss: float,
    reduction: str,
) -> bool:
    """Whether the kernels run; of logits, labels and precomputed_lse that fit."""
    logits, labels, lse = tensors
    check_options(label_smoothing, logit_scale, z_loss, reduction)
    check_given(logits=logits)
    check_floating(logits=logits, precomputed_lse=lse)
    check_integer("labels", labels, (torch.int64,))
    check_same_device(logits=logits, labels=labels, precomputed_lse=lse)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        got = f"shape {tuple(logits.shape)}"
        raise bad_argument("logits", got, "(..., V) with V >= 1", "pass the scores of at least one class")
    check_shape("labels", labels, logits.shape[:-1], "the shape of logits without its last dimension")
    if lse is not None:
        check_shape("precomputed_lse", lse, labels.shape, "the shape of labels")
    return runs_on_triton("cross_entropy", logits)


def losses_of_rows(
    logits: Tensor,
    labels: Tensor,
    lse: Tensor | None,
    options: Options,
    on_triton: bool,
    process_group: ProcessGroup | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(losses, maximum, log_total)`` of logits (M, V)."""
    if process_group is not None:
        maximum, total, target = (
            operators.statistics(logits, labels, lse, *options)
            if on_triton
            else reference.statistics(logits, labels, lse, options)
        )
        return combine(maximum, total, target, lse, labels, options, process_group)
    if not on_triton:
        return reference.losses(logits, labels, lse, options)
    losses, maximum, log_total = operators.losses(logits, labels, lse, *options)
    return (losses, maximum, log_total) if lse is None else (losses, lse, torch.zeros_like(lse))


def reduce(
    losses: Tensor, labels: Tensor, ignore_index: int, reduction: Reduction, on_triton: bool
) -> tuple[Tensor, Tensor | None]:
    """The loss, and what the sum was divided by."""
    if reduction == "none":
        return losses, None
    if reduction == "sum":
        return losses.sum(), None
    if on_triton:
        return operators.mean(losses, labels, ignore_index)
    count = (labels != ignore_index).sum()
    return losses.sum() / count, count


def z_part_of(lse: Tensor, labels: Tensor, options: Options, reduction: Reduction, on_triton: bool) -> Tensor:
    """The z-loss's part of the loss, reduced as the loss is."""
    parts = torch.where(labels == options.ignore_index, 0.0, options.z_loss * lse.square())
    return reduce(parts, labels, options.ignore_index, reduction, on_triton)[0]


class _CrossEntropy(torch.autograd.Function):
    """An explicit gradient, which can overwrite the logits; by the kernels or by the reference. The loss, and the
    z-loss's part if it is returned."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        lse: Tensor | None,
        inplace_backward: bool,
        options: Options,
        reduction: Reduction,
        on_triton: bool,
        return_z_loss: bool,
        process_group: ProcessGroup | None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        loss, z_part, read_by_backward = _loss(
            logits, labels, lse, options, reduction, on_triton, return_z_loss, process_group
        )
        ctx.save_for_backward(*read_by_backward)
        ctx.options, ctx.on_triton, ctx.overwritten = options, on_triton, False
        # Compiled graphs do not see that a tensor they saved was overwritten, so that a second backward would
        # pass.
        ctx.inplace = inplace_backward and not torch.compiler.is_compiling()
        if z_part is None:
            return loss
        ctx.mark_non_differentiable(z_part)
        return loss, z_part

    @staticmethod
    @once_differentiable("cross_entropy")
    def backward(ctx: Any, d_loss: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.overwritten:
            raise RuntimeError(
                "cross_entropy: backward ran a second time, and the first run overwrote the logits with "
                "their gradient. Use inplace_backward=False to keep the graph for another backward."
            )
        logits, labels, maximum, log_total, count = ctx.saved_tensors
        row = (labels, maximum, log_total)
        ctx.overwritten = ctx.inplace
        if ctx.on_triton and ctx.inplace:
            from . import triton_kernels

            gradient = triton_kernels.d_logits(
                logits.detach(), *row, d_loss, count, ctx.options, inplace=True
            )
            tell_autograd(logits)
        elif ctx.on_triton:
            gradient = operators.d_logits(logits.detach(), *row, d_loss, count, *ctx.options)
        else:
            d_losses = (d_loss if count is None else d_loss / count).expand(labels.shape)
            gradient = reference.d_logits(d_losses, logits.detach(), *row, ctx.options)
            if ctx.inplace:
                gradient = logits.detach().copy_(gradient)
        return (gradient, *[None] * 8)


def check_options(label_smoothing: float, logit_scale: float, z_loss: float, reduction: str) -> None:
    if reduction not in ("none", "mean", "sum"):
        raise bad_argument("reduction", repr(reduction), "'none', 'mean' or 'sum'", "use one of these")
    check_number(label_smoothing=label_smoothing, logit_scale=logit_scale, z_loss=z_loss)
    if not 0 <= label_smoothing <= 1:
        raise bad_argument("label_smoothing", label_smoothing, "a number in [0, 1]", "use 0 for none")
    if not -float("inf") < logit_scale < float("inf"):
        raise bad_argument("logit_scale", logit_scale, "a finite number", "use 1 for none")
    if not 0 <= z_loss < float("inf"):
        raise bad_argument("z_loss", z_loss, "a finite number >= 0", "use 0 for none")


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
        return_z_loss: bool = False,
        vocab_size: int | None = None,
        process_group: GroupLike = None,
        vocab_start: int | None = None,
        validate: bool | None = None,
    ) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        self.logit_scale = logit_scale
        self.z_loss = z_loss
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.inplace_backward = inplace_backward
        self.return_z_loss = return_z_loss
        self.vocab_size = vocab_size
        self.process_group = process_group
        self.vocab_start = vocab_start
        self.validate = validate

    def forward(self, logits: Tensor, labels: Tensor, precomputed_lse: Tensor | None = None) -> Any:
        return cross_entropy(
            logits,
            labels,
            label_smoothing=self.label_smoothing,
            logit_scale=self.logit_scale,
            z_loss=self.z_loss,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            inplace_backward=self.inplace_backward,
            return_z_loss=self.return_z_loss,
            precomputed_lse=precomputed_lse,
            vocab_size=self.vocab_size,
            process_group=self.process_group,
            vocab_start=self.vocab_start,
            validate=self.validate,
        )

"""Softmax cross-entropy in plain torch operations: the definition, and what runs where the kernels do not."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn_ops.dispatch import has_memory

from .options import Options, loss_of


def losses(
    logits: Tensor, labels: Tensor, lse: Tensor | None, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """``(losses, maximum, log_total)`` (M,) of logits (M, V), at least float32. Losses are 0 where ignored, NaN for a
    label that is no class. The log-sum-exp is maximum + log_total; ``lse`` is taken as given, with 0."""
    maximum, total, target = statistics(logits, labels, lse, options)
    log_total = total.log()
    return loss_of(maximum, log_total, target, labels, options), maximum, log_total


def statistics(
    logits: Tensor, labels: Tensor, lse: Tensor | None, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """``(maximum, total, target)`` (M,) of these columns: of z = logit_scale * logits the maximum, the sum of
    exponentials relative to it, and the share of ``(1 - s) z[label] + s mean(z)``. A given lse stands for the first
    two as itself and 1."""
    columns = options.columns_that_count(logits.shape[1])
    z = _scaled(logits[:, :columns], options)
    label = labels - options.class_start
    is_here = (label >= 0) & (label < columns)
    if columns:
        at_label = z.gather(1, label.clamp(0, columns - 1)[:, None]).squeeze(1)
        target = torch.where(is_here, (1 - options.label_smoothing) * at_label, 0.0)
    else:
        target = z.new_zeros(labels.shape)
    if options.label_smoothing:
        target = target + options.label_smoothing / options.num_classes * z.sum(-1)
    target = torch.where((labels >= 0) & (labels < options.num_classes), target, torch.nan)
    if lse is not None:
        return lse, torch.ones_like(lse), target
    maximum = z.amax(-1) if columns else z.new_full(labels.shape, -torch.inf)
    shift = torch.where(maximum == -torch.inf, 0.0, maximum)  # -inf - -inf is NaN
    return maximum, (z - shift[:, None]).exp().sum(-1), target


def d_logits(
    d_loss: Tensor, logits: Tensor, labels: Tensor, maximum: Tensor, log_total: Tensor, options: Options
) -> Tensor:
    """The gradient of :func:`losses`, for the gradient d_loss (M,) of each: ``softmax - target``, scaled."""
    columns = options.columns_that_count(logits.shape[1])
    gradient = (_scaled(logits[:, :columns], options) - maximum[:, None]).sub_(log_total[:, None]).exp_()
    if options.z_loss:
        gradient *= 1 + 2 * options.z_loss * (maximum + log_total)[:, None]
    label = labels - options.class_start
    is_here = (label >= 0) & (label < columns)
    if columns:
        at_label = torch.where(is_here, options.label_smoothing - 1, 0.0).to(gradient.dtype)
        gradient.scatter_add_(1, label.clamp(0, columns - 1)[:, None], at_label[:, None])
    if options.label_smoothing:
        gradient -= options.label_smoothing / options.num_classes
    is_class = (labels >= 0) & (labels < options.num_classes)
    gradient *= torch.where(is_class, d_loss * options.logit_scale, torch.nan)[:, None]
    ignored = labels == options.ignore_index  # their logits may be NaN, which no factor of 0 takes away
    if torch.compiler.is_compiling() or not has_memory(gradient):  # where nobody knows which rows those are
        gradient = gradient.masked_fill(ignored[:, None], 0.0)
    else:  # a handful of rows instead of a slow pass over all
        gradient.index_fill_(0, ignored.nonzero().squeeze(1), 0.0)
    padding = logits.shape[1] - columns
    return (
        torch.nn.functional.pad(gradient.to(logits.dtype), (0, padding))
        if padding
        else gradient.to(logits.dtype)
    )


def _scaled(logits: Tensor, options: Options) -> Tensor:
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return exact if options.logit_scale == 1 else exact * options.logit_scale

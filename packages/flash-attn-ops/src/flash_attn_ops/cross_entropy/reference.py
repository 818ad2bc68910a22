"""Softmax cross-entropy in plain torch operations: the definition, and what runs where the kernels do not.

Written with log_softmax and softmax, whose CPU kernels make one pass, instead of a log-sum-exp of our own.
"""

from __future__ import annotations

import torch
from torch import Tensor


def losses(
    logits: Tensor,
    labels: Tensor,
    label_smoothing: float,
    logit_scale: float,
    z_loss: float,
    ignore_index: int,
) -> Tensor:
    """Losses (M,) of logits (M, V), at least float32: 0 where ignored, NaN for a label outside V."""
    scaled = _scaled(logits, logit_scale)
    log_softmax = scaled.log_softmax(-1)
    label = labels.clamp(0, logits.shape[1] - 1)
    loss = (label_smoothing - 1) * log_softmax.gather(1, label[:, None]).squeeze(1)
    if label_smoothing:
        loss = loss - label_smoothing * log_softmax.mean(-1)
    if z_loss:
        loss = loss + z_loss * scaled.logsumexp(-1).square()
    loss = torch.where(labels == label, loss, torch.nan)
    return torch.where(labels == ignore_index, 0.0, loss)


def d_logits(
    d_loss: Tensor,
    logits: Tensor,
    labels: Tensor,
    label_smoothing: float,
    logit_scale: float,
    z_loss: float,
    ignore_index: int,
) -> Tensor:
    """The gradient of :func:`losses`, for the gradient d_loss (M,) of each: ``softmax - target``, scaled."""
    classes = logits.shape[1]
    scaled = _scaled(logits, logit_scale)
    gradient = scaled.softmax(-1)
    if z_loss:
        gradient *= 1 + 2 * z_loss * scaled.logsumexp(-1, keepdim=True)
    label = labels.clamp(0, classes - 1)
    gradient.scatter_add_(1, label[:, None], torch.full_like(gradient[:, :1], label_smoothing - 1))
    if label_smoothing:
        gradient -= label_smoothing / classes
    gradient *= torch.where(labels == label, d_loss * logit_scale, torch.nan)[:, None]
    ignored = labels == ignore_index  # their logits may be NaN, which no factor of 0 takes away
    if torch.compiler.is_compiling():
        gradient = gradient.masked_fill(ignored[:, None], 0.0)
    else:  # a handful of rows instead of a slow pass over all
        gradient.index_fill_(0, ignored.nonzero().squeeze(1), 0.0)
    return gradient.to(logits.dtype)


def _scaled(logits: Tensor, logit_scale: float) -> Tensor:
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return exact if logit_scale == 1 else exact * logit_scale

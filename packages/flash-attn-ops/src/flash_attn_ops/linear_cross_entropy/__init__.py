"""A language model's head and its cross-entropy in one: the logits of all tokens never exist.

    linear_cross_entropy(hidden, weight, labels, bias) = cross_entropy(hidden @ weight^T + bias, labels)

Rows are taken in chunks, and the gradients come out exact: those of a mean or a sum are computed in the forward, chunk
by chunk, and multiplied by the upstream gradient in the backward; those of single losses (``reduction="none"``) in the
backward, which computes the logits again. [The idea of computing gradients of a scalar loss in the forward: Hsu et al.
2024, Liger Kernel, arXiv:2410.10989.]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flash_attn_ops.arguments import (
    bad_argument,
    check_floating,
    check_given,
    check_integer,
    check_same_device,
    check_shape,
)
from flash_attn_ops.autocast import as_autocast, autocast_dtype
from flash_attn_ops.cross_entropy import Reduction, check_options, reduce, z_part_of
from flash_attn_ops.cross_entropy.labels import check_labels
from flash_attn_ops.cross_entropy.options import Options
from flash_attn_ops.cross_entropy.parallel import place_classes
from flash_attn_ops.dispatch import runs_on_triton
from flash_attn_ops.distributed.group import GroupLike, process_group_of
from flash_attn_ops.library import once_differentiable

from . import chunks, operators
from .chunks import choose_chunk_rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["LinearCrossEntropyLoss", "choose_chunk_rows", "linear_cross_entropy"]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    return_z_loss: bool = False,
    vocab_size: int | None = None,
    process_group: GroupLike = None,
    vocab_start: int | None = None,
    validate: bool | None = None,
    chunk_rows: int | None = None,
    accumulate_in_float32: bool = True,
) -> Any:
    """Cross-entropy of the logits ``hidden @ weight^T + bias``, which have hidden's dtype, as a linear layer's do.

    Memory beyond inputs, gradients and a few numbers a row: the logits of one chunk; with several chunks the float32
    sum of a 16-bit weight's gradient; and where V is no multiple of 8 (of 16 bytes), a copy of weight padded to a
    multiple of 64, since matrix products of other sizes are much slower.

    Args:
        hidden: (..., E), any floating-point dtype.
        weight: (V, E), of the dtype of hidden. Under autocast hidden, weight and bias are cast as for a linear layer.
        labels: (...) int64, each in [0, V) or equal to ``ignore_index``.
        bias: (V,), of the dtype of hidden.
        label_smoothing, logit_scale, z_loss, ignore_index, reduction, return_z_loss, vocab_size, validate: see
            :func:`~flash_attn_ops.cross_entropy.cross_entropy`.
        process_group, vocab_start: weight and bias hold the classes of this process; hidden and labels are the same in
            the whole group, over which the gradient of hidden is summed. Not under torch.compile.
        chunk_rows: rows whose logits are in memory at once; None is :func:`choose_chunk_rows`.
        accumulate_in_float32: the gradient of a 16-bit weight is summed over chunks in float32; False sums it in its
            own dtype, which saves the memory of the sum and rounds it once a chunk.

    Returns:
        The loss, float32 (float64 for float64 hidden); with return_z_loss ``(loss, z_loss)``.

    Raises:
        ValueError: arguments that do not fit; see :func:`~flash_attn_ops.cross_entropy.cross_entropy` for labels.
    """
    check_options(label_smoothing, logit_scale, z_loss, reduction)
    check_given(hidden=hidden, weight=weight)
    check_floating(hidden=hidden, weight=weight, bias=bias)
    dtype = autocast_dtype(hidden)
    hidden, weight, bias = as_autocast(hidden, dtype), as_autocast(weight, dtype), as_autocast(bias, dtype)
    _check_shapes(hidden, weight, labels, bias, chunk_rows)
    group = process_group_of(process_group)
    place = place_classes(weight.shape[0], vocab_size, vocab_start, group)
    check_labels(labels, place[1], ignore_index, validate)

    given = (hidden, weight, bias)
    with_grad = torch.is_grad_enabled()
    wanted = tuple(with_grad and tensor is not None and tensor.requires_grad for tensor in given)
    loss, z_part = _LinearCrossEntropy.apply(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        labels.reshape(-1).contiguous(),
        *(wanted, reduction, return_z_loss, group),
        *(runs_on_triton("linear_cross_entropy", hidden), chunk_rows, accumulate_in_float32),
        Options(label_smoothing, logit_scale, z_loss, ignore_index, *place),
    )
    if reduction == "none":
        loss = loss.view(labels.shape)
        z_part = z_part.view(labels.shape) if return_z_loss else None
    return (loss, z_part) if return_z_loss else loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        wanted: tuple[bool, bool, bool],
        reduction: Reduction,
        return_z_loss: bool,
        process_group: ProcessGroup | None,
        on_triton: bool,
        chunk_rows: int | None,
        accumulate_in_float32: bool,
        options: Options,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.wanted, ctx.options, ctx.process_group = wanted, options, process_group
        ctx.how = (on_triton, chunk_rows, accumulate_in_float32)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        now = wanted if reduction != "none" else (False, False, False)
        # Divided by the count before they are summed, float16 gradients of most logits would round to 0.
        ctx.divided = reduction == "mean" and hidden.dtype != torch.float16
        share = None
        if ctx.divided and any(now):
            row_dtype = torch.promote_types(hidden.dtype, torch.float32)
            share = (labels != options.ignore_index).sum().to(row_dtype).reciprocal()
        if process_group is None:
            results = operators.forward(hidden, weight, bias, labels, share, *ctx.how, *now, *options)
        else:
            results = chunks.forward(
                *(hidden, weight, bias, labels, options, now),
                d_loss=share,
                on_triton=on_triton,
                chunk_rows=chunk_rows,
                accumulate_in_float32=accumulate_in_float32,
                process_group=process_group,
            )
        losses, maximum, log_total, *gradients = results
        loss, count = reduce(losses, labels, options.ignore_index, reduction, on_triton)
        ctx.later = reduction == "none"
        if ctx.later:
            ctx.save_for_backward(hidden, weight, bias, labels, maximum, log_total)
        else:
            gradients = [gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)]
            ctx.save_for_backward(count, *gradients)
        if not return_z_loss:
            return loss, None
        z_part = z_part_of(maximum + log_total, labels, options, reduction, on_triton)
        ctx.mark_non_differentiable(z_part)
        return loss, z_part

    @staticmethod
    @once_differentiable("linear_cross_entropy")
    def backward(ctx: Any, d_loss: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        scale: Tensor | None = None
        if ctx.later:
            results = operators.backward(
                *ctx.saved_tensors, d_loss.contiguous(), *ctx.how, *ctx.wanted, *ctx.options
            )
        else:
            count, *results = ctx.saved_tensors
            scale = d_loss
            if count is not None:
                scale = torch.where(count == 0, 0.0, d_loss if ctx.divided else d_loss / count)
        gradients = [
            _scaled(result, scale, dtype, ctx.how[0]) if want else None
            for result, want, dtype in zip(results, ctx.wanted, ctx.dtypes, strict=True)
        ]
        if ctx.process_group is not None and gradients[0] is not None:
            dist.all_reduce(gradients[0], group=ctx.process_group)
        return *gradients, *[None] * 9


def _scaled(gradient: Tensor, scale: Tensor | None, dtype: torch.dtype, on_triton: bool) -> Tensor:
    """``gradient * scale`` rounded to dtype; in place if nobody will ask again. (A scale without dimensions would be
    rounded to the dtype of the gradient first.)"""
    if scale is None:
        return gradient.to(dtype)
    if torch.compiler.is_compiling():
        return (gradient * scale.reshape(1)).to(dtype)
    if gradient.dtype != dtype or torch._C._autograd._get_current_graph_task_keep_graph():
        return torch.mul(gradient, scale.reshape(1), out=torch.empty_like(gradient, dtype=dtype))
    if not on_triton:
        return gradient.mul_(scale.reshape(1))
    from . import triton_kernels

    triton_kernels.multiply_(gradient, scale)
    return gradient


def _check_shapes(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, chunk_rows: int | None
) -> None:
    check_integer("labels", labels, (torch.int64,))
    check_same_device(hidden=hidden, weight=weight, labels=labels, bias=bias)
    if weight.dim() != 2 or weight.shape[0] == 0:
        expected = "(V, E) with V >= 1"
        raise bad_argument("weight", f"shape {tuple(weight.shape)}", expected, "pass one row for each class")
    if hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        expected = f"(..., {weight.shape[1]}), as weight has it"
        raise bad_argument("hidden", f"shape {tuple(hidden.shape)}", expected, "check the hidden size")
    check_shape("labels", labels, hidden.shape[:-1], "the shape of hidden without its last dimension")
    if bias is not None:
        check_shape("bias", bias, weight.shape[:1], "one value for each class")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            fix = f"convert it with {name}.to({hidden.dtype}), or use autocast"
            raise bad_argument(name, tensor.dtype, f"{hidden.dtype}, the dtype of hidden", fix)
    if chunk_rows is not None and (not isinstance(chunk_rows, int) or chunk_rows < 1):
        raise bad_argument("chunk_rows", chunk_rows, "a positive number of rows", "leave it out")


class LinearCrossEntropyLoss(nn.Module):
    """:func:`linear_cross_entropy` with its options fixed. The weight, often shared with an embedding, is passed."""

    def __init__(
        self,
        *,
        label_smoothing: float = 0.0,
        logit_scale: float = 1.0,
        z_loss: float = 0.0,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        return_z_loss: bool = False,
        vocab_size: int | None = None,
        process_group: GroupLike = None,
        vocab_start: int | None = None,
        validate: bool | None = None,
        chunk_rows: int | None = None,
        accumulate_in_float32: bool = True,
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {
            "label_smoothing": label_smoothing,
            "logit_scale": logit_scale,
            "z_loss": z_loss,
            "ignore_index": ignore_index,
            "reduction": reduction,
            "return_z_loss": return_z_loss,
            "vocab_size": vocab_size,
            "process_group": process_group,
            "vocab_start": vocab_start,
            "validate": validate,
            "chunk_rows": chunk_rows,
            "accumulate_in_float32": accumulate_in_float32,
        }

    def forward(self, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None) -> Any:
        return linear_cross_entropy(hidden, weight, labels, bias, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.options.items())

"""The names and argument orders under which dropout, addition and norm are known from FlashAttention.

Each is a thin call of :func:`layer_norm` or :func:`rms_norm`, which say what is computed, and any device, dtype and
hidden size is taken. Masks are uint8 and of ones without dropout in the ``dropout_add_*`` family, and bool or None in
``layer_norm_fn`` and ``rms_norm_fn``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .dropout_add_subset import (
    Results,
    dropout_add_layer_norm_subset,
    dropout_add_rms_norm_subset,
    sum_options,
)
from .functions import layer_norm, rms_norm
from .linear import layer_norm_linear, rms_norm_linear
from .modules import NormModule

__all__ = [
    "DropoutAddLayerNorm",
    "DropoutAddRMSNorm",
    "dropout_add_layer_norm",
    "dropout_add_layer_norm_parallel_residual",
    "dropout_add_layer_norm_subset",
    "dropout_add_rms_norm",
    "dropout_add_rms_norm_parallel_residual",
    "dropout_add_rms_norm_subset",
    "layer_norm_fn",
    "layer_norm_linear_fn",
    "rms_norm_fn",
]


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    *,
    is_rms_norm: bool = False,
    **options: Any,
) -> Results:
    """:func:`layer_norm`, or :func:`rms_norm` if ``is_rms_norm``. ``options``: zero_centered_weight, out_dtype, out,
    residual_out, return_dropout_mask, layerscale. As in all of this module a residual keeps its dtype, whatever
    ``residual_in_fp32`` says."""
    return (rms_norm if is_rms_norm else layer_norm)(
        x,
        weight,
        bias,
        residual=residual,
        x1=x1,
        weight1=weight1,
        bias1=bias1,
        eps=eps,
        dropout_p=dropout_p,
        rowscale=rowscale,
        prenorm=prenorm,
        residual_in_fp32=residual_in_fp32 and residual is None,
        **options,
    )


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    **options: Any,
) -> Results:
    """:func:`layer_norm_fn` with ``is_rms_norm``."""
    return layer_norm_fn(
        *(x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, residual_in_fp32),
        is_rms_norm=True,
        **options,
    )


def layer_norm_linear_fn(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`layer_norm_linear`, or :func:`rms_norm_linear` if ``is_rms_norm``."""
    return (rms_norm_linear if is_rms_norm else layer_norm_linear)(
        *(x, norm_weight, norm_bias, linear_weight, linear_bias),
        residual=residual,
        eps=eps,
        prenorm=prenorm,
        residual_in_fp32=residual_in_fp32 and residual is None,
    )


def dropout_add_layer_norm(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    epsilon: float,
    rowscale: Tensor | None = None,
    layerscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Results:
    """``out[, sum][, mask]``: the LayerNorm of ``dropout(x0 * rowscale * layerscale) + residual``.

    The sum has the dtype of residual; without one float32 if ``residual_in_fp32``, else that of x0.
    """
    scales: dict[str, Any] = {"rowscale": rowscale, "layerscale": layerscale}
    outputs = sum_options(residual, residual_in_fp32, prenorm, return_dropout_mask)
    return _results(
        layer_norm(x0, weight, bias, eps=epsilon, dropout_p=dropout_p, **scales, **outputs),
        *(x0, None, return_dropout_mask),
    )


def dropout_add_rms_norm(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    epsilon: float,
    rowscale: Tensor | None = None,
    layerscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Results:
    """:func:`dropout_add_layer_norm` with RMSNorm."""
    scales: dict[str, Any] = {"rowscale": rowscale, "layerscale": layerscale}
    outputs = sum_options(residual, residual_in_fp32, prenorm, return_dropout_mask)
    return _results(
        rms_norm(x0, weight, bias, eps=epsilon, dropout_p=dropout_p, **scales, **outputs),
        *(x0, None, return_dropout_mask),
    )


def dropout_add_layer_norm_parallel_residual(
    x0: Tensor,
    x1: Tensor | None,
    residual: Tensor | None,
    weight0: Tensor,
    bias0: Tensor | None,
    weight1: Tensor | None,
    bias1: Tensor | None,
    dropout_p: float,
    epsilon: float,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> tuple[Any, ...]:
    """``(out0, out1[, sum][, mask0, mask1])``: LayerNorm of ``dropout(x0) + dropout(x1) + residual``, scaled and
    shifted twice; out1 is None without ``weight1``, mask1 without ``x1``."""
    outputs = sum_options(residual, residual_in_fp32, prenorm, return_dropout_mask)
    second: dict[str, Any] = {"x1": x1, "weight1": weight1, "bias1": bias1}
    results = layer_norm(x0, weight0, bias0, eps=epsilon, dropout_p=dropout_p, **second, **outputs)
    return _two_results(results, x0, x1, weight1, return_dropout_mask)


def dropout_add_rms_norm_parallel_residual(
    x0: Tensor,
    x1: Tensor | None,
    residual: Tensor | None,
    weight0: Tensor,
    bias0: Tensor | None,
    weight1: Tensor | None,
    bias1: Tensor | None,
    dropout_p: float,
    epsilon: float,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> tuple[Any, ...]:
    """:func:`dropout_add_layer_norm_parallel_residual` with RMSNorm."""
    outputs = sum_options(residual, residual_in_fp32, prenorm, return_dropout_mask)
    second: dict[str, Any] = {"x1": x1, "weight1": weight1, "bias1": bias1}
    results = rms_norm(x0, weight0, bias0, eps=epsilon, dropout_p=dropout_p, **second, **outputs)
    return _two_results(results, x0, x1, weight1, return_dropout_mask)


def _byte_mask(mask: Tensor | None, x: Tensor | None) -> Tensor | None:
    if x is None:
        return None
    return torch.ones_like(x, dtype=torch.uint8) if mask is None else mask.to(torch.uint8)


def _results(results: Results, x0: Tensor, x1: Tensor | None, return_dropout_mask: bool) -> Results:
    """With the one mask of this family in place of two."""
    if not return_dropout_mask:
        return results
    *outputs, mask, _ = results
    return (*outputs, _byte_mask(mask, x0))


def _two_results(
    results: Results, x0: Tensor, x1: Tensor | None, weight1: Tensor | None, return_dropout_mask: bool
) -> tuple[Any, ...]:
    outputs: list[Any] = list(results) if isinstance(results, tuple) else [results]
    if weight1 is None:
        outputs.insert(1, None)
    if return_dropout_mask:
        outputs[-2:] = [_byte_mask(outputs[-2], x0), _byte_mask(outputs[-1], x1)]
    return tuple(outputs)


class _DropoutAddNorm(NormModule):
    def __init__(
        self,
        hidden_size: int,
        bias: bool,
        prenorm: bool,
        p: float,
        eps: float,
        residual_in_fp32: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(hidden_size, eps, bias, device, dtype, dropout_p=p)
        self.prenorm = prenorm
        self.residual_in_fp32 = residual_in_fp32


class DropoutAddLayerNorm(_DropoutAddNorm):
    """:func:`dropout_add_layer_norm` with its weight and bias; dropout acts in training mode."""

    def __init__(
        self,
        hidden_size: int,
        prenorm: bool = False,
        p: float = 0.0,
        eps: float = 1e-5,
        residual_in_fp32: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, True, prenorm, p, eps, residual_in_fp32, device, dtype)

    def forward(self, x0: Tensor, residual: Tensor | None = None) -> Results:
        return dropout_add_layer_norm(
            *(x0, residual, self.weight, self.bias, self.dropout_p if self.training else 0.0, self.eps),
            prenorm=self.prenorm,
            residual_in_fp32=self.residual_in_fp32,
        )


class DropoutAddRMSNorm(_DropoutAddNorm):
    """:func:`dropout_add_rms_norm` with its weight; dropout acts in training mode."""

    def __init__(
        self,
        hidden_size: int,
        prenorm: bool = False,
        p: float = 0.0,
        eps: float = 1e-5,
        residual_in_fp32: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, False, prenorm, p, eps, residual_in_fp32, device, dtype)

    def forward(self, x0: Tensor, residual: Tensor | None = None) -> Results:
        return dropout_add_rms_norm(
            *(x0, residual, self.weight, None, self.dropout_p if self.training else 0.0, self.eps),
            prenorm=self.prenorm,
            residual_in_fp32=self.residual_in_fp32,
        )

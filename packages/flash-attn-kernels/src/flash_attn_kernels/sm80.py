"""The sm80 path: tensor-core kernels (mma.sync, cp.async) for every NVIDIA GPU since Ampere."""

from __future__ import annotations

import torch
from torch import Tensor

from .inputs import AttentionInputs
from .options import AttentionOptions

_UNBOUNDED = -1


def forward(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """``out`` (B, Sq, H, D) in the dtype of q and ``lse`` fp32 (B, H, Sq)."""
    return torch.ops.flash_attn_kernels.sm80_forward(
        inputs.q, inputs.k, inputs.v, *_scale_and_window(inputs.options)
    )


def backward(
    inputs: AttentionInputs, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, None]:
    """dq, dk, dv; the last entry stands for the ALiBi slopes, which this path does not take."""
    dq, dk, dv = torch.ops.flash_attn_kernels.sm80_backward(
        dout,
        inputs.q,
        inputs.k,
        inputs.v,
        out,
        lse,
        None if dlse is None else dlse.contiguous(),
        *_scale_and_window(inputs.options),
        inputs.options.deterministic,
    )
    return dq, dk, dv, None


def _scale_and_window(options: AttentionOptions) -> tuple[float, int, int]:
    left, right = (
        _UNBOUNDED if side is None else side for side in (options.window_left, options.window_right)
    )
    return options.softmax_scale, left, right

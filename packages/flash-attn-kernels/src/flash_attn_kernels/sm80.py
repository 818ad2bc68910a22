"""The sm80 path: tensor-core kernels (mma.sync, cp.async) for every NVIDIA GPU since Ampere."""

from __future__ import annotations

import torch
from torch import Tensor

from .inputs import AttentionInputs
from .options import AttentionOptions

# Rows and 16-byte chunks are what the kernels copy: strides and addresses must be multiples of 8 elements.
_ALIGNED_ELEMENTS = 8
_UNBOUNDED = -1


def forward(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """``out`` (B, Sq, H, D) in the dtype of q and ``lse`` fp32 (B, H, Sq)."""
    q, k, v = (_aligned(x) for x in (inputs.q, inputs.k, inputs.v))
    return torch.ops.flash_attn_kernels.sm80_forward(q, k, v, *_scale_and_window(inputs.options))


def backward(
    inputs: AttentionInputs, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, None]:
    """dq, dk, dv; the last entry stands for the ALiBi slopes, which this path does not take."""
    dout, q, k, v = (_aligned(x) for x in (dout, inputs.q, inputs.k, inputs.v))
    dq, dk, dv = torch.ops.flash_attn_kernels.sm80_backward(
        dout,
        q,
        k,
        v,
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


def _aligned(x: Tensor) -> Tensor:
    """x itself where its rows can be copied in 16-byte chunks, otherwise a contiguous copy."""
    offsets = (x.storage_offset(), *x.stride()[:-1])
    if x.stride(-1) == 1 and all(offset % _ALIGNED_ELEMENTS == 0 for offset in offsets):
        return x
    return x.clone(memory_format=torch.contiguous_format)

"""The sm90 path: the forward by Hopper's kernels (wgmma, TMA), the backward by the sm80 kernels from its results.

Only used after :func:`library.load_error` has returned None, on a device of compute capability 9.x.
"""

from __future__ import annotations

from torch import Tensor

from . import library, sm80
from .inputs import AttentionInputs
from .operator_arguments import is_full_or_causal, lengths, per_head, window
from .options import AttentionOptions

backward = sm80.backward


def forward(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """``out`` in the layout of q with the head dim of v, in its dtype, and ``lse`` fp32: (B, H, Sq) or (H, Tq).

    Rows that are not 16-byte aligned run on the sm80 kernels: the operator looks at every call's addresses, which
    are not known while a graph is compiled. :func:`unaligned_rows` says what it will find.
    """
    q, k, v, options, modifiers, _, packed = inputs
    return library.sm90_forward(
        q,
        k,
        v,
        options.softmax_scale,
        *window(options),
        options.top_left,
        options.softcap,
        per_head(modifiers.learnable_sink),
        *(() if packed is None else lengths(packed)),
    )


def plain_forward(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """:func:`forward` of a dense call without modifiers and dropout, which takes less time."""
    if is_full_or_causal(options):
        return library.sm90_forward_dense(q, k, v, options.softmax_scale, options.window_right == 0)
    return library.sm90_forward(
        q, k, v, options.softmax_scale, *window(options), options.top_left, options.softcap
    )


def unaligned_rows(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Says which of the tensors of a call that dispatch gave to this path the operator cannot run here, if any."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not _has_aligned_rows(x):
            return f"rows of {name} are not 16-byte aligned: address {x.data_ptr():#x}, strides {x.stride()}"
    return None


def _has_aligned_rows(x: Tensor) -> bool:
    """Dispatch has made sure that the head dim is a multiple of 8 elements."""
    *strides, last_stride = x.stride()
    if last_stride != 1:  # the operator makes a contiguous copy
        return True
    return x.data_ptr() % 16 == 0 and all(
        size <= 1 or stride % 8 == 0 for size, stride in zip(x.shape[:-1], strides, strict=True)
    )

"""The sm90 path: Hopper's kernels (wgmma, TMA); some backwards by the sm80 kernels, from the forward's results.

Only used after :func:`library.load_error` has returned None, on a device of compute capability 9.x.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import library, sm80
from .inputs import AttentionInputs, Gradients, PackedLayout
from .operator_arguments import is_full_or_causal, lengths, per_head, window
from .options import AttentionOptions

# As csrc/attention/sm90/backward_launch.h has them: at head dims up to 64, and the mean of packed sequences.
_SMALL_TILE, _FEW_QUERIES = 64, 192
_FEW_PACKED_QUERIES = 256


def backward(
    inputs: AttentionInputs, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, **needs: Any
) -> Gradients:
    """As :func:`sm80.backward`. The operator gives to the sm80 kernels what those of sm90 cannot run."""
    return sm80.backward(inputs, out, lse, dout, dlse, operator=library.sm90_backward, **needs)


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


def few_queries(q: Tensor, v: Tensor, packed: PackedLayout | None) -> str | None:
    """Says why the operator gives the backward of a call to the sm80 kernels for its lengths' sake, if it does."""
    if max(q.shape[-1], v.shape[-1]) > 64:
        return None
    if packed is None:
        if q.shape[1] <= _FEW_QUERIES and -(-q.shape[1] // _SMALL_TILE) % 2 == 1:
            return f"{q.shape[1]} queries leave half of a tile of {2 * _SMALL_TILE} empty"
        return None
    sequences = packed.cu_seqlens_q.shape[0] - 1
    if q.shape[0] < _FEW_PACKED_QUERIES * sequences:
        return f"{q.shape[0]} queries of {sequences} sequences are below {_FEW_PACKED_QUERIES} each"
    return None


def _has_aligned_rows(x: Tensor) -> bool:
    """Dispatch has made sure that the head dim is a multiple of 8 elements."""
    *strides, last_stride = x.stride()
    if last_stride != 1:  # the operator makes a contiguous copy
        return True
    return x.data_ptr() % 16 == 0 and all(
        size <= 1 or stride % 8 == 0 for size, stride in zip(x.shape[:-1], strides, strict=True)
    )

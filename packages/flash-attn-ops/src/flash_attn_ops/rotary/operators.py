"""The launcher of the rotary kernel as operators, one that returns a new tensor and one that overwrites x."""

from __future__ import annotations

from torch import Tensor

from flash_attn_ops.library import opaque

_ANGLES = "Tensor cos, Tensor sin, Tensor? offsets, SymInt offset, Tensor? cu_seqlens"
_OPTIONS = f"{_ANGLES}, bool interleaved, bool conjugate"


@opaque(f"rotate(Tensor x, {_OPTIONS}) -> Tensor", lambda x, *_: x.new_empty(x.shape))
def rotate(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    offsets: Tensor | None,
    offset: int,
    cu_seqlens: Tensor | None,
    interleaved: bool,
    conjugate: bool,
) -> Tensor:
    """x rotated, contiguous. A sequence starts at its value of ``offsets``, or at ``offset`` without them."""
    from . import triton_kernels

    x = _dense(x)
    out = x.new_empty(x.shape)
    triton_kernels.rotate(
        x, out, _dense(cos), _dense(sin), offsets, offset, cu_seqlens, interleaved, conjugate
    )
    return out


@opaque(f"rotate_(Tensor(a!) x, {_OPTIONS}) -> ()", lambda *_: None)
def rotate_(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    offsets: Tensor | None,
    offset: int,
    cu_seqlens: Tensor | None,
    interleaved: bool,
    conjugate: bool,
) -> None:
    """The same, written into x, whose last dimension has no gaps."""
    from . import triton_kernels

    triton_kernels.rotate(x, x, _dense(cos), _dense(sin), offsets, offset, cu_seqlens, interleaved, conjugate)


def _dense(tensor: Tensor) -> Tensor:
    """With neighbouring values in the last dimension."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()

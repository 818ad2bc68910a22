"""The compiled kernels: found and loaded on first use, never at import.

The library registers ``torch.ops.flash_attn_kernels.*`` through torch's stable ABI. It contains no Python and no
torch version, and it loads in CPU-only torch too, where its operators exist for meta and fake tensors.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from .tracing import constant_under_compile

LIBRARY_PATH = Path(__file__).parent / "lib" / "libflash_attn_kernels.so"


@constant_under_compile
def load_error() -> str | None:
    """Load the library once; None when its operators are there, otherwise the reason why not."""
    return _load()


@functools.cache
def _load() -> str | None:
    if not LIBRARY_PATH.exists():
        return (
            "this installation has no compiled kernels (install a platform wheel, or build with "
            "FLASH_ATTN_KERNELS_BUILD=always)"
        )
    try:
        torch.ops.load_library(str(LIBRARY_PATH))
    except (OSError, RuntimeError) as error:
        return f"the compiled kernels failed to load: {error.__cause__ or error}"
    _register_fakes()
    return None


def _register_fakes() -> None:
    """Shapes and strides of the operators' results, for FakeTensor, meta tensors and torch.compile."""

    @torch.library.register_fake("flash_attn_kernels::sm80_forward")
    def _(
        q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, window_left: int, window_right: int
    ) -> tuple[Tensor, Tensor]:
        B, Sq, H, D = q.shape
        return q.new_empty((B, Sq, H, D)), q.new_empty((B, H, Sq), dtype=torch.float32)

    @torch.library.register_fake("flash_attn_kernels::sm80_backward")
    def _(
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        dlse: Tensor | None,
        softmax_scale: float,
        window_left: int,
        window_right: int,
        deterministic: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

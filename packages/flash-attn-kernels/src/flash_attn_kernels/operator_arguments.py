"""Options and tensors of a call in the form in which the compiled operators take them."""

from __future__ import annotations

from torch import Tensor

from .inputs import PackedLayout
from .options import AttentionOptions

_UNBOUNDED = -1


def window(options: AttentionOptions) -> tuple[int, int]:
    """Left and right."""
    left, right = options.window_left, options.window_right
    return _UNBOUNDED if left is None else left, _UNBOUNDED if right is None else right


def is_full_or_causal(options: AttentionOptions) -> bool:
    """Scores depend on the scale alone, and all keys are visible or the mask is causal: nothing else needs saying."""
    return (
        options.window_left is None
        and (options.window_right is None or (options.window_right == 0 and not options.top_left))
        and options.softcap == 0.0
    )


def lengths(packed: PackedLayout) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """cu_seqlens and seqused, contiguous."""
    return (
        packed.cu_seqlens_q.contiguous(),
        packed.cu_seqlens_k.contiguous(),
        None if packed.seqused_q is None else packed.seqused_q.contiguous(),
        None if packed.seqused_k is None else packed.seqused_k.contiguous(),
    )


def per_head(x: Tensor | None) -> Tensor | None:
    """Slopes or a sink: fp32, contiguous."""
    return None if x is None else x.float().contiguous()

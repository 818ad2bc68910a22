"""Forward-mode derivatives: torch.func.jvp and torch.autograd.forward_ad.

The compiled operators have none, and an operator without one drops tangents in silence. The portable path has them, as
every operation of torch that it is made of does, as long as no gradient is recorded.
"""

from __future__ import annotations

from torch import Tensor
from torch.autograd import forward_ad


def may_have_tangents() -> bool:
    """Whether forward-mode differentiation goes on at all."""
    return forward_ad._current_level >= 0


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether one of the tensors carries a tangent of the current level."""
    if forward_ad._current_level < 0:  # asked in every call
        return False
    return any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors)

"""Attention over all keys from attentions over parts of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import DTYPES
from .errors import bad_argument


def merge_attention_states(
    outs: Sequence[Tensor] | Tensor, lses: Sequence[Tensor] | Tensor
) -> tuple[Tensor, Tensor]:
    r"""Combine attentions of the same queries over disjoint sets of keys: what ring and context parallelism need.

    .. math::
        \mathrm{lse} = \log \sum_n e^{\mathrm{lse}_n}, \qquad
        \mathrm{out} = \sum_n e^{\mathrm{lse}_n - \mathrm{lse}}\, \mathrm{out}_n

    Differentiable in every out and lse. A learnable sink must be in one of the parts only.

    Args:
        outs: N tensors (B, Sq, H, D) or (T, H, D), or one with these stacked.
        lses: N tensors (B, H, Sq) or (H, T) in the order of ``outs``, or one with these stacked; -inf where a part
            has no visible key.

    Returns:
        out in the shape and dtype of ``outs[0]``, and lse, computed in fp32 (fp64 for fp64). Rows that saw no key in
        any part get 0 and -inf, and gradients 0.

    Raises:
        ValueError: for numbers, shapes, dtypes or devices that do not fit together.

    Source: Rabe and Staats, "Self-attention does not need O(n^2) memory", 2021.
    """
    outs, lses = _listed("outs", outs), _listed("lses", lses)
    _check(outs, lses)
    dtype = torch.float64 if outs[0].dtype == torch.float64 else torch.float32
    lse_N = torch.stack([lse.to(dtype) for lse in lses])
    # The largest only keeps exp from overflowing; its gradients cancel. It is 0 where every part is empty, since
    # -inf - -inf is NaN.
    largest = lse_N.detach().amax(dim=0)
    largest = largest.masked_fill(largest == float("-inf"), 0.0)
    weights_N = torch.exp(lse_N - largest)
    denominator = weights_N.sum(dim=0)
    is_empty = denominator == 0
    # Filled before the logarithm and the division, so that gradients are 0 and not NaN.
    denominator = denominator.masked_fill(is_empty, 1.0)
    lse = (largest + torch.log(denominator)).masked_fill(is_empty, float("-inf"))
    weights_N = weights_N / denominator
    out = torch.zeros((), dtype=dtype, device=outs[0].device)
    for part, weight in zip(outs, weights_N.transpose(-1, -2).unsqueeze(-1), strict=True):
        out = out + weight * part
    return out.to(outs[0].dtype), lse


def _listed(name: str, tensors: Sequence[Tensor] | Tensor) -> list[Tensor]:
    expected, fix = "tensors in a list, or one with them stacked", "pass the results of attention as they are"
    try:
        listed = list(tensors)
    except TypeError:
        got = "a single number" if isinstance(tensors, Tensor) else type(tensors).__name__
        raise bad_argument(name, got, expected, fix) from None
    for n, x in enumerate(listed):
        if not isinstance(x, Tensor):
            raise bad_argument(f"{name}[{n}]", type(x).__name__, "a torch.Tensor", fix)
    return listed


def _check(outs: list[Tensor], lses: list[Tensor]) -> None:
    if len(outs) == 0 or len(outs) != len(lses):
        raise bad_argument(
            "lses",
            f"{len(lses)} tensors for {len(outs)} outs",
            "as many as outs, at least 1",
            "pass one for each part",
        )
    shape = outs[0].shape
    if len(shape) not in (3, 4):
        raise bad_argument(
            "outs[0]",
            f"shape {tuple(shape)}",
            "(batch, seqlen, heads, head_dim) or (tokens, heads, head_dim)",
            "pass the results of attention as they are",
        )
    lse_shape = (*shape[:-3], shape[-2], shape[-3])
    for n, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        if out.shape != shape:
            raise bad_argument(
                f"outs[{n}]",
                f"shape {tuple(out.shape)}",
                f"that of outs[0], {tuple(shape)}",
                "pass parts of one call",
            )
        if lse.shape != lse_shape:
            raise bad_argument(
                f"lses[{n}]",
                f"shape {tuple(lse.shape)}",
                f"shape {lse_shape}",
                "pass lse as attention returns it",
            )
        for name, x in ((f"outs[{n}]", out), (f"lses[{n}]", lse)):
            if x.dtype not in DTYPES:
                raise bad_argument(name, f"dtype {x.dtype}", "a floating-point dtype", f"cast {name}")
            if x.device != outs[0].device:
                raise bad_argument(
                    name, f"device {x.device}", f"that of outs[0], {outs[0].device}", "move it with .to"
                )

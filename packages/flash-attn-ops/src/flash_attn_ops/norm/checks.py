"""Arguments of the norms that do not fit, refused before anything is written."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn_ops.arguments import (
    bad_argument,
    check_floating,
    check_given,
    check_number,
    check_same_device,
    check_shape,
)

NAMES = ("x", "x1", "residual", "rowscale", "layerscale", "weight", "bias", "weight1", "bias1")


def check_norm(
    inputs: tuple[Tensor | None, ...], eps: float, dropout_p: float, rowscale_requires_grad: bool
) -> tuple[Tensor, Tensor]:
    """Types, devices and shapes of what is read, the tensors of ``NAMES``. Returns x and weight."""
    tensors = dict(zip(NAMES, inputs, strict=True))
    check_given(x=tensors["x"], weight=tensors["weight"])
    check_number(eps=eps, dropout_p=dropout_p)
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    check_floating(**given)
    check_same_device(**given)
    x, weight = given["x"], given["weight"]
    if x.dim() == 0:
        raise bad_argument("x", "a scalar", "at least one dimension, (..., N)", "normalise over a dimension")
    for name, tensor in given.items():
        if name in ("residual", "x1"):
            check_shape(name, tensor, x.shape, "the shape of x")
        elif name == "rowscale":
            check_shape(name, tensor, x.shape[:-1], "the shape of x without its last dimension")
        elif name != "x":
            check_shape(name, tensor, x.shape[-1:], "the last dimension of x")
    if "bias1" in given and "weight1" not in given:
        raise bad_argument("bias1", "a tensor without weight1", "weight1 too", "pass both, or neither")
    if rowscale_requires_grad:
        raise bad_argument(
            "rowscale",
            "a tensor that requires grad",
            "a constant, no gradient is computed for it",
            "multiply x by it before the call, or detach it",
        )
    if not eps >= 0:
        raise bad_argument("eps", eps, "a number >= 0", "use the default, 1e-5")
    if not 0.0 <= dropout_p < 1.0:
        raise bad_argument(
            "dropout_p", dropout_p, "a probability in [0, 1)", "pass 0.0 to switch dropout off"
        )
    return x, weight


def check_written(
    name: str, tensor: Tensor, x: Tensor, dtype: torch.dtype, dtype_meaning: str, records_gradients: bool
) -> None:
    """Memory that a result is to be written to."""
    check_floating(**{name: tensor})
    check_same_device(x=x, **{name: tensor})
    check_shape(name, tensor, x.shape, "the shape of x")
    if tensor.dtype != dtype:
        raise bad_argument(
            name, tensor.dtype, f"{dtype}, {dtype_meaning}", f"allocate {name} with that dtype"
        )
    if not tensor.is_contiguous():
        raise bad_argument(name, "a tensor with gaps", "a contiguous one", f"allocate {name} as a whole")
    if records_gradients:
        raise bad_argument(
            name,
            "a call that autograd records",
            "one without gradients: what is written to given memory has no history",
            f"call it under torch.no_grad(), or leave {name} out",
        )

"""Argument checks that the operations share. Every rejection is the kernels layer's one wording."""

from __future__ import annotations

from flash_attn_kernels.errors import bad_argument
from torch import Tensor

__all__ = ["bad_argument", "check_floating", "check_integer", "check_same_device", "check_shape"]


def check_floating(**tensors: Tensor | None) -> None:
    """Every given value is a floating-point tensor."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise bad_argument(
                name, type(tensor).__name__, "a torch.Tensor", "convert it with torch.as_tensor"
            )
        if not tensor.is_floating_point():
            raise bad_argument(
                name, tensor.dtype, "a floating-point dtype", f"convert it with {name}.float()"
            )


def check_integer(name: str, tensor: Tensor, dtypes: tuple[object, ...]) -> None:
    expected = " or ".join(map(str, dtypes))
    if not isinstance(tensor, Tensor):
        raise bad_argument(
            name, type(tensor).__name__, f"a torch.Tensor of {expected}", "use torch.as_tensor"
        )
    if tensor.dtype not in dtypes:
        raise bad_argument(name, tensor.dtype, expected, f"convert it with {name}.to({dtypes[0]})")


def check_same_device(**tensors: Tensor | None) -> None:
    """Every given tensor lives where the first one does."""
    first: Tensor | None = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if first is None:
            first, first_name = tensor, name
        elif tensor.device != first.device:
            expected = f"{first.device}, where {first_name} is"
            raise bad_argument(
                name, f"a tensor on {tensor.device}", expected, f"move it: {name}.to({first.device!s})"
            )


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    if tensor.shape != expected:
        raise bad_argument(
            name,
            f"shape {tuple(tensor.shape)}",
            f"{tuple(expected)}, {meaning}",
            f"pass a {name} of that shape",
        )

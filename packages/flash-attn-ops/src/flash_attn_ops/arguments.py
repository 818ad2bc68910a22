"""Argument checks that the operations share. Every rejection is the kernels layer's one wording."""

from __future__ import annotations

import numbers

from flash_attn_kernels.errors import bad_argument
from torch import Tensor

__all__ = [
    "bad_argument",
    "check_floating",
    "check_given",
    "check_integer",
    "check_number",
    "check_same_device",
    "check_shape",
]


def check_given(**tensors: Tensor | None) -> None:
    """None of them is None."""
    for name, tensor in tensors.items():
        if tensor is None:
            raise bad_argument(name, None, "a torch.Tensor", "pass a tensor")


def check_number(**values: float) -> None:
    """Every value is a number of Python's (or numpy's): a tensor would be read by the host, and get no gradient."""
    for name, value in values.items():
        if not isinstance(value, numbers.Real):
            expected = "a number, for which no gradient is computed"
            fix = f"pass float({name}), or apply a tensor of it outside of this call"
            raise bad_argument(name, type(value).__name__, expected, fix)


def check_floating(**tensors: Tensor | None) -> None:
    """Every given value is a floating-point tensor, of a dtype that torch promotes to others: 8 bits are storage."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise bad_argument(
                name, type(tensor).__name__, "a torch.Tensor", "convert it with torch.as_tensor"
            )
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            expected = "a floating-point dtype of 16 bits or more"
            raise bad_argument(name, tensor.dtype, expected, f"convert it with {name}.float()")


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

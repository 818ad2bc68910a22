"""Activations, plain and gated, against eager torch and torch.compile.

Bytes that must move: each activation once. Forward reads x (of a gated one gate and value) and writes out; backward
reads both again with the gradient of out, and writes their gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from flash_attn_ops.activations import bias_gelu, gelu, squared_relu, swiglu
from memory_bound import ELEMENTS, Case, run
from torch import Tensor


def torch_swiglu(packed: Tensor) -> Tensor:
    gate, value = packed.chunk(2, dim=-1)
    return F.silu(gate) * value


def our_swiglu(packed: Tensor) -> Tensor:
    return swiglu(packed, order="gate_value")


# ours, torch's, activations read forward
OPERATIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], int]] = {
    "gelu": (gelu, F.gelu, 1),
    "gelu (tanh)": (partial(gelu, approximate="tanh"), partial(F.gelu, approximate="tanh"), 1),
    "squared_relu": (squared_relu, lambda x: F.relu(x).square(), 1),
    "bias_gelu": (bias_gelu, lambda x, bias: F.gelu(x + bias, approximate="tanh"), 1),
    "swiglu, packed": (our_swiglu, torch_swiglu, 2),
    "swiglu, two tensors": (swiglu, lambda gate, value: F.silu(gate) * value, 2),
}


def make_case(operation: str, hidden_size: int) -> Case:
    rows = ELEMENTS // hidden_size
    ours, theirs, read = OPERATIONS[operation]
    shapes = {
        "bias_gelu": [(rows, hidden_size), (hidden_size,)],
        "swiglu, packed": [(rows, 2 * hidden_size)],
        "swiglu, two tensors": [(rows, hidden_size)] * 2,
    }.get(operation, [(rows, hidden_size)])

    def inputs() -> list[Tensor]:
        return [torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_() for shape in shapes]

    activation_bytes = 2 * ELEMENTS
    return Case(
        {"operation": operation, "dtype": "bfloat16", "rows": rows, "hidden_size": hidden_size},
        inputs,
        {"ours": ours, "torch": theirs, "torch.compile": torch.compile(theirs, dynamic=False)},
        forward_bytes=activation_bytes * (read + 1),
        backward_bytes=activation_bytes * (2 * read + 1),
    )


def cases(quick: bool) -> list[Callable[[], Case]]:
    sizes = [16384] if quick else [4096, 16384]
    return [partial(make_case, operation, size) for operation in OPERATIONS for size in sizes]


if __name__ == "__main__":
    run("activations", __doc__.splitlines()[0], cases)

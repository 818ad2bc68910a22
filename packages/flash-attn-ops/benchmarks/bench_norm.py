"""LayerNorm and RMSNorm, with and without a residual, against eager torch and torch.compile.

Bytes that must move: each activation once. Forward reads x (and residual) and writes out (and the sum); backward
reads x (or the sum), the gradient of out (and of the sum) and writes dx. Weights are left out: they are 2^-12 of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from flash_attn_ops.norm import layer_norm, rms_norm
from memory_bound import ELEMENTS, Case, run
from torch import Tensor

EPS = 1e-5


def torch_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, EPS)


def torch_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, EPS)


def torch_add_rms_norm(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return F.rms_norm(total, weight.shape, weight, EPS), total


def our_add_rms_norm(x: Tensor, weight: Tensor, residual: Tensor) -> Any:
    return rms_norm(x, weight, residual=residual, prenorm=True)


OPERATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "rms_norm": (rms_norm, torch_rms_norm),
    "layer_norm": (layer_norm, torch_layer_norm),
    "add + rms_norm": (our_add_rms_norm, torch_add_rms_norm),
}


def make_case(operation: str, hidden_size: int) -> Case:
    rows = ELEMENTS // hidden_size
    ours, theirs = OPERATIONS[operation]

    def inputs() -> list[Tensor]:
        shapes = [(rows, hidden_size), (hidden_size,)]
        shapes += {"rms_norm": [], "layer_norm": [(hidden_size,)], "add + rms_norm": [(rows, hidden_size)]}[
            operation
        ]
        return [torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_() for shape in shapes]

    activation_bytes = 2 * ELEMENTS
    with_residual = operation == "add + rms_norm"
    return Case(
        {"operation": operation, "dtype": "bfloat16", "rows": rows, "hidden_size": hidden_size},
        inputs,
        {"ours": ours, "torch": theirs, "torch.compile": torch.compile(theirs, dynamic=False)},
        forward_bytes=activation_bytes * (4 if with_residual else 2),
        backward_bytes=activation_bytes * (4 if with_residual else 3),
    )


def cases(quick: bool) -> list[Callable[[], Case]]:
    sizes = [4096] if quick else [1024, 2048, 4096, 8192, 16384]
    return [partial(make_case, operation, size) for operation in OPERATIONS for size in sizes]


if __name__ == "__main__":
    run("norm", __doc__.splitlines()[0], cases)

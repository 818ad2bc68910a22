"""LayerNorm and RMSNorm, with and without a residual and dropout, against torch, torch.compile, Quack and Liger.

Bytes that must move: each activation once. Forward reads x (and residual) and writes out (and the sum); backward
reads x (or the sum), the gradient of out (and of the sum) and writes dx (and, with dropout, the residual's gradient,
which is another). Weights are left out: they are 2^-12 of it. Quack and Liger take part where they are installed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from flash_attn_ops.norm import layer_norm, rms_norm
from memory_bound import ELEMENTS, Case, run
from torch import Tensor

EPS = 1e-5
DROPOUT_P = 0.1
Call = Callable[..., Any]


def torch_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, EPS)


def torch_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, EPS)


def torch_add_rms_norm(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return F.rms_norm(total, weight.shape, weight, EPS), total


def torch_dropout_add_rms_norm(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    return torch_add_rms_norm(F.dropout(x, DROPOUT_P), weight, residual)


def torch_dropout_add_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor
) -> tuple[Tensor, Tensor]:
    total = F.dropout(x, DROPOUT_P) + residual
    return F.layer_norm(total, weight.shape, weight, bias, EPS), total


def our_add_rms_norm(x: Tensor, weight: Tensor, residual: Tensor, dropout_p: float = 0.0) -> Any:
    return rms_norm(x, weight, residual=residual, prenorm=True, dropout_p=dropout_p)


def our_dropout_add_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Any:
    return layer_norm(x, weight, bias, residual=residual, prenorm=True, dropout_p=DROPOUT_P)


@dataclass(frozen=True)
class Operation:
    """The contestants' calls, what they take after x and weight, and the activations that each direction moves."""

    ours: Call
    torch: Call
    bias: bool
    residual: bool
    forward_activations: int
    backward_activations: int
    dropout: bool = False


OPERATIONS = {
    "rms_norm": Operation(rms_norm, torch_rms_norm, False, False, 2, 3),
    "layer_norm": Operation(layer_norm, torch_layer_norm, True, False, 2, 3),
    "add + rms_norm": Operation(our_add_rms_norm, torch_add_rms_norm, False, True, 4, 4),
    "dropout + add + rms_norm": Operation(
        partial(our_add_rms_norm, dropout_p=DROPOUT_P), torch_dropout_add_rms_norm, False, True, 4, 5, True
    ),
    "dropout + add + layer_norm": Operation(
        our_dropout_add_layer_norm, torch_dropout_add_layer_norm, True, True, 4, 5, True
    ),
}


def quack_calls() -> dict[str, Call]:
    """Quack's operations, if it is installed."""
    try:
        from quack import rmsnorm
    except ImportError:
        return {}
    return {
        "rms_norm": lambda x, weight: rmsnorm(x, weight, eps=EPS),
        "add + rms_norm": lambda x, weight, residual: rmsnorm(
            x, weight, residual=residual, eps=EPS, prenorm=True
        ),
    }


def liger_calls() -> dict[str, Call]:
    """Liger's operations, if it is installed; not in place, since backward runs again and again."""
    try:
        from liger_kernel.transformers.functional import liger_layer_norm, liger_rms_norm
    except ImportError:
        return {}
    calls: dict[str, Call] = {
        "rms_norm": lambda x, weight: liger_rms_norm(x, weight, EPS, in_place=False),
        "layer_norm": lambda x, weight, bias: liger_layer_norm(x, weight, bias, EPS),
    }
    try:
        from liger_kernel.transformers.functional import liger_fused_add_rms_norm
    except ImportError:
        return calls
    return calls | {
        "add + rms_norm": lambda x, weight, residual: liger_fused_add_rms_norm(
            x, residual, weight, EPS, in_place=False
        )
    }


def takes(call: Call, inputs: list[Tensor]) -> bool:
    """Whether a peer runs here, forward and backward: some hidden sizes and GPUs are refused."""
    try:
        outputs = call(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.backward(outputs, [torch.zeros_like(out) for out in outputs])
        torch.cuda.synchronize()
    except Exception as error:
        print(f"a peer is left out: {type(error).__name__}: {str(error)[:200]}", flush=True)
        return False
    return True


def make_case(name: str, hidden_size: int) -> Case:
    operation = OPERATIONS[name]

    def inputs(rows: int = ELEMENTS // hidden_size) -> list[Tensor]:
        shapes = [(rows, hidden_size), (hidden_size,)]
        shapes += [(hidden_size,)] if operation.bias else []
        shapes += [(rows, hidden_size)] if operation.residual else []
        return [torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_() for shape in shapes]

    contestants = {
        "ours": operation.ours,
        "torch": operation.torch,
        "torch.compile": torch.compile(operation.torch, dynamic=False),
    }
    for peer, calls in (("Quack", quack_calls()), ("Liger", liger_calls())):
        if name in calls and takes(calls[name], inputs(rows=256)):
            contestants[peer] = calls[name]
    activation_bytes = 2 * ELEMENTS
    return Case(
        {
            "operation": name,
            "dtype": "bfloat16",
            "rows": ELEMENTS // hidden_size,
            "hidden_size": hidden_size,
        },
        inputs,
        contestants,
        forward_bytes=activation_bytes * operation.forward_activations,
        backward_bytes=activation_bytes * operation.backward_activations,
        draws_at_random=operation.dropout,
    )


def cases(quick: bool) -> list[Callable[[], Case]]:
    sizes = [4096] if quick else [1024, 2048, 4096, 8192, 16384]
    return [partial(make_case, name, size) for name in OPERATIONS for size in sizes]


if __name__ == "__main__":
    run("norm", __doc__.splitlines()[0], cases)

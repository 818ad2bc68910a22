"""Self-test, ``python -m flash_attn_ops``: exit code 0 if every operation computes what it should here."""

from __future__ import annotations

import argparse
import importlib.util
import platform
import sys
from collections.abc import Callable

import torch
from torch import Tensor

import flash_attn_ops
from flash_attn_ops.activations import gelu, swiglu
from flash_attn_ops.attention import explain as explain_attention
from flash_attn_ops.attention import flash_attn_func
from flash_attn_ops.cross_entropy import cross_entropy
from flash_attn_ops.dispatch import explain
from flash_attn_ops.fused_dense import mlp
from flash_attn_ops.linear_cross_entropy import linear_cross_entropy
from flash_attn_ops.norm import layer_norm, rms_norm
from flash_attn_ops.rotary import RotaryEmbedding


def _attention(x: Tensor, weight: Tensor) -> Tensor:
    heads = (x * weight).unflatten(-1, (2, 64))
    return flash_attn_func(heads, heads, heads, causal=True)


def _rotary(x: Tensor, weight: Tensor) -> Tensor:
    heads = (x * weight).unflatten(-1, (2, 64))
    return torch.cat(RotaryEmbedding(32)(heads, heads, 5), dim=-1)


def _cross_entropy(x: Tensor, weight: Tensor) -> Tensor:
    labels = torch.arange(x.shape[0] * x.shape[1], device=x.device).view(x.shape[:2])
    return cross_entropy(x * weight, labels, label_smoothing=0.1, z_loss=1e-3, reduction="none")


def _layer_norm(x: Tensor, weight: Tensor) -> Tensor:
    out, total = layer_norm(x, weight, weight, residual=x, prenorm=True)
    return torch.cat((out, total), dim=-1)


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    out, total = rms_norm(x, weight, residual=x, prenorm=True)
    return torch.cat((out, total), dim=-1)


def _linear_cross_entropy(x: Tensor, weight: Tensor) -> Tensor:
    labels = torch.arange(x.shape[0] * x.shape[1], device=x.device).view(x.shape[:2])
    losses = linear_cross_entropy(x, torch.outer(weight, weight) / 8, labels, reduction="none")
    assert isinstance(losses, Tensor)  # no z-loss was asked for
    return losses


def _activations(x: Tensor, weight: Tensor) -> Tensor:
    return torch.cat((gelu(x * weight), swiglu(x * weight, order="gate_value")), dim=-1)


def _mlp(x: Tensor, weight: Tensor) -> Tensor:
    square = torch.outer(weight, weight) / weight.numel()
    out = mlp(x, square, square, weight, weight, activation="squared_relu")
    assert isinstance(out, Tensor)  # no residual was asked for
    return out


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "attention": _attention,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "rotary": _rotary,
    "cross_entropy": _cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy,
    "activations": _activations,
    "mlp": _mlp,
}


def main() -> int:
    """Run every operation, forward and backward, on the GPU if there is one; print; return the exit code."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"flash-attn-ops {flash_attn_ops.__version__}, torch {torch.__version__}, {_triton_version()}")
    print(f"Python {platform.python_version()}")
    print(f"device: {torch.cuda.get_device_name() if device.type == 'cuda' else 'cpu'}")
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 40, 128, generator=generator), torch.randn(128, generator=generator)
    passed = True
    for name, operation in OPERATIONS.items():
        in_bf16 = name == "attention" and device.type == "cuda"  # which is what the CUDA kernels take
        dtype, tolerance = (torch.bfloat16, 3e-2) if in_bf16 else (torch.float32, 1e-5)
        given = x.to(device, dtype), weight.to(device, dtype)
        error = _relative_error(operation, *given)
        ok = error < tolerance
        passed = passed and ok
        print(f"{name}: {'ok' if ok else 'FAILED'}, relative error {error:.1e}; {_path(name, given[0])}")
    return 0 if passed else 1


def _relative_error(operation: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor) -> float:
    """The larger error of output and gradients, by norm, against the same operation in float64 on the CPU."""
    results = []
    for tensors in ((x, weight), (x.cpu().double(), weight.cpu().double())):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        out = operation(*leaves)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        out.backward(upstream.to(out))
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    errors = [
        ((actual.cpu().double() - exact).norm() / exact.norm()).item()
        for actual, exact in zip(*results, strict=True)
    ]
    return float("inf") if any(error != error for error in errors) else max(errors)


def _path(name: str, x: Tensor) -> str:
    if name == "attention":
        heads = x.unflatten(-1, (2, 64))
        return str(explain_attention(heads, heads, heads, causal=True))
    choice = explain(x)
    return f"{choice.path} path: {choice.reason}"


def _triton_version() -> str:
    if importlib.util.find_spec("triton") is None:
        return "no triton"
    import triton

    return f"triton {triton.__version__}"


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m flash_attn_ops", description=__doc__).parse_args()
    sys.exit(main())

"""Every kernel, with the arguments its launcher gives it, through Triton's compiler to machine code for an H100.

No GPU is needed. The interpreter accepts programs that the compiler rejects; this is the check that is left.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from flash_attn_ops import dispatch
from flash_attn_ops.cross_entropy import cross_entropy
from flash_attn_ops.norm import layer_norm, rms_norm
from flash_attn_ops.rotary import apply_rotary_emb

pytest.importorskip("triton", reason="needs Triton, which is not installed")
if dispatch.TRITON_INTERPRETS:
    pytest.skip("kernels that are interpreted cannot be compiled", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

H100 = GPUTarget("cuda", 90, 32)
MULTIPROCESSORS, SHARED_MEMORY_BYTES, PROGRAM_SHARED_MEMORY_BYTES = 132, 233472, 232448
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
BF16, FP32 = torch.bfloat16, torch.float32


def compile_launch(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
    """What a launch would compile: the same types, constants and divisibilities as Triton derives."""
    assert all(0 < size < limit for size, limit in zip(grid, (2**31, 65536), strict=False)), grid
    options = {name: kwargs.pop(name) for name in ("num_warps",) if name in kwargs}
    values = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
    assert set(values) == set(kernel.arg_names)
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value, fixed = values[parameter.name], parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not fixed):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not fixed:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=H100, options=options)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Launches compile, by kernel name, and run nothing; CPU tensors stand in for tensors of an H100."""
    kernels: dict[str, Any] = {}

    def run(kernel: JITFunction, *args: Any, **kwargs: Any) -> None:
        kernels[kernel.__name__] = compile_launch(kernel, *args, **kwargs)

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(dispatch, "TRITON_INTERPRETS", True)
    norm_kernels = importlib.import_module("flash_attn_ops.norm.triton_kernels")
    monkeypatch.setattr(norm_kernels, "device_limits", lambda _: (MULTIPROCESSORS, SHARED_MEMORY_BYTES))
    yield kernels
    for name, kernel in kernels.items():
        assert kernel.asm["cubin"], name
        shared = kernel.metadata.shared
        assert shared <= PROGRAM_SHARED_MEMORY_BYTES, f"{name}: {shared} bytes of shared memory"


def backward(*outputs: torch.Tensor) -> None:
    torch.autograd.backward(outputs, [torch.empty_like(out) for out in outputs])


@pytest.mark.parametrize("hidden_size", [100, 4096, 16384, 40000])
@pytest.mark.parametrize("norm", [layer_norm, rms_norm], ids=lambda norm: norm.__name__)
def test_norm(norm: Any, hidden_size: int, compiled: dict[str, Any]) -> None:
    x, weight, bias = (
        torch.empty(shape, dtype=BF16, requires_grad=True)
        for shape in ((64, hidden_size), hidden_size, hidden_size)
    )
    backward(norm(x, weight, bias if norm is layer_norm else None))
    assert "_add_partials" in compiled and len(compiled) == (4 if hidden_size == 40000 else 3)


@pytest.mark.parametrize(
    ("hidden_size", "dtypes"),
    [(1024, (BF16, BF16, BF16)), (8192, (BF16, FP32, FP32)), (16384, (FP32, FP32, FP32))],
    ids=str,
)
def test_norm_with_residual(hidden_size: int, dtypes: tuple, compiled: dict[str, Any]) -> None:
    x_dtype, weight_dtype, residual_dtype = dtypes
    x = torch.empty(64, hidden_size, dtype=x_dtype, requires_grad=True)
    weight = torch.empty(hidden_size, dtype=weight_dtype, requires_grad=True)
    residual = torch.empty(64, hidden_size, dtype=residual_dtype, requires_grad=True)
    backward(*rms_norm(x, weight, residual=residual, prenorm=True))
    assert len(compiled) == 3


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(128, 128), (80, 20)])
def test_rotary(interleaved: bool, head_dim: int, rotary_dim: int, compiled: dict[str, Any]) -> None:
    x, table = (
        torch.empty(2, 64, 33, head_dim, dtype=BF16, requires_grad=True),
        torch.empty(99, rotary_dim // 2),
    )
    backward(apply_rotary_emb(x, table, table, interleaved, seqlen_offsets=torch.zeros(2, dtype=torch.int32)))
    packed = torch.empty(64, 3, head_dim, dtype=FP32)
    apply_rotary_emb(packed, table, table, interleaved, inplace=True, cu_seqlens=torch.tensor([0, 9, 64]))
    assert list(compiled) == ["_rotate"]


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("classes", [1000, 131072])
def test_cross_entropy(dtype: torch.dtype, classes: int, compiled: dict[str, Any]) -> None:
    logits = torch.empty(16, classes, dtype=dtype, requires_grad=True)
    labels = torch.zeros(16, dtype=torch.int64)
    cross_entropy(logits, labels, label_smoothing=0.1, inplace_backward=True).backward()
    cross_entropy(logits, labels, reduction="none").sum().backward()
    assert sorted(compiled) == ["_backward", "_forward"]

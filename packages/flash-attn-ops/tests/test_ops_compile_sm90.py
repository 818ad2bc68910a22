"""Every kernel, with the arguments its launcher gives it, through Triton's compiler to machine code for an H100.

No GPU is needed. The interpreter accepts programs that the compiler rejects; this is the check that is left.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from flash_attn_ops import dispatch
from flash_attn_ops.cross_entropy import cross_entropy
from flash_attn_ops.norm import layer_norm, rms_norm, tiles
from flash_attn_ops.rotary import apply_rotary_emb, apply_rotary_emb_qk

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
    torch.bool: "*i1",
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
    few_rows_tile = tiles.backward_tile_of_few_rows.__wrapped__  # which remembers nothing
    monkeypatch.setattr(tiles, "backward_tile_of_few_rows", few_rows_tile)
    monkeypatch.setattr(tiles, "MAX_VALUES_OF_ONE_PROGRAM", 0)  # 64 rows stand for many
    monkeypatch.setattr(norm_kernels, "device_limits", lambda _: (MULTIPROCESSORS, SHARED_MEMORY_BYTES))
    yield kernels
    for name, kernel in kernels.items():
        assert kernel.asm["cubin"], name
        shared = kernel.metadata.shared
        assert shared <= PROGRAM_SHARED_MEMORY_BYTES, f"{name}: {shared} bytes of shared memory"


def stack_bytes(kernel: Any) -> int:
    """Bytes of registers that each thread spills."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    return int(re.findall(r"STACK:(\d+)", usage.stdout + usage.stderr)[0])


def assert_vectorised(kernel: Any, *, loads: int, stores: bool = True) -> None:
    """The PTX moves 16 bytes an instruction: ``loads`` such loads at least, and a store."""
    ptx = kernel.asm["ptx"]
    assert len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)) >= loads, ptx
    assert not stores or re.search(r"st\.global\S*\.v4\.b32", ptx), ptx


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


@pytest.mark.parametrize("hidden_size", [1024, 4096, 8192, 16384])
@pytest.mark.parametrize("norm", [layer_norm, rms_norm], ids=lambda norm: norm.__name__)
def test_norm_with_residual_and_dropout(norm: Any, hidden_size: int, compiled: dict[str, Any]) -> None:
    """Registers hold what the kernels want of them, and decisions of dropout are made where they are needed."""
    x, residual = (torch.empty(64, hidden_size, dtype=BF16, requires_grad=True) for _ in range(2))
    weight, bias = (torch.empty(hidden_size, dtype=BF16, requires_grad=True) for _ in range(2))
    shift = bias if norm is layer_norm else None
    for options in ({}, {"residual": residual, "dropout_p": 0.1}):
        backward(*norm(x, weight, shift, prenorm=True, **options)[: 1 + bool(options)])
        forward, spilled = compiled["_forward"], stack_bytes(compiled["_backward"])
        assert stack_bytes(forward) == 0
        assert spilled <= (0 if hidden_size <= 8192 else 256), spilled
        assert forward.metadata.shared <= 128, "the row sums are all that threads exchange"
        assert_vectorised(forward, loads=1 + len(options))


@pytest.mark.parametrize("hidden_size", [2048, 8192, 40000])
@pytest.mark.parametrize("norm", [layer_norm, rms_norm], ids=lambda norm: norm.__name__)
def test_norm_with_everything(norm: Any, hidden_size: int, compiled: dict[str, Any]) -> None:
    x, x1, residual = (torch.empty(64, hidden_size, dtype=BF16, requires_grad=True) for _ in range(3))
    weight, bias, weight1, bias1, layerscale = (
        torch.empty(hidden_size, dtype=BF16, requires_grad=True) for _ in range(5)
    )
    outputs = norm(
        x,
        weight,
        bias,
        residual=residual,
        x1=x1,
        weight1=weight1,
        bias1=bias1,
        layerscale=layerscale,
        rowscale=torch.empty(64),
        dropout_p=0.1,
        prenorm=True,
        zero_centered_weight=True,
        return_dropout_mask=True,
    )
    backward(*outputs[:3])
    assert len(compiled) == (4 if hidden_size == 2048 else 5)


@pytest.mark.parametrize("hidden_size", [100, 1024, 4096, 8192])
@pytest.mark.parametrize("norm", [layer_norm, rms_norm], ids=lambda norm: norm.__name__)
def test_norm_of_few_rows(
    norm: Any, hidden_size: int, compiled: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One launch backward, whose program finds room in the registers for all its sums."""
    monkeypatch.setattr(tiles, "MAX_VALUES_OF_ONE_PROGRAM", 65536)
    x, residual = (torch.empty(65536 // 8192, hidden_size, dtype=BF16, requires_grad=True) for _ in range(2))
    weight, bias = (torch.empty(hidden_size, dtype=BF16, requires_grad=True) for _ in range(2))
    backward(*norm(x, weight, bias if norm is layer_norm else None, residual=residual, prenorm=True))
    assert sorted(compiled) == ["_backward", "_forward"] and stack_bytes(compiled["_backward"]) == 0


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


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_of_queries_and_keys(interleaved: bool, compiled: dict[str, Any]) -> None:
    q, k = (torch.empty(2, 64, heads, 128, dtype=BF16, requires_grad=True) for heads in (32, 8))
    tables = torch.empty(4, 99, 64)
    backward(*apply_rotary_emb_qk(q, k, *tables, interleaved))
    assert list(compiled) == ["_rotate"]
    assert stack_bytes(compiled["_rotate"]) == 0
    assert_vectorised(compiled["_rotate"], loads=2)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("classes", [1000, 50257, 131072])
def test_cross_entropy(dtype: torch.dtype, classes: int, compiled: dict[str, Any]) -> None:
    """Rows that begin anywhere are read and written 16 bytes at a time too."""
    logits = torch.empty(16, classes, dtype=dtype, requires_grad=True)
    labels = torch.zeros(16, dtype=torch.int64)
    cross_entropy(logits, labels, label_smoothing=0.1, inplace_backward=True).backward()
    cross_entropy(logits, labels, reduction="none").sum().backward()
    assert sorted(compiled) == ["_d_logits", "_losses", "_mean"]
    for kernel in compiled.values():
        assert stack_bytes(kernel) == 0
    assert_vectorised(compiled["_d_logits"], loads=1)
    assert_vectorised(compiled["_losses"], loads=1, stores=False)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_cross_entropy_with_given_log_sum_exp(label_smoothing: float, compiled: dict[str, Any]) -> None:
    from flash_attn_ops.cross_entropy import operators

    logits, labels = torch.empty(16, 1000, dtype=BF16), torch.zeros(16, dtype=torch.int64)
    options = (label_smoothing, 0.5, 1e-4, -100, 0, 990)
    operators.losses(logits, labels, torch.empty(16), *options)
    operators.statistics(logits, labels, torch.empty(16), *options)
    assert sorted(compiled) == ["_losses", "_statistics"]


@pytest.mark.parametrize("classes", [32000, 50257, 131072])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_losses_with_their_gradient(classes: int, dtype: torch.dtype, compiled: dict[str, Any]) -> None:
    from flash_attn_ops.cross_entropy import triton_kernels
    from flash_attn_ops.cross_entropy.options import Options

    options = Options(0.1, 1.0, 1e-4, -100, 0, classes)
    labels = torch.zeros(16, dtype=torch.int64)
    for d_loss in (None, torch.empty(())):
        triton_kernels.losses_and_gradient_(torch.empty(16, classes, dtype=dtype), labels, options, d_loss)
        assert list(compiled) == ["_losses"] and stack_bytes(compiled["_losses"]) == 0
        assert_vectorised(compiled["_losses"], loads=2)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_multiplying_in_place(dtype: torch.dtype, compiled: dict[str, Any]) -> None:
    from flash_attn_ops.linear_cross_entropy import triton_kernels

    for size in (50257 * 64, 2**31 + 16):
        triton_kernels.multiply_(torch.empty(size, dtype=dtype, device="meta"), torch.empty(()))
        assert list(compiled) == ["_multiply"] and stack_bytes(compiled["_multiply"]) == 0
        assert_vectorised(compiled["_multiply"], loads=2)


def test_cross_entropy_of_a_shard(compiled: dict[str, Any]) -> None:
    from flash_attn_ops.cross_entropy import operators

    options = (0.1, 1.0, 1e-4, -100, 50257, 150770)
    operators.statistics(
        torch.empty(16, 50257, dtype=BF16), torch.zeros(16, dtype=torch.int64), None, *options
    )
    assert list(compiled) == ["_statistics"] and stack_bytes(compiled["_statistics"]) == 0


@pytest.mark.parametrize(
    ("form", "activation"),
    [
        *(("plain", name) for name in ("gelu", "gelu_tanh", "relu", "squared_relu", "sigmoid")),
        *(("bias", "gelu_tanh"), ("packed", "silu"), ("packed", "gelu")),
    ],
)
def test_activations(
    form: str, activation: str, compiled: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with the sums for a bias and the activation once more, as dense layers ask for."""
    from flash_attn_ops.activations import operators

    kernels = importlib.import_module("flash_attn_ops.activations.triton_kernels")
    monkeypatch.setattr(kernels, "device_limits", lambda _: (MULTIPROCESSORS, SHARED_MEMORY_BYTES))
    x, packed = (torch.empty(4096, size, dtype=BF16) for size in (11008, 2 * 11008))
    bias = torch.empty(11008, dtype=BF16) if form == "bias" else None
    gate, value = (packed[:, :11008], packed[:, 11008:]) if form == "packed" else (x, None)
    order = "gate_value" if form == "packed" else None
    operators.forward(gate, bias, value, activation)
    for bias_dtype, with_out in ((None, False), (BF16, False), (BF16, True)):
        operators.backward(x, gate, bias, value, activation, order, bias_dtype, with_out)
        assert stack_bytes(compiled["_backward"]) == 0
        assert_vectorised(compiled["_backward"], loads=2)
    assert sorted(compiled) == ["_backward", "_forward"] and stack_bytes(compiled["_forward"]) == 0
    assert_vectorised(compiled["_forward"], loads=1)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_column_sums(dtype: torch.dtype, compiled: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = importlib.import_module("flash_attn_ops.fused_dense.triton_kernels")
    monkeypatch.setattr(kernels, "device_limits", lambda _: (MULTIPROCESSORS, SHARED_MEMORY_BYTES))
    kernels.column_sums(torch.empty(16384, 4096, dtype=dtype))
    assert list(compiled) == ["_column_sums"] and stack_bytes(compiled["_column_sums"]) == 0
    assert_vectorised(compiled["_column_sums"], loads=2, stores=False)

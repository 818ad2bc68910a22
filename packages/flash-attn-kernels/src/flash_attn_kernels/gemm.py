"""Matrix products of which bias, activation and their gradients are the epilogue, by cuBLASLt: for fused dense layers.

The operator ``torch.ops.flash_attn_kernels.gemm_epilogue`` multiplies matrices (M, K) and (K, N), row-major or
transposed, in float16 or bfloat16 with sums in float32. cuBLASLt is taken at run time from the libraries that torch
brings. :func:`why_not` says, from sizes and dtype alone, when an epilogue cannot be used; the functions here do not ask
it. GELU is the tanh approximation, the only one that cuBLASLt has.
"""

from __future__ import annotations

import enum
import functools
from typing import Any, Literal

import torch
from torch import Tensor

from . import library
from .tracing import constant_under_compile

Activation = Literal["relu", "gelu_tanh"]
FASTEST = -1  # as an algorithm: the candidate that a timing finds, once for each problem
KERNEL_DTYPES = (torch.float16, torch.bfloat16)
SIZE_MULTIPLE = 8  # of K and N: rows are then 16-byte aligned
MASK_MULTIPLE = 128  # of the columns of a bit mask
MAX_SIZE = 2**31 - 1


class Epilogue(enum.IntEnum):
    """What is done to the product, or beside it; the numbers are cuBLASLt's."""

    NONE = 1
    BIAS = 4
    RELU_BIAS = 6
    RELU_AUX_BIAS = 134  # extra result: bit mask (M, N / 8) uint8
    GELU_BIAS = 36
    GELU_AUX_BIAS = 164  # extra result: pre-activation (M, N)
    RELU_GRADIENT = 136  # aux: the bit mask
    RELU_BIAS_GRADIENT = 152  # likewise; extra result: sums of the result over its rows (N,)
    GELU_GRADIENT = 192  # aux: the pre-activation
    GELU_BIAS_GRADIENT = 208
    BIAS_GRADIENT = 512  # extra result: sums over its columns (M,) of an a that is transposed in memory


WRITES_MASK = (Epilogue.RELU_AUX_BIAS,)
READS_MASK = (Epilogue.RELU_GRADIENT, Epilogue.RELU_BIAS_GRADIENT)
SUMS_RESULT = (Epilogue.RELU_BIAS_GRADIENT, Epilogue.GELU_BIAS_GRADIENT)

_FORWARD = {
    ("relu", False): Epilogue.RELU_BIAS,
    ("relu", True): Epilogue.RELU_AUX_BIAS,
    ("gelu_tanh", False): Epilogue.GELU_BIAS,
    ("gelu_tanh", True): Epilogue.GELU_AUX_BIAS,
}
_BACKWARD = {
    ("relu", False): Epilogue.RELU_GRADIENT,
    ("relu", True): Epilogue.RELU_BIAS_GRADIENT,
    ("gelu_tanh", False): Epilogue.GELU_GRADIENT,
    ("gelu_tanh", True): Epilogue.GELU_BIAS_GRADIENT,
}


def why_not(epilogue: Epilogue, m: int, n: int, k: int, dtype: torch.dtype, device_type: str) -> str | None:
    """Why (m, k) times (k, n) with this epilogue is not for the operator; None where it is."""
    if device_type != "cuda":
        return f"tensors are on {device_type}, cuBLASLt needs an NVIDIA GPU"
    if dtype not in KERNEL_DTYPES:
        return f"dtype {dtype} is neither float16 nor bfloat16"
    if m == 0 or n == 0 or k == 0:
        return "a size is 0"
    if m > MAX_SIZE or n > MAX_SIZE or k > MAX_SIZE:
        return "a size is not below 2^31"
    if n % SIZE_MULTIPLE != 0 or (k % SIZE_MULTIPLE != 0 and epilogue is not Epilogue.BIAS_GRADIENT):
        return f"a hidden size is not a multiple of {SIZE_MULTIPLE}"
    if epilogue is Epilogue.BIAS_GRADIENT and m % SIZE_MULTIPLE != 0:  # both factors lie along k = tokens
        return f"a hidden size is not a multiple of {SIZE_MULTIPLE}"
    if (epilogue in WRITES_MASK or epilogue in READS_MASK) and n % MASK_MULTIPLE != 0:
        return f"the width of a bit mask is not a multiple of {MASK_MULTIPLE}"
    return load_error()


@constant_under_compile
def load_error() -> str | None:
    """Loads the operators once; None when they and cuBLASLt are there, otherwise the reason why not."""
    return _load()


@functools.cache
def _load() -> str | None:
    error = library.load_error()
    if error is not None:
        return error
    if not hasattr(torch.ops.flash_attn_kernels, "gemm_epilogue"):
        return library.OLDER_THAN_THE_PACKAGE
    _register_fake()
    if torch.ops.flash_attn_kernels.gemm_cublaslt_version() == 0:
        return "cuBLASLt was not found: looked for libcublasLt.so.13, libcublasLt.so.12"
    return None


@functools.cache
def _register_fake() -> None:
    torch.library.register_fake("flash_attn_kernels::gemm_epilogue", _fake_gemm_epilogue)


def _fake_gemm_epilogue(
    a: Tensor, b: Tensor, bias: Tensor | None, aux: Tensor | None, epilogue: int, algorithm: int
) -> tuple[Tensor, Tensor]:
    m, n = a.shape[0], b.shape[1]
    if epilogue == Epilogue.RELU_AUX_BIAS:
        extra = a.new_empty((m, n // 8), dtype=torch.uint8)
    elif epilogue == Epilogue.GELU_AUX_BIAS:
        extra = a.new_empty((m, n))
    elif epilogue in SUMS_RESULT:
        extra = a.new_empty(n)
    else:
        extra = a.new_empty(m if epilogue == Epilogue.BIAS_GRADIENT else 0)
    return a.new_empty((m, n)), extra


def matmul(a: Tensor, b: Tensor, *, algorithm: int = 0) -> Tensor:
    """``a b``, (M, N), of a (M, K) and b (K, N), both float16 or both bfloat16, on one GPU, row-major or transposed.

    ``algorithm`` is one of cuBLASLt's candidates, or ``FASTEST``. Errors as :func:`linear_act`.
    """
    out: Tensor = _call(a, b, None, None, Epilogue.NONE, algorithm)[0]
    return out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, algorithm: int = 0) -> Tensor:
    """``x weight' + bias``, (M, N), of x (M, K), weight (N, K) and bias (N,). Otherwise as :func:`matmul`."""
    epilogue = Epilogue.NONE if bias is None else Epilogue.BIAS
    out: Tensor = _call(x, weight.t(), bias, None, epilogue, algorithm)[0]
    return out


def linear_act(
    x: Tensor, weight: Tensor, bias: Tensor, activation: Activation, *, save: bool, algorithm: int = 0
) -> tuple[Tensor, Tensor | None]:
    """``(activation(x weight' + bias), saved)``.

    Args:
        x: (M, K), weight: (N, K), bias: (N,), all float16 or all bfloat16, on one GPU.
        save: also store what :func:`act_gradient` needs: for relu a bit mask (M, N / 8) uint8, for gelu_tanh the
            pre-activation (M, N).
        algorithm: which of cuBLASLt's candidates, or ``FASTEST``.

    Raises:
        RuntimeError: sizes that the epilogue cannot take (ask :func:`why_not`), no such candidate, no cuBLASLt.
    """
    out, saved = _call(x, weight.t(), bias, None, _FORWARD[activation, save], algorithm)
    return out, saved if save else None


def act_gradient(
    d_out: Tensor,
    weight: Tensor,
    saved: Tensor,
    activation: Activation,
    *,
    bias_gradient: bool,
    algorithm: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """``(d_pre, d_bias)``: the gradient d_out (M, N) of ``act weight'``, through the activation that made act (M, K).

    weight is (N, K), ``saved`` from :func:`linear_act`. d_bias (K,), the sums of d_pre (M, K) over rows, if asked for.
    Errors as there.
    """
    d_pre, d_bias = _call(d_out, weight, None, saved, _BACKWARD[activation, bias_gradient], algorithm)
    return d_pre, d_bias if bias_gradient else None


def weight_and_bias_gradient(d_out: Tensor, x: Tensor, *, algorithm: int = 0) -> tuple[Tensor, Tensor]:
    """``(d_out' x, sums of d_out over rows)``, (N, K) and (N,), of d_out (M, N) and x (M, K). Errors as there."""
    # cuBLASLt sums along the contiguous dimension of its factor alone.
    return _call(d_out.contiguous().t(), x, None, None, Epilogue.BIAS_GRADIENT, algorithm)


def candidates(a: Tensor, b: Tensor, bias: Tensor | None, aux: Tensor | None, epilogue: Epilogue) -> int:
    """How many algorithms cuBLASLt proposes for this call of the operator."""
    _require()
    return int(torch.ops.flash_attn_kernels.gemm_candidates(a, b, bias, aux, int(epilogue)))


def _call(
    a: Tensor, b: Tensor, bias: Tensor | None, aux: Tensor | None, epilogue: Epilogue, algorithm: int
) -> Any:
    _require()
    return torch.ops.flash_attn_kernels.gemm_epilogue(a, b, bias, aux, epilogue.value, algorithm)


def _require() -> None:
    error = load_error()
    if error is not None:
        raise RuntimeError(f"gemm: {error}")

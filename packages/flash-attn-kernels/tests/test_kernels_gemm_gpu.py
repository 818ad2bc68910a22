"""Matrix products with epilogues on a GPU, against float64, with torch's own product in the same dtype beside them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from flash_attn_kernels import gemm
from flash_attn_kernels.gemm import Epilogue
from flash_attn_kernels.testing import assert_within_reference_error
from torch import Tensor

pytestmark = pytest.mark.gpu

BF16, FP16, FP64 = torch.bfloat16, torch.float16, torch.float64
ACTIVATE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
SHAPES = [(256, 384, 512), (1000, 1152, 520), (1, 128, 64), (4099, 2048, 1024)]  # tokens, out, in


@pytest.fixture(autouse=True)
def operators_are_there() -> None:
    assert gemm.load_error() is None


def randn(*shape: int, dtype: torch.dtype = BF16, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device="cuda") * scale).to(dtype)


def by_dtype(function: Callable[..., Tensor], *tensors: Tensor) -> tuple[Tensor, Tensor]:
    """In float64, and in the dtype of the tensors."""
    return function(*(tensor.to(FP64) for tensor in tensors)), function(*tensors)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu_tanh"])
@pytest.mark.parametrize("algorithm", [0, gemm.FASTEST])
def test_forward_and_backward(
    activation: gemm.Activation, dtype: torch.dtype, shape: tuple[int, int, int], algorithm: int
) -> None:
    m, n, k = shape
    x, weight, bias = randn(m, k, dtype=dtype), randn(n, k, dtype=dtype, scale=k**-0.5), randn(n, dtype=dtype)
    exact, same = by_dtype(lambda *t: ACTIVATE[activation](F.linear(*t)), x, weight, bias)
    out, saved = gemm.linear_act(x, weight, bias, activation, save=True, algorithm=algorithm)
    assert_within_reference_error(out, exact, same)
    alone, nothing = gemm.linear_act(x, weight, bias, activation, save=False, algorithm=algorithm)
    assert nothing is None
    assert_within_reference_error(alone, exact, same)
    pre_exact, pre_same = by_dtype(F.linear, x, weight, bias)
    if activation == "gelu_tanh":
        assert_within_reference_error(saved, pre_exact, pre_same)
        pre = saved
    else:
        assert saved.shape == (m, n // 8) and saved.dtype == torch.uint8
        pre = out  # above 0 where the mask is set

    d_out, weight2 = randn(m, 256, dtype=dtype), randn(256, n, dtype=dtype, scale=1 / 16)
    if activation == "relu":  # whose derivative at 0 is anyone's choice, and one of eight million sums is 0
        d_out[(pre_exact.abs() < 1e-5).any(dim=1)] = 0

    def gradient(d_out: Tensor, weight2: Tensor, pre: Tensor) -> Tensor:
        leaf = pre.detach().requires_grad_()
        (d_pre,) = torch.autograd.grad(ACTIVATE[activation](leaf), leaf, d_out @ weight2)
        return d_pre

    exact, same = by_dtype(gradient, d_out, weight2, pre)
    options = {"algorithm": algorithm}
    d_pre, d_bias = gemm.act_gradient(d_out, weight2, saved, activation, bias_gradient=True, **options)
    assert_within_reference_error(d_pre, exact, same, factor=3.0)
    assert_within_reference_error(d_bias, exact.sum(0), same.sum(0), factor=3.0)
    alone, nothing = gemm.act_gradient(d_out, weight2, saved, activation, bias_gradient=False, **options)
    assert nothing is None
    assert_within_reference_error(alone, exact, same, factor=3.0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_weight_and_bias_gradient(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    d_out, x = randn(m, n, dtype=dtype), randn(m, k, dtype=dtype)
    d_weight, d_bias = gemm.weight_and_bias_gradient(d_out, x)
    exact, same = by_dtype(lambda a, b: a.t() @ b, d_out, x)
    assert_within_reference_error(d_weight, exact, same)
    exact, same = by_dtype(lambda a: a.sum(0), d_out)
    assert_within_reference_error(d_bias, exact, same)


@pytest.mark.parametrize("algorithm", [0, gemm.FASTEST])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_plain_products(shape: tuple[int, int, int], algorithm: int) -> None:
    m, n, k = shape
    x, weight, bias = randn(m, k), randn(n, k), randn(n)
    for used in ((x, weight, bias), (x, weight)):
        exact, same = by_dtype(F.linear, *used)
        out = gemm.linear(x, weight, bias if len(used) == 3 else None, algorithm=algorithm)
        assert_within_reference_error(out, exact, same)
    exact, same = by_dtype(torch.mm, x, weight.t())
    assert_within_reference_error(gemm.matmul(x, weight.t(), algorithm=algorithm), exact, same)
    d_out = randn(m, n)
    exact, same = by_dtype(lambda a, b: a.t() @ b, d_out, x)
    assert_within_reference_error(gemm.matmul(d_out.t(), x, algorithm=algorithm), exact, same)


def layouts(rows: int, columns: int) -> dict[str, Tensor]:
    return {
        "dense": randn(rows, columns),
        "transposed": randn(columns, rows).t(),
        "padded": randn(rows, columns + 24)[:, 8:-16],
        "unaligned": randn(rows, columns + 1)[:, 1:],
        "strided": randn(rows, 2 * columns)[:, ::2],
        "expanded": randn(1, columns).expand(rows, columns),
    }


@pytest.mark.parametrize("name", list(layouts(8, 8)) if torch.cuda.is_available() else ["any"])
def test_layouts(name: str) -> None:
    a, b = layouts(72, 128)[name], layouts(128, 256)[name]
    call = torch.ops.flash_attn_kernels.gemm_epilogue
    exact, same = by_dtype(torch.mm, a, b)
    for first, second in ((a, b), (a.contiguous(), b), (a, b.contiguous())):
        out, _ = call(first, second, None, None, Epilogue.NONE.value, 0)
        assert_within_reference_error(out, exact, same)


@pytest.mark.parametrize("epilogue", Epilogue, ids=lambda epilogue: epilogue.name)
def test_operator_passes_torch_checks(epilogue: Epilogue) -> None:
    a, b = randn(72, 64), randn(64, 256)
    if epilogue is Epilogue.BIAS_GRADIENT:
        a = randn(64, 72).t()
    bias = randn(256) if "BIAS" in epilogue.name and "GRADIENT" not in epilogue.name else None
    aux = None
    if epilogue.name in ("RELU_GRADIENT", "RELU_BIAS_GRADIENT"):
        aux = torch.randint(0, 255, (72, 32), device="cuda", dtype=torch.uint8)
    elif epilogue.name in ("GELU_GRADIENT", "GELU_BIAS_GRADIENT"):
        aux = randn(72, 256)
    arguments = (a, b, bias, aux, epilogue.value, 0)
    torch.library.opcheck(torch.ops.flash_attn_kernels.gemm_epilogue.default, arguments)
    count = gemm.candidates(a, b, bias, aux, epilogue)
    assert count >= 1
    expected = torch.ops.flash_attn_kernels.gemm_epilogue(*arguments)
    for algorithm in range(count):
        out, extra = torch.ops.flash_attn_kernels.gemm_epilogue(*arguments[:-1], algorithm)
        for first, second in zip((out, extra), expected, strict=True):
            if first.dtype != torch.uint8:  # they add in other orders
                assert (first.double() - second.double()).norm() <= 1e-2 * second.double().norm()
    with pytest.raises(RuntimeError, match=rf"algorithm: got {count}; expected one below {count}"):
        torch.ops.flash_attn_kernels.gemm_epilogue(*arguments[:-1], count)


def test_nothing_leaks_into_the_library_handles() -> None:
    """Two threads and two streams at once give what one gives."""
    import threading

    x, weight, bias = randn(512, 256), randn(1024, 256), randn(1024)
    expected, _ = gemm.linear_act(x, weight, bias, "gelu_tanh", save=False)
    torch.cuda.synchronize()
    results: list[Tensor] = []

    def work() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                results.append(gemm.linear_act(x, weight, bias, "gelu_tanh", save=False)[0])
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 40 and all(torch.equal(result, expected) for result in results)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": lambda: randn(8, 64).float()}, "must be float16 or bfloat16"),
        ({"a": lambda: randn(8, 64, dtype=FP16)}, "both the same"),
        ({"a": lambda: randn(8, 32)}, r"must be \(M, K\) and \(K, N\)"),
        ({"a": lambda: randn(0, 64)}, "sizes must be in"),
        ({"b": lambda: randn(64, 100)}, "multiple of 8"),
        ({"b": lambda: randn(64, 264), "epilogue": Epilogue.RELU_AUX_BIAS}, "multiple of 128"),
        ({"bias": lambda: None}, "where the epilogue reads them"),
        ({"aux": lambda: randn(8, 256)}, "where the epilogue reads them"),
        ({"bias": lambda: randn(128)}, r"bias: must be \(N,\)"),
        ({"bias": lambda: randn(256, dtype=FP16)}, r"bias: must be \(N,\)"),
        ({"epilogue": 77}, "epilogue: got 77"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_direct_calls_are_checked(change: dict, message: str) -> None:
    made = {name: make() for name, make in change.items() if name != "epilogue"}
    given = {"a": randn(8, 64), "b": randn(64, 256), "bias": randn(256), "aux": None, **made}
    epilogue = int(change.get("epilogue", Epilogue.BIAS))
    with pytest.raises(RuntimeError, match=message):
        torch.ops.flash_attn_kernels.gemm_epilogue(*given.values(), epilogue, 0)

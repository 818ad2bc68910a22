"""Matrix products with epilogues, without a GPU: when they can be used, shapes of their results, what is missing."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess

import pytest
import torch
from flash_attn_kernels import gemm, library
from flash_attn_kernels.gemm import Epilogue, why_not
from torch._subclasses.fake_tensor import FakeTensorMode

BF16, FP16 = torch.bfloat16, torch.float16


def has_operators() -> bool:
    return library.load_error() is None and hasattr(torch.ops.flash_attn_kernels, "gemm_epilogue")


@pytest.fixture
def operators() -> None:
    if not has_operators():
        pytest.skip("no compiled library with these operators (build it with tools/build_ext.py)")
    gemm._register_fake()


@dataclasses.dataclass(frozen=True)
class Question:
    epilogue: Epilogue = Epilogue.GELU_AUX_BIAS
    m: int = 100
    n: int = 256
    k: int = 64
    dtype: torch.dtype = BF16
    device_type: str = "cuda"


@pytest.mark.parametrize(
    ("question", "reason"),
    [
        (Question(), None),
        (Question(m=99, dtype=FP16), None),
        (Question(n=264), None),
        (Question(Epilogue.RELU_AUX_BIAS), None),
        (Question(Epilogue.RELU_BIAS, n=264), None),
        (Question(Epilogue.BIAS_GRADIENT, m=256, n=64, k=99), None),
        (Question(Epilogue.RELU_AUX_BIAS, n=264), "bit mask is not a multiple of 128"),
        (Question(Epilogue.RELU_BIAS_GRADIENT, n=264), "bit mask"),
        (Question(Epilogue.RELU_GRADIENT, n=264), "bit mask"),
        (Question(n=260), "hidden size is not a multiple of 8"),
        (Question(k=60), "hidden size is not a multiple of 8"),
        (Question(Epilogue.BIAS_GRADIENT, m=255), "hidden size is not a multiple of 8"),
        (Question(Epilogue.BIAS_GRADIENT, n=255), "hidden size is not a multiple of 8"),
        (Question(m=0), "size is 0"),
        (Question(k=0), "size is 0"),
        (Question(m=2**31), r"not below 2\^31"),
        (Question(dtype=torch.float32), "torch.float32 is neither float16 nor bfloat16"),
        (Question(device_type="cpu"), "tensors are on cpu"),
    ],
    ids=str,
)
def test_why_not(question: Question, reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "load_error", lambda: None)
    answer = why_not(**{field.name: getattr(question, field.name) for field in dataclasses.fields(question)})
    if reason is None:
        assert answer is None
    else:
        import re

        assert answer is not None and re.search(reason, answer)


def test_missing_library_is_a_reason_then_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "load_error", lambda: "no compiled kernels")
    monkeypatch.setattr(gemm, "load_error", gemm._load.__wrapped__)
    assert why_not(**vars(Question())) == "no compiled kernels"
    x = torch.zeros(8, 8, dtype=BF16)
    for call in (
        lambda: gemm.linear_act(x, x, x[0], "relu", save=False),
        lambda: gemm.act_gradient(x, x, x, "gelu_tanh", bias_gradient=True),
        lambda: gemm.weight_and_bias_gradient(x, x),
        lambda: gemm.matmul(x, x),
        lambda: gemm.linear(x, x, None),
        lambda: gemm.candidates(x, x, None, None, Epilogue.NONE),
    ):
        with pytest.raises(RuntimeError, match="gemm: no compiled kernels"):
            call()


def test_epilogues_of_activations_are_named_alike() -> None:
    for activation in ("relu", "gelu_tanh"):
        prefix = activation.split("_")[0].upper()
        assert gemm._FORWARD[activation, True].name == f"{prefix}_AUX_BIAS"
        assert gemm._FORWARD[activation, False].name == f"{prefix}_BIAS"
        assert gemm._BACKWARD[activation, True].name == f"{prefix}_BIAS_GRADIENT"
        assert gemm._BACKWARD[activation, False].name == f"{prefix}_GRADIENT"


EXTRA = {
    Epilogue.NONE: ((0,), BF16),
    Epilogue.BIAS: ((0,), BF16),
    Epilogue.RELU_BIAS: ((0,), BF16),
    Epilogue.GELU_BIAS: ((0,), BF16),
    Epilogue.RELU_AUX_BIAS: ((24, 32), torch.uint8),
    Epilogue.GELU_AUX_BIAS: ((24, 256), BF16),
    Epilogue.RELU_GRADIENT: ((0,), BF16),
    Epilogue.GELU_GRADIENT: ((0,), BF16),
    Epilogue.RELU_BIAS_GRADIENT: ((256,), BF16),
    Epilogue.GELU_BIAS_GRADIENT: ((256,), BF16),
    Epilogue.BIAS_GRADIENT: ((24,), BF16),
}


def test_every_epilogue_has_a_shape_here() -> None:
    assert set(EXTRA) == set(Epilogue)


@pytest.mark.parametrize("epilogue", Epilogue, ids=lambda epilogue: epilogue.name)
def test_shapes(epilogue: Epilogue) -> None:
    a, b = torch.empty(24, 64, dtype=BF16), torch.empty(256, 64, dtype=BF16).t()
    out, extra = gemm._fake_gemm_epilogue(a, b, None, None, epilogue.value, 0)
    assert out.shape == (24, 256) and out.dtype == BF16 and out.is_contiguous()
    assert (tuple(extra.shape), extra.dtype) == EXTRA[epilogue]


def test_shapes_without_a_gpu(operators: None) -> None:
    with FakeTensorMode():
        a, b = (torch.empty(shape, dtype=BF16, device="cuda") for shape in ((24, 64), (64, 256)))
        bias = torch.empty(256, dtype=BF16, device="cuda")
        call = torch.ops.flash_attn_kernels.gemm_epilogue
        out, extra = call(a, b, bias, None, Epilogue.RELU_AUX_BIAS.value, -1)
        assert out.shape == (24, 256) and extra.shape == (24, 32) and extra.dtype == torch.uint8


def test_schema_and_fake_agree(operators: None) -> None:
    schema = torch.ops.flash_attn_kernels.gemm_epilogue.default._schema
    parameters = inspect.signature(gemm._fake_gemm_epilogue).parameters
    assert [argument.name for argument in schema.arguments] == list(parameters)
    assert not schema.is_mutable


def test_cpu_tensors_are_refused_by_the_operator(operators: None) -> None:
    x = torch.zeros(8, 8, dtype=BF16)
    with pytest.raises(NotImplementedError):
        torch.ops.flash_attn_kernels.gemm_epilogue(x, x, None, None, 1, 0)


def test_cublaslt_is_looked_for_where_there_may_be_none(operators: None) -> None:
    version = torch.ops.flash_attn_kernels.gemm_cublaslt_version()
    if torch.version.cuda is None:
        assert version == 0 or version >= 110000
        if version == 0:
            assert "libcublasLt.so.13" in gemm._load.__wrapped__()
    else:
        assert version >= 120000


def test_library_needs_no_cublaslt(operators: None) -> None:
    """It is taken at run time: a link to it would keep the library from loading elsewhere."""
    try:
        listed = subprocess.run(
            ["readelf", "-d", str(library.LIBRARY_PATH)], capture_output=True, text=True, check=True
        ).stdout
    except FileNotFoundError:
        pytest.skip("no readelf")
    assert "libtorch.so" in listed and "cublas" not in listed

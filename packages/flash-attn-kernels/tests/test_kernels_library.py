"""The compiled library in a torch without CUDA: it loads, and its operators have shapes for fake and meta tensors."""

from __future__ import annotations

import ctypes
import inspect
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flash_attn_kernels import library
from torch._subclasses.fake_tensor import FakeTensorMode

needs_library = pytest.mark.skipif(
    not library.LIBRARY_PATH.exists(), reason="no compiled library (build it with tools/build_ext.py)"
)

OPTIONS = (0.125, -1, 0, False)  # scale, window, top left
FAKES = {
    "sm80_forward": library._fake_sm80_forward,
    "sm80_forward_dense": library._fake_forward_dense,
    "sm80_backward": library._fake_backward,
    "sm90_forward": library._fake_sm90_forward,
    "sm90_forward_dense": library._fake_forward_dense,
    "sm90_backward": library._fake_backward,
}
FORWARDS = {
    "sm80_forward": OPTIONS,
    "sm80_forward_dense": (0.125, True),
    "sm90_forward": OPTIONS,
    "sm90_forward_dense": (0.125, True),
}


@needs_library
def test_library_loads_in_this_torch() -> None:
    assert library.load_error() is None
    for name in FAKES:
        assert getattr(library, name) is getattr(torch.ops.flash_attn_kernels, name).default


@needs_library
@pytest.mark.parametrize("device", ["meta", "cuda"])
def test_shapes_without_a_gpu(device: str) -> None:
    assert library.load_error() is None
    with FakeTensorMode():
        q = torch.empty(2, 5, 6, 64, dtype=torch.bfloat16, device=device)
        k = torch.empty(2, 7, 3, 64, dtype=torch.bfloat16, device=device)
        v = torch.empty(2, 7, 3, 32, dtype=torch.bfloat16, device=device)
        for name, options in FORWARDS.items():
            out, lse = getattr(library, name)(q, k, v, *options)
            assert out.shape == (2, 5, 6, 32) and out.dtype == q.dtype
            assert lse.shape == (2, 6, 5) and lse.dtype == torch.float32
        for backward in (library.sm80_backward, library.sm90_backward):
            gradients = backward(out, q, k, v, out, lse, False, *OPTIONS)
            for x, gradient in zip((q, k, v), gradients[:3], strict=True):
                assert gradient.shape == x.shape and gradient.dtype == x.dtype
            assert gradients[3:] == (None, None, None)
            whole, *rest = backward(out, q, k, k, out, lse, False, *OPTIONS, one_gradient=True)
            assert whole.shape == (2, 5, 12, 64) and [x.numel() for x in rest[:2]] == [0, 0]


@needs_library
def test_schemas_and_fakes_agree() -> None:
    assert library.load_error() is None
    for name, fake in FAKES.items():
        schema = getattr(torch.ops.flash_attn_kernels, name).default._schema
        parameters = inspect.signature(fake).parameters
        assert not schema.is_mutable
        assert [argument.name for argument in schema.arguments] == list(parameters)
        for argument in schema.arguments:
            default = parameters[argument.name].default
            assert (default is not inspect.Parameter.empty) == argument.has_default_value()
            assert not argument.has_default_value() or default == argument.default_value


@needs_library
def test_cpu_tensors_are_refused_by_the_operator() -> None:
    assert library.load_error() is None
    q = torch.zeros(1, 4, 2, 64, dtype=torch.bfloat16)
    for name, options in FORWARDS.items():
        with pytest.raises(NotImplementedError):
            getattr(library, name)(q, q, q, *options)


# The fakes themselves need no library.

DENSE = torch.empty(2, 5, 6, 64, dtype=torch.bfloat16)
DENSE_K = torch.empty(2, 7, 3, 64, dtype=torch.bfloat16)
PACKED = torch.empty(11, 6, 64, dtype=torch.bfloat16)
CU = torch.zeros(4, dtype=torch.int32)


def backward_shapes(
    q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor | None, cu: torch.Tensor | None, needed: bool = True
) -> list[tuple[tuple[int, ...], torch.dtype] | None]:
    gradients = library._fake_backward(
        *(q, q, k, k, q, q, False, *OPTIONS),
        cu_seqlens_q=cu,
        cu_seqlens_k=cu,
        attn_bias=bias,
        needs_attn_bias=bias is not None and needed,
        needs_alibi_slopes=needed,
        needs_learnable_sink=needed,
    )
    return [None if x is None else (tuple(x.shape), x.dtype) for x in gradients[3:]]


def test_shape_of_packed_results() -> None:
    for fake in (library._fake_sm80_forward, library._fake_sm90_forward):
        out, lse = fake(PACKED, PACKED, PACKED[..., :40], *OPTIONS, cu_seqlens_q=CU, cu_seqlens_k=CU)
        assert out.shape == (11, 6, 40) and lse.shape == (6, 11) and lse.dtype == torch.float32


def test_bias_gradient_is_fp32_where_it_is_a_sum() -> None:
    full, broadcast = torch.empty(2, 6, 5, 7).bfloat16(), torch.empty(1, 6, 5, 7).bfloat16()
    assert backward_shapes(DENSE, DENSE_K, full, None)[0] == ((2, 6, 5, 7), torch.bfloat16)
    assert backward_shapes(DENSE, DENSE_K, broadcast, None)[0] == ((1, 6, 5, 7), torch.float32)
    packed_bias = torch.empty(3, 6, 5, 7).bfloat16()
    assert backward_shapes(PACKED, PACKED, packed_bias, CU)[0] == ((3, 6, 5, 7), torch.float32)


def test_gradients_per_sequence_and_head() -> None:
    per_head = [((2, 6), torch.float32)] * 2
    assert backward_shapes(DENSE, DENSE_K, None, None) == [None, *per_head]
    per_head = [((3, 6), torch.float32)] * 2
    assert backward_shapes(PACKED, PACKED, None, CU) == [None, *per_head]


def test_gradients_that_nobody_asked_for_are_none() -> None:
    full = torch.empty(2, 6, 5, 7)
    assert backward_shapes(DENSE, DENSE_K, full, None, needed=False) == [None] * 3


def test_missing_library_is_a_reason_not_a_crash(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(library, "LIBRARY_PATH", tmp_path / "missing.so")
    reason = library._load.__wrapped__()
    assert "no compiled kernels" in reason and "FLASH_ATTN_KERNELS_BUILD" in reason


def test_broken_library_is_a_reason_not_a_crash(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"this is not a shared object")
    monkeypatch.setattr(library, "LIBRARY_PATH", broken)
    assert "failed to load" in library._load.__wrapped__()


@needs_library
@pytest.mark.parametrize(
    "version, error", [((12, 9), True), ((13, 0), False), ((13, 1), False), (None, False)]
)
def test_a_driver_that_is_too_old_is_a_reason_not_a_failure_later(
    version: tuple[int, int] | None, error: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "_driver_cuda_version", lambda: version)
    monkeypatch.setattr(torch.library, "register_fake", lambda *_: None)  # once is enough
    reason = library._load.__wrapped__()
    assert (reason is not None) == error
    if reason is not None:
        assert "made for CUDA 12.9, the compiled kernels need a driver for CUDA 13.0" in reason


@pytest.mark.parametrize("status, number, version", [(0, 13000, (13, 0)), (0, 12080, (12, 8)), (34, 0, None)])
def test_the_driver_is_asked(status: int, number: int, version: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(target: Any) -> int:
        target._obj.value = number
        return status

    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(cuDriverGetVersion=answer))
    assert library._driver_cuda_version() == version


def test_no_driver_is_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", absent)
    assert library._driver_cuda_version() is None


def test_rocm_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """Its devices are called cuda, and their compute capabilities look like NVIDIA's."""
    monkeypatch.setattr(library, "LIBRARY_PATH", tmp_path / "any.so")
    library.LIBRARY_PATH.touch()
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "built for ROCm" in library._load.__wrapped__()


def test_a_library_without_some_operator_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(library, "LIBRARY_PATH", tmp_path / "old.so")
    library.LIBRARY_PATH.touch()
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(library, "OPERATORS", (*library.OPERATORS, "of_tomorrow"))
    assert "older than this package" in library._load.__wrapped__()


def test_the_driver_that_is_asked_for_runs_what_the_build_makes() -> None:
    folder = str(Path(__file__).parents[1])
    sys.path.insert(0, folder)
    try:
        from build_support.toolchain import MINIMUM_CUDA
    finally:
        sys.path.remove(folder)
    assert library.MINIMUM_DRIVER_CUDA == MINIMUM_CUDA

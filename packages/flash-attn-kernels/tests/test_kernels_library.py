"""The compiled library in a torch without CUDA: it loads, and its operators have shapes for fake and meta tensors."""

from __future__ import annotations

import pytest
import torch
from flash_attn_kernels import library
from torch._subclasses.fake_tensor import FakeTensorMode

needs_library = pytest.mark.skipif(
    not library.LIBRARY_PATH.exists(), reason="no compiled library (build it with tools/build_ext.py)"
)


@needs_library
def test_library_loads_in_this_torch() -> None:
    assert library.load_error() is None


@needs_library
@pytest.mark.parametrize("device", ["meta", "cuda"])
def test_shapes_without_a_gpu(device: str) -> None:
    assert library.load_error() is None
    with FakeTensorMode():
        q = torch.empty(2, 5, 6, 64, dtype=torch.bfloat16, device=device)
        k = torch.empty(2, 7, 3, 64, dtype=torch.bfloat16, device=device)
        out, lse = torch.ops.flash_attn_kernels.sm80_forward(q, k, k, 0.125, -1, 0)
        assert out.shape == q.shape and out.dtype == q.dtype
        assert lse.shape == (2, 6, 5) and lse.dtype == torch.float32
        dq, dk, dv = torch.ops.flash_attn_kernels.sm80_backward(
            out, q, k, k, out, lse, None, 0.125, -1, 0, False
        )
        assert dq.shape == q.shape and dk.shape == k.shape == dv.shape


@needs_library
def test_schemas_and_fakes_pass_torch_checks() -> None:
    assert library.load_error() is None
    for name in ("sm80_forward", "sm80_backward"):
        schema = getattr(torch.ops.flash_attn_kernels, name).default._schema
        assert not schema.is_mutable
        assert [r.type.kind() for r in schema.returns] == ["TensorType"] * len(schema.returns)


@needs_library
def test_cpu_tensors_are_refused_by_the_operator() -> None:
    assert library.load_error() is None
    q = torch.zeros(1, 4, 2, 64, dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError):
        torch.ops.flash_attn_kernels.sm80_forward(q, q, q, 0.125, -1, -1)


def test_missing_library_is_a_reason_not_a_crash(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(library, "LIBRARY_PATH", tmp_path / "missing.so")
    reason = library._load.__wrapped__()
    assert "no compiled kernels" in reason and "FLASH_ATTN_KERNELS_BUILD" in reason


def test_broken_library_is_a_reason_not_a_crash(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"this is not a shared object")
    monkeypatch.setattr(library, "LIBRARY_PATH", broken)
    assert "failed to load" in library._load.__wrapped__()

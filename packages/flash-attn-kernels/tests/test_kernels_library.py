"""The compiled library in a torch without CUDA: it loads, and its operators have shapes for fake and meta tensors."""

from __future__ import annotations

import inspect

import pytest
import torch
from flash_attn_kernels import library
from torch._subclasses.fake_tensor import FakeTensorMode

needs_library = pytest.mark.skipif(
    not library.LIBRARY_PATH.exists(), reason="no compiled library (build it with tools/build_ext.py)"
)

NO_TENSORS = (None,) * 11  # layout, modifiers, seed
OPTIONS = (0.125, -1, 0, False, 0.0, 0.0)


@needs_library
def test_library_loads_in_this_torch() -> None:
    assert library.load_error() is None
    assert library.sm80_forward is torch.ops.flash_attn_kernels.sm80_forward.default
    assert library.sm80_backward is torch.ops.flash_attn_kernels.sm80_backward.default


@needs_library
@pytest.mark.parametrize("device", ["meta", "cuda"])
def test_shapes_without_a_gpu(device: str) -> None:
    assert library.load_error() is None
    with FakeTensorMode():
        q = torch.empty(2, 5, 6, 64, dtype=torch.bfloat16, device=device)
        k = torch.empty(2, 7, 3, 64, dtype=torch.bfloat16, device=device)
        v = torch.empty(2, 7, 3, 32, dtype=torch.bfloat16, device=device)
        out, lse = library.sm80_forward(q, k, v, *NO_TENSORS, *OPTIONS)
        assert out.shape == (2, 5, 6, 32) and out.dtype == q.dtype
        assert lse.shape == (2, 6, 5) and lse.dtype == torch.float32
        assert [x.shape for x in library.sm80_forward_dense(q, k, v, *OPTIONS[:4])] == [out.shape, lse.shape]
        gradients = library.sm80_backward(
            out, q, k, v, out, lse, None, *NO_TENSORS, *OPTIONS, False, False, False, False
        )
        for x, gradient in zip((q, k, v), gradients, strict=False):
            assert gradient.shape == x.shape and gradient.dtype == x.dtype


@needs_library
def test_schemas_and_fakes_agree() -> None:
    assert library.load_error() is None
    for name, fake in (
        ("sm80_forward", library._fake_sm80_forward),
        ("sm80_forward_dense", library._fake_sm80_forward_dense),
        ("sm80_backward", library._fake_sm80_backward),
    ):
        schema = getattr(torch.ops.flash_attn_kernels, name).default._schema
        assert not schema.is_mutable
        assert [r.type.kind() for r in schema.returns] == ["TensorType"] * len(schema.returns)
        assert [argument.name for argument in schema.arguments] == list(inspect.signature(fake).parameters)


@needs_library
def test_cpu_tensors_are_refused_by_the_operator() -> None:
    assert library.load_error() is None
    q = torch.zeros(1, 4, 2, 64, dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError):
        library.sm80_forward(q, q, q, *NO_TENSORS, *OPTIONS)


# The fakes themselves need no library.

DENSE = torch.empty(2, 5, 6, 64, dtype=torch.bfloat16)
DENSE_K = torch.empty(2, 7, 3, 64, dtype=torch.bfloat16)
PACKED = torch.empty(11, 6, 64, dtype=torch.bfloat16)
CU = torch.zeros(4, dtype=torch.int32)


def backward_shapes(
    q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor | None, cu: torch.Tensor | None, needed: bool = True
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    others = (cu, cu, None, None, None, bias, None, None, None, None, None)
    gradients = library._fake_sm80_backward(
        q, q, k, k, q, q, None, *others, *OPTIONS, False, bias is not None and needed, needed, needed
    )
    return [(tuple(x.shape), x.dtype) for x in gradients[3:]]


def test_shape_of_packed_results() -> None:
    out, lse = library._fake_sm80_forward(PACKED, PACKED, PACKED[..., :40], CU, CU, *(None,) * 9, *OPTIONS)
    assert out.shape == (11, 6, 40) and lse.shape == (6, 11) and lse.dtype == torch.float32


def test_bias_gradient_is_fp32_where_it_is_a_sum() -> None:
    full, broadcast = torch.empty(2, 6, 5, 7).bfloat16(), torch.empty(1, 6, 5, 7).bfloat16()
    assert backward_shapes(DENSE, DENSE_K, full, None)[0] == ((2, 6, 5, 7), torch.bfloat16)
    assert backward_shapes(DENSE, DENSE_K, broadcast, None)[0] == ((1, 6, 5, 7), torch.float32)
    packed_bias = torch.empty(3, 6, 5, 7).bfloat16()
    assert backward_shapes(PACKED, PACKED, packed_bias, CU)[0] == ((3, 6, 5, 7), torch.float32)


def test_gradients_per_sequence_and_head() -> None:
    per_head = [((2, 6), torch.float32)] * 2
    assert backward_shapes(DENSE, DENSE_K, None, None) == [((0,), torch.float32), *per_head]
    per_head = [((3, 6), torch.float32)] * 2
    assert backward_shapes(PACKED, PACKED, None, CU) == [((0,), torch.float32), *per_head]


def test_gradients_that_nobody_asked_for_are_empty() -> None:
    full = torch.empty(2, 6, 5, 7)
    assert backward_shapes(DENSE, DENSE_K, full, None, needed=False) == [((0,), torch.float32)] * 3


def test_missing_library_is_a_reason_not_a_crash(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(library, "LIBRARY_PATH", tmp_path / "missing.so")
    reason = library._load.__wrapped__()
    assert "no compiled kernels" in reason and "FLASH_ATTN_KERNELS_BUILD" in reason


def test_broken_library_is_a_reason_not_a_crash(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"this is not a shared object")
    monkeypatch.setattr(library, "LIBRARY_PATH", broken)
    assert "failed to load" in library._load.__wrapped__()

"""The operators as torch sees them: schemas, fakes, tracing, compilation with dynamic lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from flash_attn_kernels import flash_attn_func, flash_attn_varlen_func, library
from flash_attn_kernels.philox import draw_seed_and_offset
from torch import Tensor

pytestmark = pytest.mark.gpu

B, SQ, SK, H, HK = 2, 33, 70, 4, 2


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def packed_tensors() -> dict[str, Tensor]:
    cu_seqlens_q, cu_seqlens_k = (
        torch.tensor([0, end // 3, end], dtype=torch.int32, device="cuda") for end in (SQ, SK)
    )
    used = torch.tensor([5, 20], dtype=torch.int32, device="cuda")
    return {
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "seqused_q": used,
        "seqused_k": used,
    }


def modifier_arguments() -> dict[str, Any]:
    return {
        "softcap": 5.0,
        "dropout_p": 0.2,
        "attn_bias": randn(B, H, SQ, SK),
        "attn_mask": torch.rand(1, H, SQ, SK, device="cuda") < 0.8,
        "key_padding_mask": torch.rand(B, SK, device="cuda") < 0.8,
        "alibi_slopes": torch.rand(B, H, device="cuda"),
        "learnable_sink": torch.randn(H, device="cuda"),
        "seed_and_offset": draw_seed_and_offset(torch.device("cuda")),
    }


OPTIONS = (0.125, 40, 0, True)  # scale, window, top left


def check_dense_operator(dense: Any, general: Any, q: Tensor, k: Tensor, v: Tensor) -> None:
    """It passes torch's checks, and gives the bits of the general one."""
    for causal in (False, True):
        torch.library.opcheck(dense, (q, k, v, 0.125, causal))
        expected = general(q, k, v, 0.125, -1, 0 if causal else -1, False)
        assert all(map(torch.equal, dense(q, k, v, 0.125, causal), expected))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("modified", [False, True])
def test_operators_pass_torch_checks(packed: bool, modified: bool) -> None:
    """As torch.library.opcheck defines them: schema, fake, tracing with symbolic sizes."""
    assert library.load_error() is None
    batch = () if packed else (B,)
    q, k, v = randn(*batch, SQ, H, 64), randn(*batch, SK, HK, 64), randn(*batch, SK, HK, 128)
    optional = (packed_tensors() if packed else {}) | (modifier_arguments() if modified else {})
    torch.library.opcheck(library.sm80_forward, (q, k, v, *OPTIONS), optional)
    out, lse = library.sm80_forward(q, k, v, *OPTIONS, **optional)
    if not packed and not modified:
        check_dense_operator(library.sm80_forward_dense, library.sm80_forward, q, k, v)
    needed = {f"needs_{name}": modified for name in ("attn_bias", "alibi_slopes", "learnable_sink")}
    for dlse in (None, torch.randn_like(lse)):
        arguments = (torch.randn_like(out), q, k, v, out, lse, True, *OPTIONS)
        torch.library.opcheck(library.sm80_backward, arguments, {**optional, "dlse": dlse, **needed})


@pytest.mark.parametrize("packed", [False, True])
def test_sm90_operator_passes_torch_checks(packed: bool) -> None:
    assert library.load_error() is None
    batch = () if packed else (B,)
    q, k, v = randn(*batch, SQ, H, 64), randn(*batch, SK, HK, 64), randn(*batch, SK, HK, 128)
    if torch.cuda.get_device_capability()[0] != 9:
        with pytest.raises(RuntimeError, match=r"compute capability .* run on 9.x alone; sm80_forward"):
            library.sm90_forward(q, k, v, *OPTIONS)
        return
    if not packed:
        check_dense_operator(library.sm90_forward_dense, library.sm90_forward, q, k, v)
    torch.library.opcheck(library.sm90_forward, (q, k, v, *OPTIONS), packed_tensors() if packed else {})
    modified = {"softcap": 5.0, "learnable_sink": torch.randn(H, device="cuda")}
    torch.library.opcheck(
        library.sm90_forward, (q, k, v, *OPTIONS), modified | (packed_tensors() if packed else {})
    )
    optional = packed_tensors() if packed else {}
    out, lse = library.sm90_forward(q, k, v, *OPTIONS, **optional)
    arguments = (torch.randn_like(out), q, k, v, out, lse, False, *OPTIONS)
    torch.library.opcheck(library.sm90_backward, arguments, {**optional, "dlse": torch.randn_like(lse)})


@pytest.mark.parametrize("path", ["sm80", "sm90"])
def test_one_gradient_passes_torch_checks(path: str) -> None:
    assert library.load_error() is None
    heads = randn(B, SQ, H + 2 * HK, 64).split((H, HK, HK), dim=2)
    out, lse = library.sm80_forward(*heads, *OPTIONS)
    arguments = (torch.randn_like(out), *heads, out, lse, False, *OPTIONS)
    backward = {"sm80": library.sm80_backward, "sm90": library.sm90_backward}[path]
    torch.library.opcheck(backward, arguments, {"one_gradient": True})


def test_paged_forward_passes_torch_checks() -> None:
    assert library.load_error() is None
    q, pages = randn(SQ, H, 64), randn(6, 16, HK, 64)
    layout = packed_tensors()
    optional = {
        "cu_seqlens_q": layout["cu_seqlens_q"],
        "cu_seqlens_k": layout["cu_seqlens_k"],
        "block_table": torch.tensor([[5, 0, -1], [1, 3, 2]], dtype=torch.int32, device="cuda"),
    }
    torch.library.opcheck(library.sm80_forward, (q, pages, pages, 0.125, -1, -1, False), optional)


def dense_call(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return flash_attn_func(q, k, v, causal=True, deterministic=True, return_lse=True, strict=True)


def modified_call(q: Tensor, k: Tensor, v: Tensor) -> Any:
    bias = torch.arange(k.shape[1], device=k.device) * 0.01
    slopes = torch.arange(q.shape[2], device=q.device) * 0.1
    return flash_attn_func(
        q, k, v, window_size=(50, 9), softcap=4.0, attn_bias=bias, alibi_slopes=slopes, learnable_sink=slopes,
        deterministic=True, return_lse=True, strict=True,
    )  # fmt: skip


def assert_compiled_equals_eager(
    call: Callable[..., Any], compiled: Callable[..., Any], tensors: list[Tensor], extra: tuple[Any, ...] = ()
) -> None:
    results = []
    for function in (compiled, call):
        out, lse = function(*tensors, *extra)
        generator = torch.Generator(device="cuda").manual_seed(0)
        upstream = [torch.randn(x.shape, device="cuda", generator=generator).to(x.dtype) for x in (out, lse)]
        results.append((out, lse, *torch.autograd.grad([out, lse], tensors, upstream)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("call", [dense_call, modified_call])
def test_compiles_with_dynamic_lengths(call: Callable[..., Any]) -> None:
    """Forward and backward, one graph for all lengths."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for batch, seqlen_q, seqlen_k in ((2, 100, 120), (3, 33, 257), (5, 300, 64)):
        tensors = []
        for shape in ((batch, seqlen_q, H, 64), (batch, seqlen_k, HK, 64), (batch, seqlen_k, HK, 64)):
            x = randn(*shape).requires_grad_()
            torch._dynamo.mark_dynamic(x, 0)
            torch._dynamo.mark_dynamic(x, 1)
            tensors.append(x)
        assert_compiled_equals_eager(call, compiled, tensors)
    assert counter.frame_count == 1


def varlen_call(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Any:
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, 300, 300, causal=True, deterministic=True, return_lse=True,
        strict=True,
    )  # fmt: skip


def test_varlen_compiles_with_dynamic_lengths() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(varlen_call, fullgraph=True, backend=counter)
    for ends in ([0, 40, 100], [0, 0, 31, 257], [0, 1, 7, 200, 300]):
        tensors = [randn(ends[-1], heads, 64).requires_grad_() for heads in (H, HK, HK)]
        cu_seqlens = [torch.tensor(ends, dtype=torch.int32, device="cuda") for _ in range(2)]
        for x in (*tensors, *cu_seqlens):
            torch._dynamo.mark_dynamic(x, 0)
        assert_compiled_equals_eager(varlen_call, compiled, tensors, tuple(cu_seqlens))
    assert counter.frame_count == 1


def test_compiles_with_the_default_backend() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(dense_call, fullgraph=True)
    tensors = [randn(2, 128, heads, 64).requires_grad_() for heads in (H, HK, HK)]
    assert_compiled_equals_eager(dense_call, compiled, tensors)

"""Sizes beyond 2^31 elements and 2^16 blocks on the CUDA kernels. Results are checked where offsets are largest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flash_attn_kernels import flash_attn_func, flash_attn_varlen_func
from flash_attn_kernels.inputs import ScoreModifiers
from flash_attn_kernels.options import make_options
from flash_attn_kernels.reference import attention_reference
from flash_attn_kernels.testing import assert_within_reference_error
from torch import Tensor

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def free_memory() -> Any:
    torch.cuda.empty_cache()
    yield
    torch.cuda.empty_cache()


def require_memory(gib: float) -> None:
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib} GiB of GPU memory, {free:.0f} are free")


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def run(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, bias: Tensor | None = None, **options: Any
) -> dict[str, Tensor]:
    """out, LSE and gradients of the public function."""
    leaves = {"q": q, "k": k, "v": v} | ({} if bias is None else {"attn_bias": bias})
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    out, lse = flash_attn_func(**leaves, **options, return_lse=True, strict=True)
    gradients = torch.autograd.grad(out, list(leaves.values()), dout)
    return {"out": out.detach(), "lse": lse.detach()} | {
        f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)
    }


def assert_within_law(
    actual: dict[str, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
) -> None:
    """The tolerance law for a part of the problem that is complete in itself, such as one head."""
    options = make_options(
        head_dim=q.shape[-1], softmax_scale=None, causal=causal, window_size=(-1, -1), softcap=0.0, dropout_p=0.0,
        deterministic=False,
    )  # fmt: skip
    results = []
    for dtype in (torch.float64, q.dtype):
        leaves = {"q": q, "k": k, "v": v} | ({} if bias is None else {"attn_bias": bias})
        leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in leaves.items()}
        modifiers = ScoreModifiers(attn_bias=leaves.get("attn_bias"), attn_mask=mask)
        out, lse, _ = attention_reference(
            *(leaves[name] for name in "qkv"), options, modifiers=modifiers, compute_dtype=dtype
        )
        gradients = torch.autograd.grad(out, list(leaves.values()), dout.to(dtype))
        names = [f"d{name}" for name in leaves]
        results.append({"out": out, "lse": lse} | dict(zip(names, gradients, strict=True)))
    exact, plain = results
    for name, result in actual.items():
        factor, atol = (2.0, 1e-5) if name in ("out", "lse") else (3.0, 1e-4)
        assert_within_reference_error(result, exact[name], plain[name], factor=factor, atol=atol, name=name)


@pytest.mark.parametrize("long_side", ["queries", "keys"])
def test_more_than_two_to_the_31_elements(long_side: str) -> None:
    require_memory(45)
    seqlen, heads = 66_000, 256  # 66,000 * 256 * 128 > 2^31
    Sq, Sk = (seqlen, 64) if long_side == "queries" else (64, seqlen)
    q, k, v, dout = (randn(1, S, heads, 128) for S in (Sq, Sk, Sk, Sq))
    results = run(q, k, v, dout)
    last_head = slice(-1, None)
    assert_within_law(
        {name: x[:, last_head] if name == "lse" else x[:, :, last_head] for name, x in results.items()},
        *(x[:, :, last_head] for x in (q, k, v, dout)),
    )


def test_strides_times_indices_beyond_two_to_the_31() -> None:
    require_memory(12)
    rows, row_stride = 65, 2**26
    buffer = torch.empty(rows * row_stride, device="cuda", dtype=torch.bfloat16)

    def spread(index: int) -> Tensor:
        """(1, rows, 2, 64) whose rows lie 2^26 elements apart, the last one beyond 2^31."""
        view = buffer.as_strided((1, rows, 2, 64), (0, row_stride, 64, 1), index * 1024)
        return view.copy_(randn(1, rows, 2, 64))

    tensors = [spread(index) for index in range(4)]
    assert_within_law(run(*tensors, causal=True), *tensors, causal=True)
    sequences = [
        x.transpose(0, 1) for x in tensors
    ]  # a batch of one-token sequences: the batch stride is large
    assert_within_law(run(*sequences), *sequences)


def test_packed_strides_times_indices_beyond_two_to_the_31() -> None:
    require_memory(12)
    rows, row_stride = 65, 2**26
    buffer = torch.empty(rows * row_stride, device="cuda", dtype=torch.bfloat16)
    q, k, v = (buffer.as_strided((rows, 2, 64), (row_stride, 64, 1), index * 1024) for index in range(3))
    for x in (q, k, v):
        x.copy_(randn(rows, 2, 64))
    cu_seqlens = torch.tensor([0, 30, rows], dtype=torch.int32, device="cuda")
    out = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, rows, rows, strict=True)
    contiguous = flash_attn_varlen_func(
        *(x.contiguous() for x in (q, k, v)), cu_seqlens, cu_seqlens, rows, rows, strict=True
    )
    assert torch.equal(out, contiguous)


def test_bias_and_mask_of_more_than_two_to_the_31_elements() -> None:
    require_memory(30)
    S, H = 8192, 33  # 33 * 8192^2 > 2^31
    q, k, v, dout = (randn(1, S, H, 64) for _ in range(4))
    bias = randn(1, H, S, S)
    mask = torch.empty(1, H, S, S, dtype=torch.bool, device="cuda").bernoulli_(0.7)
    results = run(q, k, v, dout, bias, attn_mask=mask)
    assert results["dattn_bias"].shape == bias.shape
    rows = slice(
        -500, None
    )  # of the last head; k, v and their gradients depend on all rows, so those are left out
    actual = {
        "out": results["out"][:, rows, -1:],
        "lse": results["lse"][:, -1:, rows],
        "dq": results["dq"][:, rows, -1:],
        "dattn_bias": results["dattn_bias"][:, -1:, rows],
    }
    last_head = [x[:, :, -1:] for x in (q, k, v, dout)]
    assert_within_law(
        actual, last_head[0][:, rows], *last_head[1:3], last_head[3][:, rows],
        bias=bias[:, -1:, rows], mask=mask[:, -1:, rows],
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(65_600, 4, 1, 64), (1, 4, 65_600, 64)], ids=["batches", "heads"])
@pytest.mark.parametrize("causal", [False, True])
def test_more_than_65535_batches_or_heads(shape: tuple[int, ...], causal: bool) -> None:
    tensors = [randn(*shape) for _ in range(4)]
    results = run(*tensors, causal=causal)
    assert_within_law(results, *tensors, causal=causal)


def test_more_than_65535_batches_with_modifiers() -> None:
    B, S = 65_600, 4
    q, k, v, dout = (randn(B, S, 1, 64) for _ in range(4))
    bias = randn(B, 1, S, S)
    assert_within_law(run(q, k, v, dout, bias), q, k, v, dout, bias)


def test_more_than_65535_packed_sequences() -> None:
    B, S = 65_600, 3
    q, k, v = (randn(B * S, 2, 64).requires_grad_() for _ in range(3))
    dout = randn(B * S, 2, 64)
    cu_seqlens = torch.arange(0, B * S + 1, S, dtype=torch.int32, device="cuda")
    out = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, S, S, causal=True, strict=True)
    gradients = torch.autograd.grad(out, (q, k, v), dout)
    names = ("out", "dq", "dk", "dv")
    results = {name: x.unflatten(0, (B, S)) for name, x in zip(names, (out, *gradients), strict=True)}
    assert_within_law(results, *(x.unflatten(0, (B, S)) for x in (q, k, v, dout)), causal=True)


@pytest.mark.parametrize("long_side", ["queries", "keys"])
def test_more_than_65535_tiles(long_side: str) -> None:
    require_memory(45)
    long = 65_600 * 128 + 3
    Sq, Sk = (long, 5) if long_side == "queries" else (5, long)
    q, k, v, dout = (randn(1, S, 1, 64) for S in (Sq, Sk, Sk, Sq))
    k[:, -300:] *= 8  # so that the last ones outweigh the millions before them
    results = run(q, k, v, dout)
    if long_side == "queries":
        tail = {name: x[..., -300:] if name == "lse" else x[:, -300:] for name, x in results.items()}
        tail = {name: x for name, x in tail.items() if name not in ("dk", "dv")}
        assert_within_law(tail, q[:, -300:], k, v, dout[:, -300:])
    else:
        assert_within_law(results, q, k, v, dout)


@pytest.mark.parametrize("modifiers", [False, True])
def test_memory_is_linear_in_the_length(modifiers: bool) -> None:
    options: dict[str, Any] = {"causal": True}
    if modifiers:
        options |= {"softcap": 5.0, "alibi_slopes": torch.ones(2, device="cuda"), "dropout_p": 0.1}

    def peak(S: int) -> int:
        tensors = [randn(1, S, 2, 64) for _ in range(4)]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(*tensors, **options)
        return torch.cuda.max_memory_allocated() - before

    peak(1024)  # whatever is allocated once
    assert peak(32_768) <= 2.1 * peak(16_384)

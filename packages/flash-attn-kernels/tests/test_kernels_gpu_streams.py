"""CUDA graphs, streams, devices and host synchronisation of the CUDA kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from flash_attn_kernels import flash_attn_func, flash_attn_varlen_func
from flash_attn_kernels.testing import captured
from flash_attn_kernels.testing.attention_case import AttentionCase, make_tensors
from flash_attn_kernels.testing.attention_check import check_attention, public_results
from torch import Tensor

pytestmark = pytest.mark.gpu

MODIFIERS: dict[str, Any] = {
    "attn_bias": "hqk", "attn_mask": "bqk", "key_padding": True, "alibi_slopes": "h", "sink_dtype": torch.float32,
    "softcap": 5.0,
}  # fmt: skip
TOKENS, CAPACITY = 300, 300


def packed_step(
    leaves: list[Tensor], dout: Tensor, dlse: Tensor, cu_seqlens: tuple[Tensor, Tensor], **options: Any
) -> tuple[Tensor, ...]:
    out, lse = flash_attn_varlen_func(
        *leaves[:3], *cu_seqlens, CAPACITY, CAPACITY, causal=True, deterministic=True, return_lse=True,
        strict=True, **options,
    )  # fmt: skip
    return (out, lse, *torch.autograd.grad([out, lse], leaves, [dout, dlse]))


@pytest.mark.parametrize("with_modifiers", [False, True])
def test_graph_replay_with_other_packed_lengths(with_modifiers: bool) -> None:
    leaves = [
        torch.randn(TOKENS, heads, 64, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for heads in (4, 2, 2)
    ]
    options: dict[str, Any] = {}
    if with_modifiers:
        options = {
            "attn_bias": torch.randn(3, 4, CAPACITY, CAPACITY, device="cuda").requires_grad_(),
            "alibi_slopes": torch.rand(4, device="cuda").requires_grad_(),
            "learnable_sink": torch.randn(4, device="cuda").requires_grad_(),
            "softcap": 3.0,
        }
        leaves += [x for x in options.values() if isinstance(x, Tensor)]
    dout = torch.randn(TOKENS, 4, 64, device="cuda", dtype=torch.bfloat16)
    dlse = torch.randn(4, TOKENS, device="cuda")
    cu_seqlens = tuple(torch.tensor([0, 100, 200, 300], dtype=torch.int32, device="cuda") for _ in range(2))

    def step() -> tuple[Tensor, ...]:
        return packed_step(leaves, dout, dlse, cu_seqlens, **options)

    graph, results = captured(step, warmups=3)
    for ends_q, ends_k in (([0, 0, 7, 250], [0, 300, 300, 300]), ([0, 300, 300, 300], [0, 1, 2, 290])):
        for static, ends in zip(cu_seqlens, (ends_q, ends_k), strict=True):
            static.copy_(torch.tensor(ends, dtype=torch.int32))
        with torch.no_grad():
            leaves[0].normal_()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(results, step(), strict=True))


def test_graph_replay_of_paged_sequences_with_other_lengths() -> None:
    tensors = make_tensors(AttentionCase(lengths=((5, 100), (1, 64), (7, 130)), layout="paged seqused"))
    static = tensors.layout["seqused_k"]

    def step() -> tuple[Tensor, ...]:
        return flash_attn_varlen_func(
            tensors.q, tensors.k, tensors.v, **tensors.arguments, return_lse=True, strict=True
        )

    graph, results = captured(step, warmups=3)
    static.copy_(torch.tensor([3, 0, 129], dtype=torch.int32))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(results, step(), strict=True))


def test_graph_replay_of_a_dense_call() -> None:
    q, k, v, dout = torch.randn(4, 2, 200, 4, 64, device="cuda", dtype=torch.bfloat16)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]

    def step() -> tuple[Tensor, ...]:
        out = flash_attn_func(*leaves, causal=True, deterministic=True, strict=True)
        return (out, *torch.autograd.grad(out, leaves, dout))

    graph, results = captured(step, warmups=3)
    with torch.no_grad():
        for leaf in leaves:
            leaf.normal_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(results, step(), strict=True))


def test_every_replay_drops_other_elements() -> None:
    q, k, v = torch.randn(3, 2, 128, 4, 64, device="cuda", dtype=torch.bfloat16)
    graph, (out,) = captured(lambda: (flash_attn_func(q, k, v, dropout_p=0.3, strict=True),), warmups=3)
    graph.replay()
    first = out.clone()
    graph.replay()
    assert not torch.equal(first, out)


@pytest.fixture
def synchronisation_raises() -> Iterator[Callable[[], None]]:
    """Call it to make every host synchronisation raise, until the test ends."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("layout", ["dense", "packed", "seqused", "paged"])
@pytest.mark.parametrize("modifiers", [{}, {**MODIFIERS, "dropout_p": 0.1}], ids=["plain", "modified"])
def test_no_call_waits_for_the_device(
    layout: str, modifiers: dict, synchronisation_raises: Callable[[], None]
) -> None:
    for deterministic in (False, True):
        case = AttentionCase(layout=layout, causal=True, deterministic=deterministic, **modifiers)
        tensors = make_tensors(case)
        public_results(tensors)
        synchronisation_raises()
        public_results(tensors)
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_side_stream(layout: str) -> None:
    """Kernels run on the current stream: behind slow work there, they still see what it wrote."""
    tensors = make_tensors(AttentionCase(layout=layout, deterministic=True, **MODIFIERS))
    expected = public_results(tensors)
    q = tensors.q
    tensors.q = torch.zeros_like(q)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        tensors.q.copy_(q)
        results = public_results(tensors)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(results[name], expected[name]) for name in expected)


@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_second_device(layout: str) -> None:
    """The device of q counts, not the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs, torch sees one")
    assert torch.cuda.current_device() == 0
    check_attention(AttentionCase(layout=layout, dropout_p=0.1, **MODIFIERS), "cuda:1")

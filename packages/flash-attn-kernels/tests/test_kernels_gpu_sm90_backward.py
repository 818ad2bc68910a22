"""The backward of the sm90 path on a Hopper GPU: its kernels run what explain says, and the sm80 kernels the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from flash_attn_kernels import explain, flash_attn_func, flash_attn_varlen_func, library
from flash_attn_kernels.testing import captured, pairwise
from flash_attn_kernels.testing.attention_case import AttentionCase, AttentionTensors, make_tensors
from flash_attn_kernels.testing.attention_check import check_tensors
from torch import Tensor

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("hopper")]


def gradients_of(tensors: AttentionTensors) -> Callable[[], tuple[Tensor, ...]]:
    """A function that differentiates the call once more, by q, k and v."""
    attend = flash_attn_func if tensors.case.layout == "dense" else flash_attn_varlen_func
    leaves = [x.detach().requires_grad_() for x in (tensors.q, tensors.k, tensors.v)]
    out = attend(*leaves, **tensors.arguments, strict=True)
    return lambda: torch.autograd.grad(out, leaves, tensors.dout, retain_graph=True)


def backward_kernels(differentiate: Callable[[], object]) -> set[str]:
    """The namespaces of the main kernels that a backward starts."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        differentiate()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events()]
    return {path for path in ("sm80", "sm90") for name in names if f"{path}::backward_kernel" in name}


def explained(tensors: AttentionTensors) -> Any:
    q, k, v = (x.detach().requires_grad_() for x in (tensors.q, tensors.k, tensors.v))
    return explain(q, k, v, **tensors.arguments)


MASKS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (70, 5)},
    "causal window": {"causal": True, "window_size": (64, -1)},
    "window top-left": {"window_size": (130, 3), "causal_alignment": "top-left"},
}
OPTIONS: dict[str, list[Any]] = {
    "mask": list(MASKS),
    "dtype": [torch.bfloat16, torch.float16],
    "head_dims": [(64, 64), (128, 128), (40, 64), (8, 8), (128, 64), (72, 128), (104, 104)],
    "heads": [(4, 4), (6, 2), (5, 1)],
    "layout": ["dense", "packed", "seqused"],
    "lengths": [(200, 200), (65, 333), (333, 65), (1, 300), (129, 1), (0, 9), (9, 0), (512, 512), (700, 900)],
    "sink_dtype": [None, torch.float32, torch.bfloat16],
    "softmax_scale": [None, 0.3],
    "strides": ["contiguous", "transposed", "padded", "every other", "expanded"],
    "gradient_strides": ["contiguous", "transposed", "padded", "expanded"],
}  # fmt: skip


def make_case(seed: int, *, mask: str, lengths: tuple[int, int], layout: str, **choice: Any) -> AttentionCase:
    ragged = (lengths, (0, 7), (130, 65), (3, 0), (900, 300), (600, 600), lengths)
    return AttentionCase(
        lengths=(lengths, lengths) if layout == "dense" else ragged,
        layout=layout,
        seed=seed,
        **MASKS[mask],
        **choice,
    )


CASES = [make_case(seed, **choice) for seed, choice in enumerate(pairwise(OPTIONS))]


@pytest.mark.parametrize("case", CASES)
def test_the_kernels_run_what_explain_says(case: AttentionCase) -> None:
    tensors = make_tensors(case)
    chosen = explained(tensors)
    assert chosen.path == "sm90"
    if tensors.q.numel() > 0 and tensors.k.numel() > 0:
        expected = {"sm80"} if chosen.sm80_backward else {"sm90"}
        assert backward_kernels(gradients_of(tensors)) == expected
    check_tensors(tensors)


OTHERS: dict[str, dict[str, Any]] = {
    "is neither at most 64 nor from 97 to 128": {"head_dims": (96, 96)},
    "(q/k 192, v 128) is neither": {"head_dims": (192, 128)},
    "softcap is above 0": {"softcap": 5.0},
    "deterministic is set": {"deterministic": True},
    "150 queries leave half of a tile of 128 empty": {"lengths": ((150, 100),)},
    "205 queries of 2 sequences are below 256 each": {"layout": "packed"},
}


@pytest.mark.parametrize("reason", OTHERS)
def test_the_sm80_kernels_run_the_rest(reason: str) -> None:
    tensors = make_tensors(AttentionCase(causal=True, **OTHERS[reason]))
    chosen = explained(tensors)
    assert chosen.path == "sm90" and reason in chosen.sm80_backward[0]
    assert backward_kernels(gradients_of(tensors)) == {"sm80"}
    check_tensors(tensors)


def test_the_operator_gives_unaligned_rows_to_the_sm80_kernels() -> None:
    q, k, v, dout = torch.randn(4, 2, 90, 4, 68, device="cuda", dtype=torch.bfloat16)[..., 2:66]
    options = (0.125, 40, 0, False)
    out, lse = library.sm80_forward(q, k, v, *options)
    expected = library.sm80_backward(dout, q, k, v, out, lse, False, *options)
    actual = library.sm90_backward(dout, q, k, v, out, lse, False, *options)
    # One tile of keys: nothing is summed in an arbitrary order.
    assert all(torch.equal(a, b) for a, b in zip(actual[:3], expected[:3], strict=True))


REPEATED: dict[str, dict[str, Any]] = {
    "dense": {"lengths": ((1000, 777), (1000, 777)), "heads": (8, 2)},
    "dense causal": {"lengths": ((2000, 2000),), "heads": (16, 16), "causal": True},
    "packed": {"lengths": ((1000, 777), (0, 5), (3, 1500), (900, 900)), "layout": "packed", "causal": True},
    "few key-value heads": {"lengths": ((300, 300),), "heads": (8, 1)},
}


@pytest.mark.parametrize("head_dims", [(64, 64), (128, 128)])
@pytest.mark.parametrize("name", REPEATED)
def test_gradients_of_keys_and_values_have_the_same_bits(name: str, head_dims: tuple[int, int]) -> None:
    """Only dQ is summed by several blocks; its last bits may differ."""
    differentiate = gradients_of(make_tensors(AttentionCase(head_dims=head_dims, **REPEATED[name])))
    dq, dk, dv = differentiate()
    for _ in range(10):
        again = differentiate()
        assert torch.equal(dk, again[1]) and torch.equal(dv, again[2])
        torch.testing.assert_close(dq, again[0], rtol=0.02, atol=2e-3 * dq.abs().max().item())


def test_graph_replay_with_other_packed_lengths() -> None:
    """Every replay needs a counter of works that starts at 0, and an accumulator of zeros."""
    case = AttentionCase(lengths=((300, 300),) * 3, layout="packed", causal=True, heads=(8, 8))
    tensors = make_tensors(case)
    for x in (tensors.q, tensors.k, tensors.v, tensors.dout):
        x.normal_()  # the rows after the last sequence too
    leaves = [x.detach().requires_grad_() for x in (tensors.q, tensors.k, tensors.v)]

    def step() -> tuple[Tensor, ...]:
        out = flash_attn_varlen_func(*leaves, **tensors.arguments)
        return torch.autograd.grad(out, leaves, tensors.dout)

    graph, results = captured(step)
    for ends_q, ends_k in (
        ([0, 0, 7, 850], [0, 900, 900, 900]),
        ([0, 900, 900, 900], [0, 1, 2, 790]),
        ([0, 300, 600, 900], [0, 300, 600, 900]),
    ):
        tensors.layout["cu_seqlens_q"].copy_(torch.tensor(ends_q, dtype=torch.int32))
        tensors.layout["cu_seqlens_k"].copy_(torch.tensor(ends_k, dtype=torch.int32))
        for _ in range(2):
            graph.replay()
            dq, dk, dv = step()
            assert torch.equal(dk, results[1]) and torch.equal(dv, results[2])
            torch.testing.assert_close(dq, results[0], rtol=0.02, atol=2e-3 * dq.abs().max().item())

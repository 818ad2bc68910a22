"""The sm90 path on a Hopper GPU: its kernels run what explain says they run, and the sm80 kernels run the rest."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from flash_attn_kernels import explain, flash_attn_func, flash_attn_varlen_func, library
from flash_attn_kernels.testing import captured, pairwise
from flash_attn_kernels.testing.attention_case import AttentionCase, AttentionTensors, make_tensors
from flash_attn_kernels.testing.attention_check import check_tensors, public_results
from torch import Tensor

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("hopper")]


def forward(tensors: AttentionTensors) -> tuple[Tensor, Tensor]:
    attend = flash_attn_func if tensors.case.layout == "dense" else flash_attn_varlen_func
    return attend(tensors.q, tensors.k, tensors.v, **tensors.arguments, return_lse=True, strict=True)


def path_of(tensors: AttentionTensors) -> str:
    return explain(tensors.q, tensors.k, tensors.v, **tensors.arguments).path


def forward_kernels(tensors: AttentionTensors) -> set[str]:
    """The namespaces of the attention kernels that a forward starts."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        forward(tensors)
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if "flash_attn::" in event.name]
    assert names, "the profiler saw no attention kernel"
    return {path for path in ("sm80", "sm90") for name in names if f"flash_attn::{path}::" in name}


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
    "head_dims": [
        (64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256), (40, 72), (8, 8), (136, 256),
    ],
    "heads": [(4, 4), (6, 2), (5, 1)],
    "layout": ["dense", "packed", "seqused"],
    "lengths": [(200, 200), (65, 333), (333, 65), (1, 300), (129, 1), (0, 9), (9, 0)],
    "softcap": [0.0, 5.0],
    "sink_dtype": [None, torch.float32, torch.bfloat16],
    "softmax_scale": [None, 0.3],
    "strides": ["contiguous", "transposed", "padded", "every other", "expanded"],
}  # fmt: skip


def make_case(seed: int, *, mask: str, lengths: tuple[int, int], layout: str, **choice: Any) -> AttentionCase:
    ragged = (lengths, (0, 7), (130, 65), (3, 0), lengths)
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
    assert path_of(tensors) == "sm90"
    if tensors.q.numel() > 0 and tensors.k.numel() > 0:
        assert forward_kernels(tensors) == {"sm90"}
    check_tensors(tensors)


OTHERS: dict[str, dict[str, Any]] = {
    "rows of q are not 16-byte aligned": {"strides": "misaligned"},
    "is not a multiple of 8": {"head_dims": (36, 64)},
    "keys and values are paged": {"layout": "paged"},
    "dropout_p is above 0": {"dropout_p": 0.2},
    "softmax_scale -0.3 is not above 0": {"softmax_scale": -0.3},
    "attn_bias is given": {"attn_bias": "hqk"},
    "attn_mask is given": {"attn_mask": "qk"},
    "key_padding_mask is given": {"key_padding": True},
    "alibi_slopes is given": {"alibi_slopes": "h"},
}


@pytest.mark.parametrize("reason", OTHERS)
def test_the_sm80_kernels_run_the_rest_and_nobody_warns(reason: str) -> None:
    tensors = make_tensors(AttentionCase(causal=True, **OTHERS[reason]))
    explanation = explain(tensors.q, tensors.k, tensors.v, **tensors.arguments)
    assert explanation.path == "sm80" and reason in str(explanation)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        forward(tensors)
    assert forward_kernels(tensors) == {"sm80"}
    check_tensors(tensors)


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_one_unaligned_tensor(name: str, layout: str) -> None:
    """An address that is 8 bytes past an aligned one, under aligned strides."""
    tensors = make_tensors(AttentionCase(layout=layout, lengths=((90, 70), (90, 70))))
    x = getattr(tensors, name)
    shifted = x.new_empty((*x.shape[:-1], x.shape[-1] + 8))[..., 4:-4].copy_(x)
    setattr(tensors, name, shifted)
    explanation = explain(tensors.q, tensors.k, tensors.v, **tensors.arguments)
    assert explanation.path == "sm80"
    assert f"rows of {name} are not 16-byte aligned" in explanation.reasons["sm90"][0]
    assert forward_kernels(tensors) == {"sm80"}
    check_tensors(tensors)


def test_the_operator_gives_unaligned_rows_to_the_sm80_kernels() -> None:
    q, k, v = torch.randn(3, 2, 90, 4, 68, device="cuda", dtype=torch.bfloat16)[..., 2:66]
    options = (0.125, 40, 0, False)
    for a, b in zip(
        library.sm90_forward(q, k, v, *options), library.sm80_forward(q, k, v, *options), strict=True
    ):
        assert torch.equal(a, b)


def test_a_compiled_graph_may_get_unaligned_tensors_later() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k, v: flash_attn_func(q, k, v, causal=True, strict=True),
        fullgraph=True,
        backend="aot_eager",
    )
    aligned = torch.randn(3, 2, 90, 4, 64, device="cuda", dtype=torch.bfloat16)
    unaligned = torch.randn(3 * aligned[0].numel() + 1, device="cuda", dtype=torch.bfloat16)[1:]
    for q, k, v in (aligned, unaligned.view_as(aligned)):
        assert torch.equal(compiled(q, k, v), flash_attn_func(q, k, v, causal=True))


REPEATED: dict[str, dict[str, Any]] = {
    "dense": {"lengths": ((1000, 777), (1000, 777)), "heads": (8, 2)},
    "dense causal": {"lengths": ((1000, 1000),), "causal": True},
    "packed": {"lengths": ((1000, 777), (0, 5), (3, 1500), (900, 900)), "layout": "packed", "causal": True},
    "softcap and sink": {"softcap": 5.0, "sink_dtype": torch.float32, "lengths": ((600, 700), (600, 700))},
}


@pytest.mark.parametrize("head_dims", [(64, 64), (128, 128), (192, 128), (256, 256)])
@pytest.mark.parametrize("name", REPEATED)
def test_forward_gives_the_same_bits(name: str, head_dims: tuple[int, int]) -> None:
    tensors = make_tensors(AttentionCase(head_dims=head_dims, **REPEATED[name]))
    assert path_of(tensors) == "sm90"
    first = forward(tensors)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(first, forward(tensors), strict=True))


def test_graph_replay_of_a_dense_call() -> None:
    tensors = make_tensors(AttentionCase(lengths=((300, 200), (300, 200)), causal=True))
    assert path_of(tensors) == "sm90"
    graph, results = captured(lambda: forward(tensors))
    for _ in range(2):
        tensors.q.normal_()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(results, forward(tensors), strict=True))


@pytest.mark.parametrize(
    "options", [{}, {"softcap": 5.0, "sink_dtype": torch.float32}], ids=["plain", "softcap"]
)
def test_graph_replay_with_other_packed_lengths(options: dict[str, Any]) -> None:
    """Every replay needs a tile counter that starts at 0."""
    case = AttentionCase(lengths=((100, 100),) * 3, layout="packed", causal=True, **options)
    tensors = make_tensors(case)
    assert path_of(tensors) == "sm90"
    for x in (tensors.q, tensors.k, tensors.v):
        x.normal_()  # the rows after the last sequence too
    graph, results = captured(lambda: forward(tensors))
    for ends_q, ends_k in (
        ([0, 0, 7, 250], [0, 300, 300, 300]),
        ([0, 300, 300, 300], [0, 1, 2, 290]),
        ([0, 100, 200, 300], [0, 100, 200, 300]),
    ):
        tensors.layout["cu_seqlens_q"].copy_(torch.tensor(ends_q, dtype=torch.int32))
        tensors.layout["cu_seqlens_k"].copy_(torch.tensor(ends_k, dtype=torch.int32))
        for _ in range(2):
            graph.replay()
            assert all(torch.equal(a, b) for a, b in zip(results, forward(tensors), strict=True))


@pytest.fixture
def synchronisation_raises() -> Iterator[Callable[[], None]]:
    """Call it to make every host synchronisation raise, until the test ends."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("layout", ["dense", "packed", "seqused"])
def test_no_call_waits_for_the_device(layout: str, synchronisation_raises: Callable[[], None]) -> None:
    tensors = make_tensors(AttentionCase(layout=layout, causal=True, softcap=5.0, sink_dtype=torch.float32))
    assert path_of(tensors) == "sm90"
    public_results(tensors)
    synchronisation_raises()
    public_results(tensors)

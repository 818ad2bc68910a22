"""Dispatch is a pure function of the problem: walked here for GPUs that this machine need not have."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from typing import Any

import pytest
import torch
from flash_attn_kernels import call, explain, flash_attn_func, flash_attn_varlen_func
from flash_attn_kernels.dispatch import AttentionProblem, choose_path

HOT = AttentionProblem(
    device_type="cuda",
    compute_capability=(9, 0),
    dtype=torch.bfloat16,
    head_dim=128,
    head_dim_v=128,
    layout="dense",
    deterministic=False,
    needs_gradient=True,
    sums_broadcast_bias=False,
    library_error=None,
)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), (13, 7)])
def test_every_gpu_since_ampere_runs_the_kernels(capability: tuple[int, int]) -> None:
    explanation = choose_path(dataclasses.replace(HOT, compute_capability=capability))
    assert explanation.path == "sm80" and explanation.reasons == ()
    assert str(explanation) == "attention path: sm80"


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": torch.float16},
        {"head_dim": 1, "head_dim_v": 256},
        {"head_dim": 192},
        {"head_dim": 77, "head_dim_v": 33},
        {"layout": "packed"},
        {"layout": "paged", "needs_gradient": False},
        {"deterministic": True},
        {"sums_broadcast_bias": True},
    ],
    ids=str,
)
def test_the_kernels_run_all_of_this(change: dict[str, Any]) -> None:
    assert choose_path(dataclasses.replace(HOT, **change)).path == "sm80"


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"device_type": "cpu"}, "tensors are on cpu"),
        ({"device_type": "mps"}, "tensors are on mps"),
        ({"compute_capability": (7, 5)}, "compute capability 7.5 is below 8.0"),
        ({"dtype": torch.float32}, "dtype torch.float32 is neither float16 nor bfloat16"),
        ({"head_dim": 257}, "a head dim (q/k 257, v 128) is above 256"),
        ({"head_dim_v": 320}, "a head dim (q/k 128, v 320) is above 256"),
        ({"layout": "paged"}, "a gradient is needed through paged keys and values"),
        (
            {"deterministic": True, "sums_broadcast_bias": True},
            "deterministic is set, and the gradient of a broadcast attn_bias",
        ),
        ({"library_error": "no compiled kernels here"}, "no compiled kernels here"),
    ],
)
def test_each_obstacle_is_named(change: dict[str, Any], reason: str) -> None:
    explanation = choose_path(dataclasses.replace(HOT, **change))
    assert explanation.path == "portable"
    assert len(explanation.reasons) == 1 and reason in explanation.reasons[0]
    assert reason in str(explanation)


def test_all_obstacles_are_named_together() -> None:
    explanation = choose_path(
        dataclasses.replace(HOT, layout="paged", head_dim=500, dtype=torch.float64, library_error="none")
    )
    assert len(explanation.reasons) == 4


# What the public functions tell dispatch


@pytest.fixture
def problems(monkeypatch: pytest.MonkeyPatch) -> list[AttentionProblem]:
    """The problems that dispatch is asked about from here on."""
    asked: list[AttentionProblem] = []

    def record(problem: AttentionProblem) -> Any:
        asked.append(problem)
        return choose_path(problem)

    monkeypatch.setattr(call, "choose_path", record)
    monkeypatch.setattr(call, "_cached_plan", call._plan)
    return asked


Q = torch.zeros(2, 5, 4, 8, dtype=torch.float16)
V = torch.zeros(2, 5, 2, 6, dtype=torch.float16)
K = torch.zeros(2, 5, 2, 8, dtype=torch.float16)
CU = torch.tensor([0, 1, 2], dtype=torch.int32)
BIAS = torch.zeros(2, 4, 5, 5)


def test_a_plain_call(problems: list[AttentionProblem]) -> None:
    explain(Q, K, V)
    (problem,) = problems
    assert (problem.device_type, problem.dtype, problem.layout) == ("cpu", torch.float16, "dense")
    assert (problem.head_dim, problem.head_dim_v) == (8, 6)
    assert not (problem.deterministic or problem.needs_gradient or problem.sums_broadcast_bias)


@pytest.mark.parametrize("name", ["q", "k", "v", "attn_bias", "alibi_slopes", "learnable_sink"])
def test_any_tensor_can_need_a_gradient(problems: list[AttentionProblem], name: str) -> None:
    arguments = {"q": Q, "k": K, "v": V, "attn_bias": BIAS, "alibi_slopes": torch.ones(4)}
    arguments["learnable_sink"] = torch.ones(4)
    arguments[name] = arguments[name].clone().requires_grad_()
    explain(**arguments)
    with torch.no_grad():
        explain(**arguments)
    assert [problem.needs_gradient for problem in problems] == [True, False]


@pytest.mark.parametrize(
    "shape, is_broadcast",
    [((2, 4, 5, 5), False), ((5, 5), True), ((1, 4, 5, 5), True), ((2, 4, 5, 1), True), ((4, 1, 5), True)],
)
def test_a_broadcast_bias_with_a_deterministic_gradient(
    problems: list[AttentionProblem], shape: tuple[int, ...], is_broadcast: bool
) -> None:
    bias = torch.zeros(shape, requires_grad=True)
    explain(Q, K, V, attn_bias=bias, deterministic=True)
    assert problems.pop().sums_broadcast_bias == is_broadcast
    torch.use_deterministic_algorithms(True)
    try:
        explain(Q, K, V, attn_bias=bias)
    finally:
        torch.use_deterministic_algorithms(False)
    assert problems.pop().sums_broadcast_bias == is_broadcast
    explain(Q, K, V, attn_bias=bias.detach(), deterministic=True)
    assert not problems.pop().sums_broadcast_bias


def test_a_size_of_one_that_stands_for_itself_is_not_broadcast(problems: list[AttentionProblem]) -> None:
    bias = torch.zeros(1, 4, 5, 5, requires_grad=True)
    explain(Q[:1], K[:1], V[:1], attn_bias=bias, deterministic=True)
    assert not problems.pop().sums_broadcast_bias


def test_layouts(problems: list[AttentionProblem]) -> None:
    explain(Q[0], K[0], V[0], cu_seqlens_q=CU, cu_seqlens_k=CU)
    table = torch.zeros(2, 1, dtype=torch.int32)
    explain(Q[0], K, V, cu_seqlens_q=CU, cu_seqlens_k=CU, block_table=table)
    assert [problem.layout for problem in problems] == ["packed", "paged"]


def test_explain_takes_what_the_functions_take() -> None:
    names = list(inspect.signature(explain).parameters)
    dense = list(inspect.signature(flash_attn_func).parameters)
    assert names[: len(dense)] == dense
    assert set(names) == set(dense) | set(inspect.signature(flash_attn_varlen_func).parameters)
    with pytest.raises(ValueError, match="cu_seqlens_k: got NoneType"):
        explain(Q[0], K[0], V[0], cu_seqlens_q=CU)


# What happens on the portable path


def test_strict_raises_the_reasons() -> None:
    with pytest.raises(ValueError, match=r"strict: .*tensors are on cpu.*strict=False"):
        flash_attn_func(Q, K, V, strict=True)


def test_a_slow_path_on_a_gpu_warns_once_for_each_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call, "_warned_reasons", set())
    with pytest.warns(UserWarning, match=r"portable path.*because: a; b\. explain\(\)"):
        call._object_to_the_portable_path(("a", "b"), "cuda", False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call._object_to_the_portable_path(("a", "b"), "cuda", False)
        call._object_to_the_portable_path(("c",), "cpu", False)
        flash_attn_func(Q, K, V)
    with pytest.warns(UserWarning, match="because: c"):
        call._object_to_the_portable_path(("c",), "cuda", False)

"""Dispatch is a pure function of the problem: walked here for GPUs that this machine need not have."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import warnings
from typing import Any

import pytest
import torch
from flash_attn_kernels import (
    Explanation,
    call,
    explain,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    sm90,
)
from flash_attn_kernels.dispatch import AttentionProblem, choose_path
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

HOT = AttentionProblem(
    device_type="cuda",
    compute_capability=(9, 0),
    dtype=torch.bfloat16,
    head_dim=128,
    head_dim_v=128,
    layout="dense",
    softmax_scale=0.125,
    has_softcap=False,
    has_dropout=False,
    score_tensors=(),
    deterministic=False,
    needs_gradient=True,
    has_tangent=False,
    sums_broadcast_bias=False,
    library_error=None,
)
AMPERE = dataclasses.replace(HOT, compute_capability=(8, 0))


@pytest.mark.parametrize("capability", [(9, 0), (9, 3)])
def test_hopper_runs_its_own_kernels(capability: tuple[int, int]) -> None:
    chosen = choose_path(dataclasses.replace(HOT, compute_capability=capability))
    assert chosen == Explanation("sm90", {})
    assert str(chosen) == "attention path: sm90"


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (10, 0), (12, 0), (13, 7)])
def test_every_other_gpu_since_ampere_runs_the_sm80_kernels(capability: tuple[int, int]) -> None:
    chosen = choose_path(dataclasses.replace(HOT, compute_capability=capability))
    assert chosen.path == "sm80" and list(chosen.reasons) == ["sm90"]
    assert str(chosen) == (
        "attention path: sm80 (not sm90: compute capability "
        f"{capability[0]}.{capability[1]} is not 9.x: machine code for sm_90a runs on nothing else)"
    )


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": torch.float16},
        {"head_dim": 8, "head_dim_v": 256},
        {"head_dim": 192},
        {"layout": "packed"},
        {"deterministic": True},
        {"needs_gradient": False},
        {"softmax_scale": 1e-9},
    ],
    ids=str,
)
def test_the_sm90_kernels_run_all_of_this(change: dict[str, Any]) -> None:
    assert choose_path(dataclasses.replace(HOT, **change)).path == "sm90"


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"compute_capability": (8, 9)}, "compute capability 8.9 is not 9.x"),
        ({"compute_capability": (10, 0)}, "compute capability 10.0 is not 9.x"),
        ({"compute_capability": None}, "the compute capability is not known to be 9.x"),
        ({"head_dim": 77, "head_dim_v": 64}, "a head dim (q/k 77, v 64) is not a multiple of 8"),
        ({"head_dim_v": 36}, "a head dim (q/k 128, v 36) is not a multiple of 8"),
        ({"layout": "paged", "needs_gradient": False}, "keys and values are paged"),
        ({"has_dropout": True}, "dropout_p is above 0"),
        ({"softmax_scale": 0.0}, "softmax_scale 0.0 is not above 0"),
        ({"softmax_scale": -0.5}, "softmax_scale -0.5 is not above 0"),
        *(
            ({"score_tensors": (name,)}, f"{name} is given")
            for name in ("attn_bias", "attn_mask", "key_padding_mask", "alibi_slopes")
        ),
    ],
)
def test_each_obstacle_to_sm90_is_named(change: dict[str, Any], reason: str) -> None:
    chosen = choose_path(dataclasses.replace(HOT, **change))
    assert chosen.path == "sm80" and list(chosen.reasons) == ["sm90"]
    assert len(chosen.reasons["sm90"]) == 1 and chosen.reasons["sm90"][0].startswith(reason)
    assert f"attention path: sm80 (not sm90: {reason}" in str(chosen)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": torch.float16},
        {"head_dim": 1, "head_dim_v": 256},
        {"head_dim": 77, "head_dim_v": 33},
        {"layout": "packed"},
        {"layout": "paged", "needs_gradient": False},
        {"deterministic": True},
        {"sums_broadcast_bias": True, "score_tensors": ("attn_bias",)},
        {"has_dropout": True, "softmax_scale": -1.0},
    ],
    ids=str,
)
def test_the_sm80_kernels_run_all_of_this(change: dict[str, Any]) -> None:
    assert choose_path(dataclasses.replace(AMPERE, **change)).path == "sm80"


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
            {"deterministic": True, "sums_broadcast_bias": True, "score_tensors": ("attn_bias",)},
            "deterministic is set, and the gradient of a broadcast attn_bias",
        ),
        ({"has_tangent": True}, "a forward-mode derivative is needed"),
        ({"library_error": "no compiled kernels here"}, "no compiled kernels here"),
    ],
)
def test_each_obstacle_to_any_kernel_is_named(change: dict[str, Any], reason: str) -> None:
    chosen = choose_path(dataclasses.replace(HOT, **change))
    assert chosen.path == "portable" and list(chosen.reasons) == ["sm90", "sm80"]
    assert len(chosen.reasons["sm80"]) == 1 and reason in chosen.reasons["sm80"][0]
    assert reason in str(chosen)


def test_all_obstacles_are_named_together() -> None:
    chosen = choose_path(
        dataclasses.replace(HOT, layout="paged", head_dim=500, dtype=torch.float64, library_error="none")
    )
    assert len(chosen.reasons["sm80"]) == 4 and len(chosen.reasons["sm90"]) == 5
    assert str(chosen) == (
        "attention path: portable "
        "(not sm90: dtype torch.float64 is neither float16 nor bfloat16; a head dim (q/k 500, v 128) is above 256;"
        " none; a head dim (q/k 500, v 128) is not a multiple of 8; keys and values are paged) "
        "(not sm80: dtype torch.float64 is neither float16 nor bfloat16; a head dim (q/k 500, v 128) is above 256;"
        " none; a gradient is needed through paged keys and values)"
    )


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"head_dim": 96, "head_dim_v": 96}, "(q/k 96, v 96) is neither at most 64 nor from 97 to 128"),
        ({"head_dim": 192}, "(q/k 192, v 128) is neither at most 64 nor from 97 to 128"),
        ({"has_softcap": True}, "softcap is above 0"),
        ({"deterministic": True}, "deterministic is set"),
    ],
    ids=str,
)
def test_a_backward_of_the_sm80_kernels_has_a_reason(change: dict[str, Any], reason: str) -> None:
    problem = dataclasses.replace(HOT, **change)
    chosen = choose_path(problem)
    assert chosen.path == "sm90" and len(chosen.sm80_backward) == 1
    assert reason in chosen.sm80_backward[0]
    assert str(chosen) == f"attention path: sm90, backward: sm80 ({chosen.sm80_backward[0]})"
    assert choose_path(dataclasses.replace(problem, needs_gradient=False)) == Explanation("sm90", {})
    assert choose_path(dataclasses.replace(problem, compute_capability=(8, 0))).sm80_backward == ()


@pytest.mark.parametrize("head_dims", [(64, 64), (8, 40), (128, 128), (104, 8), (64, 128)])
@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_hopper_runs_its_own_backward(head_dims: tuple[int, int], layout: str) -> None:
    problem = dataclasses.replace(HOT, head_dim=head_dims[0], head_dim_v=head_dims[1], layout=layout)
    assert choose_path(problem) == Explanation("sm90", {})


def test_paths_passed_over_for_the_same_reasons_are_named_together() -> None:
    chosen = choose_path(dataclasses.replace(HOT, dtype=torch.float32))
    assert str(chosen) == (
        "attention path: portable (not sm90 or sm80: dtype torch.float32 is neither float16 nor bfloat16)"
    )


# What the public functions tell dispatch


@pytest.fixture
def problems(monkeypatch: pytest.MonkeyPatch, no_plans_kept: None) -> list[AttentionProblem]:
    """The problems that dispatch is asked about from here on."""
    asked: list[AttentionProblem] = []

    def record(problem: AttentionProblem) -> Any:
        asked.append(problem)
        return choose_path(problem)

    monkeypatch.setattr(call, "choose_path", record)
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
    assert problem.softmax_scale == 8**-0.5 and problem.score_tensors == ()
    assert not (problem.has_softcap or problem.has_dropout or problem.deterministic)
    assert not (problem.needs_gradient or problem.sums_broadcast_bias)


def test_options_and_tensors_that_rule_out_a_path(problems: list[AttentionProblem]) -> None:
    tensors = {
        "attn_bias": BIAS,
        "attn_mask": BIAS > 0,
        "key_padding_mask": torch.ones(2, 5) > 0,
        "alibi_slopes": torch.ones(4),
    }
    explain(Q, K, V, dropout_p=0.1, softmax_scale=-2.0, learnable_sink=torch.ones(4), **tensors)
    assert problems[-1].has_dropout and problems[-1].softmax_scale == -2.0
    assert problems[-1].score_tensors == tuple(tensors)
    for name, x in tensors.items():
        explain(Q, K, V, **{name: x})
        assert problems[-1].score_tensors == (name,)
    explain(Q, K, V, learnable_sink=torch.ones(4), softcap=3.0, window_size=(1, 2))
    assert problems[-1].score_tensors == () and problems[-1].has_softcap


@pytest.mark.parametrize("name", ["q", "k", "v", "attn_bias", "alibi_slopes", "learnable_sink"])
def test_any_tensor_can_need_a_gradient(problems: list[AttentionProblem], name: str) -> None:
    arguments = {"q": Q, "k": K, "v": V, "attn_bias": BIAS, "alibi_slopes": torch.ones(4)}
    arguments["learnable_sink"] = torch.ones(4)
    arguments[name] = arguments[name].clone().requires_grad_()
    explain(**arguments)
    with torch.no_grad():
        explain(**arguments)
    assert [problem.needs_gradient for problem in problems] == [True, False]


@pytest.mark.parametrize("name", ["q", "k", "v", "attn_bias", "alibi_slopes", "learnable_sink"])
@pytest.mark.parametrize("with_functorch", [False, True])
def test_any_tensor_can_have_a_tangent(
    problems: list[AttentionProblem], name: str, with_functorch: bool
) -> None:
    arguments = {"q": Q, "k": K, "v": V}
    if name not in arguments:
        arguments[name] = BIAS if name == "attn_bias" else torch.ones(4)

    def ask(x: torch.Tensor) -> torch.Tensor:
        explain(**{**arguments, name: x})
        return x

    x, tangent = arguments[name], torch.ones_like(arguments[name])
    if with_functorch:
        torch.func.jvp(ask, (x,), (tangent,))
    else:
        with forward_ad.dual_level():
            ask(forward_ad.make_dual(x, tangent))
            ask(x)
    ask(x)
    assert [problem.has_tangent for problem in problems][:1] == [True]
    assert not any(problem.has_tangent for problem in problems[1:])


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


# Plans of plain calls are kept


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, no_plans_yet: None) -> list[AttentionProblem]:
    """The problems that dispatch is asked about, without plans from earlier calls."""
    problems: list[AttentionProblem] = []
    monkeypatch.setattr(call, "choose_path", lambda problem: problems.append(problem) or choose_path(problem))
    return problems


def test_dispatch_is_asked_once_for_calls_that_agree(asked: list[AttentionProblem]) -> None:
    for _ in range(3):
        explain(Q, K, V, causal=True)
        explain(Q.clone(), K.clone(), V.clone(), causal=True, window_size=[-1, -1])
    assert len(asked) == 1
    explain(Q, K, V, causal=True, softmax_scale=0.5)
    explain(Q.clone().requires_grad_(), K, V, causal=True)
    explain(Q.bfloat16(), K.bfloat16(), V.bfloat16(), causal=True)
    assert len(asked) == 4


def test_a_kept_plan_lets_no_wrong_call_through(asked: list[AttentionProblem]) -> None:
    explain(Q, K, V)
    meta = torch.device("meta")
    for wrong in (
        (Q, K, V[:, :4]),
        (Q, K.float(), V),
        (Q, K, V.float()),
        (Q, K.to(meta), V),
        (Q, K, V.to(meta)),
        (Q[:1], K, V),
        (Q, K, V.numpy()),
    ):
        with pytest.raises(ValueError, match="Fix: "):
            explain(*wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dropout_p"):
        explain(Q, K, V, dropout_p=1.0)


def test_a_limited_number_of_plans_is_kept(asked: list[AttentionProblem]) -> None:
    for length in range(1, call._PLANS_KEPT + 10):
        x = torch.zeros(1, length, 1, 8, dtype=torch.float16)
        explain(x, x, x)
    assert 0 < len(call._plans_of_plain_calls) <= call._PLANS_KEPT
    assert len(asked) == 1  # lengths do not matter to it


def test_symbolic_lengths_have_plans_that_are_not_kept(asked: list[AttentionProblem]) -> None:
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        x = mode.from_tensor(
            Q, symbolic_context=StatelessSymbolicContext([DimDynamic.DYNAMIC, *[DimDynamic.STATIC] * 3])
        )
        assert explain(x, x, x).path == "portable"
    assert not call._plans_of_plain_calls


# Alignment, which is asked of the tensors themselves


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch, no_plans_kept: None) -> None:
    """Dispatch takes everything for the hot case."""
    monkeypatch.setattr(call, "choose_path", lambda problem: choose_path(HOT))


X = torch.zeros(2, 5, 4, 8, dtype=torch.float16)


def spaced(width: int, begin: int = 0) -> torch.Tensor:
    """As X, in rows of ``width`` elements from ``begin`` on."""
    return torch.zeros(2, 5, 4, width, dtype=torch.float16)[..., begin : begin + 8]


@pytest.mark.parametrize(
    "x",
    [
        X,
        spaced(16),
        spaced(16, begin=8),
        X.transpose(1, 2).contiguous().transpose(1, 2),
        X[:1, :, :1].expand(2, 5, 4, 8),
        spaced(12)[:1, :1, :1],  # strides that nobody walks
        torch.zeros(2, 5, 4, 16, dtype=torch.float16)[..., ::2],  # copied by the operator
        X[:0],
    ],
    ids=lambda x: str((*x.shape, *x.stride())),
)
def test_aligned_rows(on_hopper: None, x: torch.Tensor) -> None:
    assert explain(x, x, x) == Explanation("sm90", {})


@pytest.mark.parametrize(
    "x", [spaced(12), spaced(16, begin=1), spaced(16, begin=4)], ids=lambda x: str(x.stride())
)
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_unaligned_rows(on_hopper: None, x: torch.Tensor, name: str) -> None:
    chosen = explain(**{"q": X, "k": X, "v": X, name: x})
    assert chosen.path == "sm80" and list(chosen.reasons) == ["sm90"]
    assert chosen.reasons["sm90"] == (
        f"rows of {name} are not 16-byte aligned: address {x.data_ptr():#x}, strides {x.stride()}",
    )


def test_few_queries_of_small_heads_have_an_sm80_backward(on_hopper: None) -> None:
    def reasons(*shape: int, **lengths: torch.Tensor) -> tuple[str, ...]:
        x = torch.zeros(shape, dtype=torch.float16, requires_grad=True)
        chosen = explain(x, x, x, **lengths)
        assert chosen.path == "sm90"
        with torch.no_grad():
            assert explain(x, x, x, **lengths).sm80_backward == ()
        return chosen.sm80_backward

    for rows in (1, 64, 129, 192):
        assert reasons(2, rows, 4, 8) == (f"{rows} queries leave half of a tile of 128 empty",)
    for rows in (0, 65, 128, 193, 300):
        assert reasons(2, rows, 4, 64) == ()
    assert reasons(2, 3, 4, 104) == ()
    cu_seqlens = torch.tensor([0, 500, 511], dtype=torch.int32)
    packed = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
    assert reasons(511, 4, 64, **packed) == ("511 queries of 2 sequences are below 256 each",)
    assert reasons(512, 4, 64, **packed) == reasons(511, 4, 128, **packed) == ()


def test_fake_tensors_count_as_aligned(on_hopper: None) -> None:
    with FakeTensorMode():
        x = torch.empty(2, 5, 4, 8, dtype=torch.float16)
        assert explain(x, x, x).path == "sm90"


def test_a_call_does_not_ask_for_alignment(on_hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves that to the operator."""
    monkeypatch.setattr(sm90, "unaligned_rows", None)
    monkeypatch.setattr(sm90.library, "sm90_forward_dense", lambda q, k, v, *options: (q, k))
    assert flash_attn_func(X, X, X) is X


# What happens on the portable path


def test_strict_raises_the_reasons() -> None:
    with pytest.raises(ValueError, match=r"strict: .*tensors are on cpu.*strict=False"):
        flash_attn_func(Q, K, V, strict=True)


def test_a_slow_path_on_a_gpu_warns_once_for_each_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call, "_warned_reasons", set())
    with pytest.warns(UserWarning, match=r"portable path.*because: a; b\. explain\(\)"):
        call.object_to_the_portable_path(("a", "b"), "cuda", False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call.object_to_the_portable_path(("a", "b"), "cuda", False)
        call.object_to_the_portable_path(("c",), "cpu", False)
        flash_attn_func(Q, K, V)
    with pytest.warns(UserWarning, match="because: c"):
        call.object_to_the_portable_path(("c",), "cuda", False)


@pytest.mark.parametrize("function", [flash_attn_func, flash_attn_with_kvcache])
def test_the_warning_points_at_the_call(function, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call, "_warned_reasons", set())
    with FakeTensorMode(), pytest.warns(UserWarning, match="portable path") as caught:
        q = torch.empty(1, 2, 1, 8, device="cuda")
        with contextlib.suppress(RuntimeError):  # there is no GPU to go on with
            function(q, q, q)
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize("path", ["sm80", "sm90"])
def test_passing_over_sm90_neither_warns_nor_raises(
    path: str, monkeypatch: pytest.MonkeyPatch, no_plans_kept: None
) -> None:
    for operator in ("sm80_forward_dense", "sm90_forward_dense"):
        monkeypatch.setattr(call.library, operator, lambda q, k, v, *options: (q, k))
    problem = HOT if path == "sm90" else AMPERE
    monkeypatch.setattr(call, "choose_path", lambda _: choose_path(problem))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert flash_attn_func(X, X, X, strict=True) is X

"""Which parts of dense layers become epilogues: a pure function, of problems on a GPU that need not be there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from flash_attn_kernels import gemm
from flash_attn_ops.fused_dense import plans
from flash_attn_ops.fused_dense.plans import MlpProblem, Plan, plan_linear, plan_mlp

GELU = MlpProblem(2000, 512, 2048, 512, torch.bfloat16, "cuda", "gelu_tanh", False, True, 0)
RELU = replace(GELU, activation="relu")


@pytest.fixture(autouse=True)
def library_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "load_error", lambda: None)


@pytest.mark.parametrize(
    ("problem", "forward", "backward", "bias"),
    [
        (GELU, True, True, True),
        (RELU, True, True, True),
        (replace(GELU, tokens=999), True, True, True),
        (replace(GELU, dtype=torch.float16), True, True, True),
        (replace(GELU, checkpoint_lvl=1), True, True, True),
        (replace(RELU, checkpoint_lvl=2), True, True, True),
        (replace(RELU, checkpoint_lvl=1), True, False, True),  # a bit mask is no activation
        (replace(RELU, hidden_features=2056), True, False, True),  # no room for a bit mask
        (replace(GELU, hidden_features=2056), True, True, True),
        (replace(GELU, has_bias1=False), False, True, True),
        (replace(RELU, has_bias1=False), False, False, True),
        (replace(GELU, activation="gelu"), False, False, True),
        (replace(GELU, activation="squared_relu"), False, False, True),
        (replace(GELU, gated=True), False, False, True),
        (replace(GELU, hidden_features=2047), False, False, False),
        (replace(GELU, in_features=511), False, True, True),
        (replace(GELU, out_features=511), True, False, False),
        (replace(GELU, tokens=0), False, False, False),
        (replace(GELU, dtype=torch.float32), False, False, False),
        (replace(GELU, device_type="cpu"), False, False, False),
    ],
    ids=str,
)
def test_everything_that_can_be_is_an_epilogue(
    problem: MlpProblem, forward: bool, backward: bool, bias: bool
) -> None:
    assert plan_mlp(problem, 3) == Plan(forward, backward, bias, algorithm=3)
    assert plan_mlp(problem, -1) == Plan()


@pytest.mark.parametrize("problem", [GELU, RELU], ids=["gelu", "relu"])
def test_auto_is_the_table(problem: MlpProblem, monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan_mlp(problem, "auto") == plans.AUTO[problem.activation]
    for wanted in (Plan(), Plan(forward=True), Plan(bias=True), Plan(True, True, True), Plan(products=True)):
        monkeypatch.setitem(plans.AUTO, problem.activation, wanted)
        assert plan_mlp(problem, "auto") == wanted
        tuned = replace(wanted, products=True, algorithm=gemm.FASTEST)
        assert plan_mlp(problem, "tune") == tuned
        assert plan_mlp(replace(problem, device_type="cpu"), "auto") == Plan()
        assert plan_mlp(replace(problem, tokens=plans.AUTO_MIN_TOKENS - 1), "auto") == Plan()
        assert plan_mlp(replace(problem, tokens=1), "tune").products


def test_auto_of_other_activations() -> None:
    for other in (replace(GELU, activation="squared_relu"), replace(GELU, activation="silu", gated=True)):
        assert plan_mlp(other, "auto") == plans.AUTO_OTHERS == Plan(bias=True)


@pytest.mark.parametrize(
    ("change", "products"),
    [
        ({}, True),
        ({"tokens": 999}, True),
        ({"gated": True, "hidden_features": 2048}, True),
        ({"in_features": 511}, False),
        ({"hidden_features": 2047}, False),
        ({"out_features": 511}, False),
        ({"tokens": 0}, False),
        ({"dtype": torch.float32}, False),
        ({"device_type": "cpu"}, False),
    ],
    ids=str,
)
def test_which_products_are_tuned(change: dict, products: bool) -> None:
    assert plan_mlp(replace(GELU, **change), "tune").products == products
    assert not plan_mlp(replace(GELU, **change), 0).products


def test_relu_without_its_backward_keeps_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plans.AUTO, "relu", Plan(forward=True))
    assert plan_mlp(replace(RELU, hidden_features=2056), "auto") == Plan(forward=True)
    monkeypatch.setitem(plans.AUTO, "relu", Plan(backward=True))
    assert plan_mlp(RELU, "auto") == Plan(), "the mask comes from the forward"


def test_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (1000, 512, 256, torch.bfloat16, "cuda")
    assert plan_linear(*arguments, 2) == Plan(bias=True, algorithm=2)
    assert plan_linear(*arguments, "tune") == Plan(products=True, algorithm=gemm.FASTEST)
    assert not plan_linear(1000, 511, 256, torch.bfloat16, "cuda", "tune").products
    assert plan_linear(*arguments, -1) == Plan()
    assert not plan_linear(1000, 512, 257, torch.bfloat16, "cuda", 2).bias
    assert not plan_linear(1000, 512, 256, torch.float32, "cuda", 2).bias
    for wanted in (True, False):
        monkeypatch.setattr(plans, "AUTO_LINEAR", Plan(bias=wanted))
        assert plan_linear(*arguments, "auto").bias == wanted


def test_without_the_library_nothing_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "load_error", lambda: "not there")
    assert plan_mlp(GELU, 0) == Plan() and plan_linear(8, 8, 8, torch.bfloat16, "cuda", 0) == Plan()

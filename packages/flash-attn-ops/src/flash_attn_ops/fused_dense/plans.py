"""Which parts of a dense layer are the epilogue of a cuBLASLt product: a pure function of the problem.

The alternative to an epilogue is a product of torch's followed by a kernel that takes the activation, or its gradient
and the sums for the bias, in one pass over memory. Which is faster depends on how good cuBLASLt's kernels with that
epilogue are, on a given GPU: ``AUTO`` is the outcome of measuring it (benchmarks/bench_fused_dense.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from flash_attn_kernels import gemm
from flash_attn_kernels.gemm import Epilogue

from flash_attn_ops.arguments import bad_argument

Heuristic = int | Literal["auto", "tune"]
NO_EPILOGUES = -1


@dataclass(frozen=True)
class Plan:
    """What runs as an epilogue, and which of cuBLASLt's candidates (``gemm.FASTEST``: the one a timing finds)."""

    forward: bool = False  # bias and activation, and what the backward needs
    backward: bool = False  # gradient of the activation, and the sums for the first bias
    bias: bool = False  # the sums for the bias of a layer, in the product of its weight gradient
    products: bool = (
        False  # not an epilogue: cuBLASLt is called for the other products too, for its candidates
    )
    algorithm: int = 0


@dataclass(frozen=True)
class MlpProblem:
    """What the choice may look at. ``gated``: the first product is a packed gate and value."""

    tokens: int
    in_features: int
    hidden_features: int
    out_features: int
    dtype: torch.dtype
    device_type: str
    activation: str
    gated: bool
    has_bias1: bool
    checkpoint_lvl: int


# On an H100: the backward epilogues take 1.4 times the time of a product and a kernel; the forward ones and the sums
# for the second bias save 1 % each of forward and backward together.
AUTO = {
    "gelu_tanh": Plan(forward=True, bias=True),
    "relu": Plan(forward=True, bias=True),
}
AUTO_OTHERS = Plan(bias=True)  # for the activations that cuBLASLt does not have
AUTO_LINEAR = Plan()
AUTO_MIN_TOKENS = 1024  # below, what lies between two products stays in cache


def check_heuristic(heuristic: object) -> None:
    is_index = isinstance(heuristic, int) and not isinstance(heuristic, bool) and heuristic >= NO_EPILOGUES
    if not is_index and heuristic not in ("auto", "tune"):
        expected = "'auto', 'tune', -1 (no epilogues) or the index of a candidate of cuBLASLt"
        raise bad_argument("heuristic", repr(heuristic), expected, "use 'auto'")


def plan_mlp(problem: MlpProblem, heuristic: Heuristic) -> Plan:
    """The plan of ``mlp`` or ``gated_mlp``: what is wanted, less what cuBLASLt cannot do."""
    auto = AUTO.get(problem.activation, AUTO_OTHERS) if problem.tokens >= AUTO_MIN_TOKENS else Plan()
    wanted = _wanted(heuristic, auto)
    is_relu = problem.activation == "relu"
    has_epilogue = problem.activation in AUTO and not problem.gated
    # The bit mask of a relu is read by nothing but the backward epilogue, and does not bring back the activation.
    masks = is_relu and wanted.backward and wanted.forward and problem.checkpoint_lvl != 1
    forward = wanted.forward and has_epilogue and problem.has_bias1
    if forward:
        epilogue = Epilogue.RELU_AUX_BIAS if masks else Epilogue.GELU_AUX_BIAS
        forward = _can(problem, epilogue, problem.tokens, problem.hidden_features, problem.in_features)
        if not forward and masks:  # the activation without a mask takes any multiple of 8
            masks = False
            forward = _can(
                problem, Epilogue.RELU_BIAS, problem.tokens, problem.hidden_features, problem.in_features
            )
    backward = wanted.backward and has_epilogue and (not is_relu or (masks and forward))
    if backward:
        epilogue = Epilogue.RELU_BIAS_GRADIENT if is_relu else Epilogue.GELU_BIAS_GRADIENT
        backward = _can(problem, epilogue, problem.tokens, problem.hidden_features, problem.out_features)
    bias = wanted.bias and _can(
        problem, Epilogue.BIAS_GRADIENT, problem.out_features, problem.hidden_features, problem.tokens
    )
    width = problem.hidden_features * (2 if problem.gated else 1)
    products = (
        wanted.products
        and _can(problem, Epilogue.NONE, problem.tokens, width, problem.in_features)
        and _can(problem, Epilogue.NONE, problem.tokens, problem.out_features, problem.hidden_features)
    )
    return Plan(forward, backward, bias, products, wanted.algorithm)


def plan_linear(
    tokens: int,
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
    device_type: str,
    heuristic: Heuristic,
) -> Plan:
    """The plan of ``linear``. Its bias is an epilogue of torch's product already."""
    wanted = _wanted(heuristic, AUTO_LINEAR)
    sizes = (out_features, in_features, tokens)
    bias = wanted.bias and gemm.why_not(Epilogue.BIAS_GRADIENT, *sizes, dtype, device_type) is None
    sizes = (tokens, out_features, in_features)
    products = wanted.products and gemm.why_not(Epilogue.NONE, *sizes, dtype, device_type) is None
    return Plan(bias=bias, products=products, algorithm=wanted.algorithm)


def _wanted(heuristic: Heuristic, auto: Plan) -> Plan:
    """The plan before it is asked what cuBLASLt can do."""
    if heuristic == "auto":
        return auto
    if heuristic == "tune":
        return Plan(auto.forward, auto.backward, auto.bias, True, gemm.FASTEST)
    if heuristic == NO_EPILOGUES:
        return Plan()
    return Plan(forward=True, backward=True, bias=True, algorithm=int(heuristic))


def _can(problem: MlpProblem, epilogue: Epilogue, m: int, n: int, k: int) -> bool:
    return gemm.why_not(epilogue, m, n, k, problem.dtype, problem.device_type) is None

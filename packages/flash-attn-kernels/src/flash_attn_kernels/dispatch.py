"""Which path runs an attention call, and why: a pure function of a problem description."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

MAX_HEAD_DIM = 256
KERNEL_DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class AttentionProblem:
    """Everything that dispatch may look at. ``library_error`` says why the compiled kernels cannot be used, if so."""

    device_type: str
    compute_capability: tuple[int, int] | None  # None is unknown: there is no such device to ask
    dtype: torch.dtype
    head_dim: int
    head_dim_v: int
    layout: str  # "dense", "packed" or "paged"
    softmax_scale: float
    has_softcap: bool
    has_dropout: bool
    score_tensors: tuple[str, ...]  # names of the biases, masks and slopes that there are
    deterministic: bool
    needs_gradient: bool
    has_tangent: bool  # a forward-mode derivative is needed
    sums_broadcast_bias: (
        bool  # a gradient is needed of a bias whose elements are added to several scores each
    )
    library_error: str | None


@dataclass(frozen=True)
class Explanation:
    """The chosen path and, for each faster one that was passed over, the reasons. ``str()`` says both in words.

    ``sm80_backward``: on the path sm90, why the sm80 kernels run the backward; empty if they do not, or there is none.
    """

    path: str
    reasons: Mapping[str, tuple[str, ...]]
    sm80_backward: tuple[str, ...] = ()

    def __str__(self) -> str:
        paths_of: dict[
            tuple[str, ...], list[str]
        ] = {}  # paths passed over for the same reasons are said together
        for path, reasons in self.reasons.items():
            paths_of.setdefault(reasons, []).append(path)
        passed_over = (f" (not {' or '.join(paths)}: {'; '.join(why)})" for why, paths in paths_of.items())
        backward = f", backward: sm80 ({'; '.join(self.sm80_backward)})" if self.sm80_backward else ""
        return f"attention path: {self.path}{backward}{''.join(passed_over)}"


def choose_path(problem: AttentionProblem) -> Explanation:
    """The fastest path that computes the problem exactly."""
    passed_over: dict[str, tuple[str, ...]] = {}
    for path, why_not in _WHY_NOT.items():
        reasons = why_not(problem)
        if not reasons:
            explanation = Explanation(path, passed_over)
            if path == "sm90" and problem.needs_gradient:
                return replace(explanation, sm80_backward=_why_sm80_backward(problem))
            return explanation
        passed_over[path] = reasons
    return Explanation("portable", passed_over)


def _why_not_sm90(problem: AttentionProblem) -> tuple[str, ...]:
    if problem.device_type != "cuda":
        return (_not_on_a_gpu(problem),)
    reasons = []
    if problem.compute_capability is None:
        reasons.append("the compute capability is not known to be 9.x")
    elif problem.compute_capability[0] != 9:
        major, minor = problem.compute_capability
        reasons.append(
            f"compute capability {major}.{minor} is not 9.x: machine code for sm_90a runs on nothing else"
        )
    reasons += _why_no_kernel(problem)
    if problem.head_dim % 8 != 0 or problem.head_dim_v % 8 != 0:
        reasons.append(f"a head dim ({_head_dims(problem)}) is not a multiple of 8")
    if problem.layout == "paged":
        reasons.append("keys and values are paged")
    if problem.has_dropout:
        reasons.append("dropout_p is above 0")
    reasons += [f"{name} is given" for name in problem.score_tensors]
    if not problem.softmax_scale > 0.0:
        reasons.append(f"softmax_scale {problem.softmax_scale} is not above 0")
    return tuple(reasons)


def _why_sm80_backward(problem: AttentionProblem) -> tuple[str, ...]:
    """Of a problem whose forward the sm90 kernels run. The operator decides by the same conditions."""
    reasons = []
    larger = max(problem.head_dim, problem.head_dim_v)
    if not (larger <= 64 or 96 < larger <= 128):
        reasons.append(
            f"the larger head dim ({_head_dims(problem)}) is neither at most 64 nor from 97 to 128"
        )
    if problem.has_softcap:
        reasons.append("softcap is above 0")
    if problem.deterministic:
        reasons.append("deterministic is set")
    return tuple(reasons)


def _why_not_sm80(problem: AttentionProblem) -> tuple[str, ...]:
    if problem.device_type != "cuda":
        return (_not_on_a_gpu(problem),)
    reasons = []
    if problem.compute_capability is not None and problem.compute_capability < (8, 0):
        major, minor = problem.compute_capability
        reasons.append(f"compute capability {major}.{minor} is below 8.0")
    reasons += _why_no_kernel(problem)
    if problem.layout == "paged" and problem.needs_gradient:
        reasons.append("a gradient is needed through paged keys and values")
    if problem.deterministic and problem.sums_broadcast_bias:
        reasons.append(
            "deterministic is set, and the gradient of a broadcast attn_bias is summed in no fixed order"
        )
    return tuple(reasons)


# Fastest first. The portable path, which runs everything, comes after all of them.
_WHY_NOT: dict[str, Callable[[AttentionProblem], tuple[str, ...]]] = {
    "sm90": _why_not_sm90,
    "sm80": _why_not_sm80,
}


def _why_no_kernel(problem: AttentionProblem) -> list[str]:
    """What rules out every compiled kernel."""
    reasons = []
    if problem.dtype not in KERNEL_DTYPES:
        reasons.append(f"dtype {problem.dtype} is neither float16 nor bfloat16")
    if max(problem.head_dim, problem.head_dim_v) > MAX_HEAD_DIM:
        reasons.append(f"a head dim ({_head_dims(problem)}) is above {MAX_HEAD_DIM}")
    if problem.has_tangent:
        reasons.append("a forward-mode derivative is needed")
    if problem.library_error is not None:
        reasons.append(problem.library_error)
    return reasons


def _not_on_a_gpu(problem: AttentionProblem) -> str:
    return f"tensors are on {problem.device_type}, the CUDA kernels need an NVIDIA GPU"


def _head_dims(problem: AttentionProblem) -> str:
    return f"q/k {problem.head_dim}, v {problem.head_dim_v}"

"""Which path runs an attention call, and why: a pure function of a problem description."""

from __future__ import annotations

from dataclasses import dataclass

import torch

SM80_MAX_HEAD_DIM = 256
SM80_DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class AttentionProblem:
    """Everything that dispatch may look at. ``library_error`` says why the compiled kernels cannot be used, if so."""

    device_type: str
    compute_capability: tuple[int, int] | None
    dtype: torch.dtype
    head_dim: int
    head_dim_v: int
    layout: str  # "dense", "packed" or "paged"
    deterministic: bool
    needs_gradient: bool
    sums_broadcast_bias: (
        bool  # a gradient is needed of a bias whose elements are added to several scores each
    )
    library_error: str | None


@dataclass(frozen=True)
class Explanation:
    """The chosen path and, for each faster one that was passed over, the reasons."""

    path: str
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        if not self.reasons:
            return f"attention path: {self.path}"
        return f"attention path: {self.path} (not sm80: {'; '.join(self.reasons)})"


def choose_path(problem: AttentionProblem) -> Explanation:
    """The fastest path that computes the problem exactly."""
    reasons = _why_not_sm80(problem)
    return Explanation("portable", reasons) if reasons else Explanation("sm80", ())


def _why_not_sm80(problem: AttentionProblem) -> tuple[str, ...]:
    if problem.device_type != "cuda":
        return (f"tensors are on {problem.device_type}, the CUDA kernels need an NVIDIA GPU",)
    reasons = []
    if problem.compute_capability is not None and problem.compute_capability < (8, 0):
        major, minor = problem.compute_capability
        reasons.append(f"compute capability {major}.{minor} is below 8.0")
    if problem.dtype not in SM80_DTYPES:
        reasons.append(f"dtype {problem.dtype} is neither float16 nor bfloat16")
    if max(problem.head_dim, problem.head_dim_v) > SM80_MAX_HEAD_DIM:
        dims = f"q/k {problem.head_dim}, v {problem.head_dim_v}"
        reasons.append(f"a head dim ({dims}) is above {SM80_MAX_HEAD_DIM}")
    if problem.layout == "paged" and problem.needs_gradient:
        reasons.append("a gradient is needed through paged keys and values")
    if problem.deterministic and problem.sums_broadcast_bias:
        reasons.append(
            "deterministic is set, and the gradient of a broadcast attn_bias is summed in no fixed order"
        )
    if problem.library_error is not None:
        reasons.append(problem.library_error)
    return tuple(reasons)

"""Which path runs an attention call, and why: a pure function of a problem description."""

from __future__ import annotations

from dataclasses import dataclass

import torch

SM80_HEAD_DIMS = (64, 128)
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
    softmax_scale_is_positive: bool
    has_softcap: bool
    has_alibi: bool
    has_dropout: bool
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
    if problem.head_dim != problem.head_dim_v or problem.head_dim not in SM80_HEAD_DIMS:
        dims = " or ".join(map(str, SM80_HEAD_DIMS))
        reasons.append(f"head dims (q/k {problem.head_dim}, v {problem.head_dim_v}) are not both {dims}")
    if problem.layout != "dense":
        reasons.append(f"{problem.layout} sequences")
    if not problem.softmax_scale_is_positive:
        reasons.append("softmax_scale is not positive")
    for present, name in (
        (problem.has_softcap, "softcap"),
        (problem.has_alibi, "alibi_slopes"),
        (problem.has_dropout, "dropout_p"),
    ):
        if present:
            reasons.append(f"{name} is set")
    if problem.library_error is not None:
        reasons.append(problem.library_error)
    return tuple(reasons)

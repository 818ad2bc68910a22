"""Dispatch is a pure function of the problem: walked here for GPUs that this machine need not have."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from flash_attn_kernels.dispatch import AttentionProblem, choose_path

HOT = AttentionProblem(
    device_type="cuda",
    compute_capability=(9, 0),
    dtype=torch.bfloat16,
    head_dim=128,
    head_dim_v=128,
    layout="dense",
    softmax_scale_is_positive=True,
    has_softcap=False,
    has_alibi=False,
    has_dropout=False,
    library_error=None,
)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), (13, 7)])
def test_every_gpu_since_ampere_runs_the_kernels(capability: tuple[int, int]) -> None:
    explanation = choose_path(dataclasses.replace(HOT, compute_capability=capability))
    assert explanation.path == "sm80" and explanation.reasons == ()
    assert str(explanation) == "attention path: sm80"


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"device_type": "cpu"}, "tensors are on cpu"),
        ({"device_type": "mps"}, "tensors are on mps"),
        ({"compute_capability": (7, 5)}, "compute capability 7.5 is below 8.0"),
        ({"dtype": torch.float32}, "dtype torch.float32 is neither float16 nor bfloat16"),
        ({"head_dim": 80, "head_dim_v": 80}, "head dims (q/k 80, v 80) are not both 64 or 128"),
        ({"head_dim_v": 64}, "head dims (q/k 128, v 64)"),
        ({"layout": "packed"}, "packed sequences"),
        ({"layout": "paged"}, "paged sequences"),
        ({"softmax_scale_is_positive": False}, "softmax_scale is not positive"),
        ({"has_softcap": True}, "softcap is set"),
        ({"has_alibi": True}, "alibi_slopes is set"),
        ({"has_dropout": True}, "dropout_p is set"),
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
        dataclasses.replace(HOT, has_softcap=True, has_dropout=True, dtype=torch.float64)
    )
    assert len(explanation.reasons) == 3

"""Where kernel tests run: on the GPU; without one, on the CPU in a process in which Triton interprets.

A test marked ``gpu`` that asks for the fixture ``device`` runs in both places; any other needs a GPU.
"""

from __future__ import annotations

import pytest
import torch
from flash_attn_ops.dispatch import TRITON_INTERPRETS


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    reason = "needs an NVIDIA GPU, and torch sees none"
    for item in items:
        runs_interpreted = TRITON_INTERPRETS and "device" in getattr(item, "fixturenames", ())
        if "gpu" in item.keywords and not runs_interpreted:
            hint = "; test_ops_interpreter.py runs it on the CPU" if "device" in item.fixturenames else ""
            item.add_marker(pytest.mark.skip(reason=reason + hint))


@pytest.fixture
def device() -> str:
    """Where the kernels run."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)

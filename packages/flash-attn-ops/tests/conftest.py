"""Where kernel tests run: on the GPU; without one, on the CPU in a process in which Triton interprets.

A test marked ``gpu`` that asks for the fixture ``device`` runs in both places; any other needs a GPU.
"""

from __future__ import annotations

import pytest
import torch
from flash_attn_ops.dispatch import TRITON_INTERPRETS
from flash_attn_ops.norm import tiles


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


@pytest.fixture
def many_norm_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows are taken for many, so that small tests see what large inputs see. Tiles of one test, which changes
    limits, are not remembered for another."""
    for name in ("forward_tile", "backward_tile", "backward_tile_of_few_rows", "backward_plan"):
        monkeypatch.setattr(tiles, name, getattr(tiles, name).__wrapped__)
    monkeypatch.setattr(tiles, "MAX_VALUES_OF_ONE_PROGRAM", 0)

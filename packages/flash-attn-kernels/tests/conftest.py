"""GPU tests are skipped, with the reason, where there is no NVIDIA GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from flash_attn_kernels import call, dispatch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU, and torch sees none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(params=["fastest", "sm80"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The kernels that calls run: the fastest for the GPU or, where those are others, the sm80 ones too."""
    if request.param == "fastest":
        yield request.param
        return
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the sm80 kernels are this GPU's fastest")
    monkeypatch.delitem(dispatch._WHY_NOT, "sm90")
    call._cached_plan.cache_clear()
    yield request.param
    call._cached_plan.cache_clear()

"""GPU tests are skipped, with the reason, where there is no NVIDIA GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

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


@pytest.fixture
def hopper() -> None:
    """For what other GPUs have no kernels for."""
    major, minor = torch.cuda.get_device_capability()
    if major != 9:
        pytest.skip(f"needs a GPU of compute capability 9.x, this one has {major}.{minor}")


@pytest.fixture(params=["fastest", "sm80"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The kernels that calls run: the fastest for the GPU or, where those are others, the sm80 ones too."""
    if request.param == "fastest":
        yield request.param
        return
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the sm80 kernels are this GPU's fastest")
    # Replaced, not changed: an item that is deleted and restored comes last, and the order is that of preference.
    others = {path: why_not for path, why_not in dispatch._WHY_NOT.items() if path != "sm90"}
    monkeypatch.setattr(dispatch, "_WHY_NOT", others)
    _forget_plans()
    yield request.param
    _forget_plans()


def _forget_plans() -> None:
    call._cached_plan.cache_clear()
    call._plans_of_plain_calls.clear()


@pytest.fixture
def no_plans_yet() -> Iterator[None]:
    """As if there had been no calls, and leaving none behind."""
    _forget_plans()
    yield
    _forget_plans()


class _Forgetful(dict[Any, Any]):
    """Keeps nothing."""

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


@pytest.fixture
def no_plans_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call asks dispatch anew."""
    monkeypatch.setattr(call, "_cached_plan", call._plan)
    monkeypatch.setattr(call, "_plans_of_plain_calls", _Forgetful())

"""Processes that have done their work end with exit code 0, also where threads of the process group's have not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist
from flash_attn_train.distributed import ending_process_group

# Every gloo group has threads of its own, which give back the tensors of what is done; that needs Python's lock, which
# is held here until Python ends.
WORKER = """
import sys
import time

import torch
import torch.distributed as dist
from flash_attn_train.distributed import ending_process_group, start_process_group

start_process_group("cpu")
with ending_process_group():
    groups = [dist.new_group(backend="gloo") for _ in range(4)]
    sys.setswitchinterval(100)
    for group in groups:
        dist.all_reduce(torch.ones(1000), group=group, async_op=True)
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        pass
"""

# A group that is referred to after its end keeps its threads, and here one of them has work left.
WORKER_WITH_LATE_THREAD = """
import time

import torch
import torch.distributed as dist
from flash_attn_train.distributed import ending_process_group, start_process_group

def finish(future):
    started.append(True)
    time.sleep(0.1)
    return future.value()

started = []
start_process_group("cpu")
with ending_process_group():
    group = dist.new_group(backend="gloo")
    work = dist.all_reduce(torch.ones(1000), group=group, async_op=True)
    work.get_future().then(finish)
    while not started:
        time.sleep(0.001)
"""


@pytest.mark.parametrize("worker", [WORKER, WORKER_WITH_LATE_THREAD], ids=["kept_waiting", "late_thread"])
def test_two_ranks_end(tmp_path: Path, worker: str, launch: Callable[..., str]) -> None:
    (tmp_path / "worker.py").write_text(worker)
    launch(str(tmp_path / "worker.py"), ranks=2)  # "terminate called without an active exception" otherwise


@pytest.fixture
def process_group(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)


def test_ends_with_the_block(process_group: None) -> None:
    with ending_process_group():
        assert dist.is_initialized()
    assert not dist.is_initialized()


def test_ends_when_a_signal_stops_the_ranks(process_group: None) -> None:
    with pytest.raises(SystemExit), ending_process_group():
        raise SystemExit(143)
    assert not dist.is_initialized()


def test_stays_after_an_error(process_group: None) -> None:
    with pytest.raises(RuntimeError, match="planned"), ending_process_group():
        raise RuntimeError("planned")
    assert dist.is_initialized()
    dist.destroy_process_group()


def test_without_process_group() -> None:
    with ending_process_group():
        pass

"""Pytest plugin for one rank of several: each runs the same tests, at the same time, in a process of its own.

test_models_tensor_parallel_launch.py starts them, with these variables in the environment.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist


@pytest.fixture(scope="session")
def group(request: pytest.FixtureRequest) -> Iterator[dist.ProcessGroup]:
    """All ranks: NCCL with a GPU for each, else gloo."""
    rank, ranks = int(os.environ["MODELS_TEST_RANK"]), int(os.environ["MODELS_TEST_RANKS"])
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=os.environ["MODELS_TEST_RENDEZVOUS"],
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=120),
        device_id=torch.device("cuda", rank) if on_gpu else None,
    )
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    if not request.session.testsfailed:  # else the other ranks may be elsewhere
        dist.barrier()
    dist.destroy_process_group()


@pytest.fixture
def device(group: dist.ProcessGroup) -> torch.device:
    """This rank's."""
    return torch.device("cuda", group.rank()) if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture
def shared_folder(request: pytest.FixtureRequest) -> Path:
    """A folder of this test's that all ranks see; it does not exist yet."""
    place = Path(os.environ["MODELS_TEST_FOLDER"])
    return place / request.node.name.replace("[", "_").replace("]", "")

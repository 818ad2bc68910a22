"""Pytest plugin for one rank of several: each runs the same tests, at the same time, in a process of its own.

test_ops_tensor_parallel_launch.py starts them, with these variables in the environment.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from flash_attn_ops.tensor_parallel import shard_state_dict
from torch import Tensor, nn


@pytest.fixture(scope="session")
def group(request: pytest.FixtureRequest) -> Iterator[dist.ProcessGroup]:
    """All ranks: NCCL with a GPU for each, else gloo."""
    rank, ranks = int(os.environ["OPS_TEST_RANK"]), int(os.environ["OPS_TEST_RANKS"])
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=os.environ["OPS_TEST_RENDEZVOUS"],
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=120),
        device_id=torch.device("cuda", rank) if on_gpu else None,
    )
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    if (
        not request.session.testsfailed
    ):  # else the other ranks may be elsewhere, and learn of it by the loss of this one
        dist.barrier()
    dist.destroy_process_group()


@pytest.fixture
def check_against_whole(group: dist.ProcessGroup) -> Callable[..., None]:
    """Checks that a layer gives this rank's part of what the layer of one process gives, to the bit.

    Its arguments: the layer of one process, in float64; the rank's; the whole input; ``cut``, which takes the rank's
    part of a whole output; and whether the rank's layer takes its part of the input's dimension 0. All parameters and
    gradients of outputs are small integers, whose sums are exact in any order.
    """
    rank, ranks = group.rank(), group.size()

    def run(
        module: nn.Module, x: Tensor, upstream: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        x = x.detach().clone().requires_grad_(x.is_floating_point())
        out = module(x)
        out.backward(upstream(out))
        return out, x.grad

    def check(
        whole: nn.Module,
        layer: nn.Module,
        x: Tensor,
        cut: Callable[[Tensor], Tensor],
        *,
        cuts_input: bool = False,
    ) -> None:
        with torch.no_grad():
            for parameter in whole.parameters():
                parameter.copy_(torch.randint(-4, 5, parameter.shape, device=parameter.device))
        layer.load_state_dict(shard_state_dict(layer, whole.state_dict(), rank))
        upstream: list[Tensor] = []

        def draw(out: Tensor) -> Tensor:
            upstream.append(torch.randint(-4, 5, out.shape, device=out.device).to(out.dtype))
            return upstream[0]

        expected_out, expected_dx = run(whole, x, draw)
        own = (lambda tensor: tensor.chunk(ranks)[rank]) if cuts_input else (lambda tensor: tensor)
        out, dx = run(layer, own(x), lambda out: cut(upstream[0]))
        assert torch.equal(out, cut(expected_out))
        assert (dx is None and expected_dx is None) or torch.equal(dx, own(expected_dx))
        gradients = {name: parameter.grad for name, parameter in whole.named_parameters()}
        expected = shard_state_dict(layer, gradients, rank)
        for name, parameter in layer.named_parameters():
            assert torch.equal(parameter.grad, expected[name]), name

    return check

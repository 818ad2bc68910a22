"""Collectives, marks and random streams on several ranks, against what each rank computes from all ranks' values.

Values are small integers in float64, whose sums are exact in any order: results are compared to the bit.

Run by test_ops_tensor_parallel_launch.py.
"""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from flash_attn_ops.activations import swiglu
from flash_attn_ops.distributed import (
    Group,
    RngStream,
    all_gather,
    all_gather_async,
    all_reduce,
    all_reduce_async,
    allreduce_sequence_parallel_grad,
    copy_to_ranks,
    gather_shards,
    get_dim_for_local_rank,
    mark_sequence_parallel,
    mark_shared,
    reduce_scatter,
    reduce_scatter_async,
    resolve_group,
    sync_shared_params,
    take_shard,
)
from flash_attn_ops.norm import rms_norm
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor


def integers(shape: tuple[int, ...], seed: int, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, shape, generator=generator).double().to(device)


def of_all_ranks(shapes: list[tuple[int, ...]], seed: int, device: str) -> list[Tensor]:
    return [integers(shape, 100 * seed + rank, device) for rank, shape in enumerate(shapes)]


def resized(shape: tuple[int, ...], dim: int, size: int) -> tuple[int, ...]:
    return tuple(size if index == dim % len(shape) else old for index, old in enumerate(shape))


LAYOUTS = pytest.mark.parametrize("dim, transposed", [(0, False), (1, False), (-1, True)])
EVEN = pytest.mark.parametrize("even", [True, False])


def sizes_along(ranks: int, even: bool) -> list[int]:
    return [2] * ranks if even else [get_dim_for_local_rank(2 * ranks + 1, ranks, r) for r in range(ranks)]


def leaf_of(values: Tensor, transposed: bool) -> Tensor:
    """The values, requiring a gradient, and if asked for with other strides."""
    own = values.transpose(0, 1).contiguous().transpose(0, 1) if transposed else values.clone()
    return own.requires_grad_()


@LAYOUTS
@EVEN
@pytest.mark.parametrize("gather", [all_gather, gather_shards])
def test_gathers(gather, dim: int, transposed: bool, even: bool, group, device: str) -> None:
    me = resolve_group(group)
    sizes = sizes_along(me.size, even)
    shards = of_all_ranks([resized((3, 4, 5), dim, size) for size in sizes], 1, device)
    x = leaf_of(shards[me.rank], transposed)
    out = gather(x, group, dim, None if even else sizes)
    assert torch.equal(out, torch.cat(shards, dim))
    upstream = of_all_ranks([tuple(out.shape)] * me.size, 2, device)
    used = sum(upstream) if gather is all_gather else upstream[me.rank]  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(out, x, upstream[me.rank])
    assert torch.equal(gradient, used.split(sizes, dim)[me.rank])


@LAYOUTS
@EVEN
@pytest.mark.parametrize("scatter", [reduce_scatter, take_shard])
def test_scatters(scatter, dim: int, transposed: bool, even: bool, group, device: str) -> None:
    me = resolve_group(group)
    sizes = sizes_along(me.size, even)
    wholes = of_all_ranks([resized((3, 4, 5), dim, sum(sizes))] * me.size, 1, device)
    x = leaf_of(wholes[me.rank], transposed)
    out = scatter(x, group, dim, None if even else sizes)
    whole = sum(wholes) if scatter is reduce_scatter else wholes[me.rank]
    assert torch.equal(out, whole.split(sizes, dim)[me.rank])  # type: ignore[union-attr]
    upstream = of_all_ranks([resized((3, 4, 5), dim, size) for size in sizes], 2, device)
    (gradient,) = torch.autograd.grad(out, x, upstream[me.rank])
    assert torch.equal(gradient, torch.cat(upstream, dim))


def test_reductions(group, device: str) -> None:
    me = resolve_group(group)
    values, upstream = (of_all_ranks([(3, 4)] * me.size, seed, device) for seed in (1, 2))
    for collective, forward_adds in ((all_reduce, True), (copy_to_ranks, False)):
        x = values[me.rank].clone().requires_grad_()
        out = collective(x, group)
        assert torch.equal(out, sum(values) if forward_adds else x)  # type: ignore[arg-type]
        (gradient,) = torch.autograd.grad(out, x, upstream[me.rank].t().contiguous().t())
        assert torch.equal(gradient, upstream[me.rank] if forward_adds else sum(upstream))  # type: ignore[arg-type]
        assert torch.equal(x, values[me.rank])
    scalar = torch.tensor(2.0 + me.rank, device=device)
    assert all_reduce(scalar, group).item() == sum(2.0 + rank for rank in range(me.size))


def test_gradients_are_differentiable(group, device: str) -> None:
    me = resolve_group(group)
    x = integers((2, 3), me.rank, device).requires_grad_()
    upstream = integers((2 * me.size, 3), 7, device).requires_grad_()
    (gradient,) = torch.autograd.grad(all_gather(x, group), x, upstream, create_graph=True)
    weights = of_all_ranks([(2, 3)] * me.size, 3, device)
    (second,) = torch.autograd.grad(gradient, upstream, weights[me.rank])
    assert torch.equal(second, torch.cat(weights))


def test_dtensors_are_taken(group, device: str) -> None:
    """They have no memory of their own for kernels to read: torch's operations know what to do."""
    mesh = init_device_mesh(device, (group.size(),))
    x = torch.randn(2 * group.size(), 8, device=device)
    leaves = [x.requires_grad_(), torch.ones(8, device=device, requires_grad=True)]
    cuts = (Shard(0), Replicate())
    spread = [distribute_tensor(leaf.detach(), mesh, [cut]) for leaf, cut in zip(leaves, cuts, strict=True)]
    out, expected = (
        swiglu(rms_norm(*tensors), order="gate_value")
        for tensors in ([tensor.requires_grad_() for tensor in spread], leaves)
    )
    torch.testing.assert_close(out.full_tensor(), expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    for tensor, leaf in zip(spread, leaves, strict=True):
        torch.testing.assert_close(tensor.grad.full_tensor(), leaf.grad)


def test_asynchronous(group, device: str) -> None:
    me = resolve_group(group)
    values = of_all_ranks([(2 * me.size, 3)] * me.size, 1, device)
    x = values[me.rank]
    total = sum(values)
    x.requires_grad_()
    gathered, added = all_gather_async(x, group, dim=1), all_reduce_async(x, group)
    scattered = reduce_scatter_async(x, group)
    assert torch.equal(scattered.wait(), total.chunk(me.size)[me.rank])  # type: ignore[union-attr]
    assert torch.equal(added.wait(), total) and torch.equal(gathered.wait(), torch.cat(values, 1))
    assert torch.equal(x, of_all_ranks([(2 * me.size, 3)] * me.size, 1, device)[me.rank])
    assert not any(pending.out.requires_grad for pending in (gathered, added, scattered))
    own = x.detach().clone()
    result = all_reduce_async(own, group, inplace=True).wait()
    assert torch.equal(result, total) and result.data_ptr() == own.data_ptr()


def test_nothing_to_send(group, device: str) -> None:
    me = resolve_group(group)
    x = torch.zeros(0, 3, device=device, requires_grad=True)
    for out in (all_gather(x, group), reduce_scatter(x, group), all_reduce(x, group)):
        assert out.shape == (0, 3)
        assert torch.autograd.grad(out.sum(), x)[0].shape == (0, 3)
    y = torch.zeros(2, 0, device=device)
    assert all_gather(y, group).shape == (2 * me.size, 0)


def test_bad_input(group, device: str) -> None:
    me = resolve_group(group)
    x = torch.zeros(2 * me.size + 1, 3, device=device)
    if me.size > 1:
        for function in (reduce_scatter, take_shard, reduce_scatter_async):
            with pytest.raises(ValueError, match=f"x: got {2 * me.size + 1} entries in dimension 0"):
                function(x, group)
    for function in (all_gather, reduce_scatter):
        with pytest.raises(ValueError, match="dim: got 2"):
            function(x, group, 2)
        with pytest.raises(ValueError, match="sizes: got"):
            function(x, group, 0, [1] * me.size)
        with pytest.raises(ValueError, match="sizes: got"):
            function(x, group, 0, [2 * me.size + 1] * (me.size + 1))


def test_kinds_of_groups(group, device: str) -> None:
    me = resolve_group(group)
    mesh = init_device_mesh(device, (me.size,), mesh_dim_names=("tp",))
    assert resolve_group(mesh) == resolve_group(mesh.get_group())
    assert (resolve_group(mesh).size, resolve_group(mesh).rank) == (me.size, me.rank)
    assert resolve_group(me) is me and resolve_group(None) == Group("", 1, 0)
    x = torch.ones(2, device=device)
    assert all_reduce(x, mesh)[0] == me.size and all_reduce(x, None) is x
    with pytest.raises(ValueError, match="group: got a DeviceMesh of 2 dimensions"):
        resolve_group(init_device_mesh(device, (1, me.size), mesh_dim_names=("dp", "tp")))


@pytest.mark.parametrize("collective", [all_gather, reduce_scatter, all_reduce, copy_to_ranks, gather_shards])
def test_compiled(collective, group, device: str) -> None:
    me = resolve_group(group)
    x = integers((2 * me.size, 3), me.rank, device).requires_grad_()

    def function(x: Tensor) -> Tensor:
        return (collective(2 * x, me) * 3).cos().sum()

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    expected, actual = function(x), compiled(x)
    assert torch.equal(expected, actual)
    assert torch.equal(torch.autograd.grad(expected, x)[0], torch.autograd.grad(actual, x)[0])


def test_shared_parameters_follow_the_first_rank(group, device: str) -> None:
    me = resolve_group(group)
    torch.manual_seed(me.rank)
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2), nn.LayerNorm(2)).to(device)
    own = [parameter.detach().clone() for parameter in model.parameters()]
    mark_shared(model[1])
    mark_shared(model, "0.bias")
    model[1].weight.data = model[1].weight.data.t().contiguous().t()  # not contiguous
    sync_shared_params(model, group)
    torch.manual_seed(0)
    first = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2), nn.LayerNorm(2)).to(device)
    assert torch.equal(model[0].weight, own[0])
    for name in ("0.bias", "1.weight", "1.bias"):
        assert torch.equal(model.get_parameter(name), first.get_parameter(name)), name


def test_sequence_parallel_gradients_add_up(group, device: str) -> None:
    me = resolve_group(group)
    model = nn.ModuleDict({"norm": nn.LayerNorm(3), "other": nn.Linear(3, 2)}).to(device)
    model["small"] = nn.LayerNorm(3, device=device, dtype=torch.bfloat16)
    mark_sequence_parallel(model["norm"])
    mark_sequence_parallel(model, "small.weight")
    for index, parameter in enumerate(model.parameters()):
        parameter.grad = integers(tuple(parameter.shape), 10 * index + me.rank, device).to(parameter.dtype)
    allreduce_sequence_parallel_grad(model, group)
    for index, (name, parameter) in enumerate(model.named_parameters()):
        of_ranks = [integers(tuple(parameter.shape), 10 * index + rank, device) for rank in range(me.size)]
        added = name.startswith("norm") or name == "small.weight"
        expected = sum(of_ranks) if added else of_ranks[me.rank]
        assert torch.equal(parameter.grad.double(), expected), name  # type: ignore[union-attr, arg-type]
    model["norm"].weight.grad = None
    if me.size > 1:
        with pytest.raises(ValueError, match="without a gradient"):
            allreduce_sequence_parallel_grad(model, group)


def test_random_streams(group, device: str) -> None:
    me = resolve_group(group)
    before = torch.get_rng_state()
    draws = {}
    for same in (True, False):
        stream = RngStream(5, group, same_on_all_ranks=same)
        for turn in range(2):
            with stream.active():
                draws[same, turn] = torch.rand(8, device=device)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(draws[True, 0], draws[True, 1])
    for (same, _), own in draws.items():
        of_ranks = all_gather(own[None], group)
        for rank in range(me.size):
            assert torch.equal(of_ranks[rank], own) == (same or rank == me.rank)


def test_ranks_are_as_many_as_started(group, device: str) -> None:
    assert dist.get_world_size(group) == int(os.environ["OPS_TEST_RANKS"])
    assert all_reduce(torch.ones((), device=device), group).item() == dist.get_world_size(group)

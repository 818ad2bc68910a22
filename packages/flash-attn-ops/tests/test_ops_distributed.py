"""Groups, partitions, marks and random streams in one process; several ranks: ranks_distributed.py."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from flash_attn_ops.distributed import (
    Group,
    Partition,
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
    sequence_parallel_parameters,
    shared_parameters,
    sync_shared_params,
    take_shard,
)
from torch import nn


@pytest.mark.parametrize(
    "dim, ranks, multiple_of, expected",
    [
        (8, 4, 1, [2, 2, 2, 2]),
        (11, 4, 1, [3, 3, 3, 2]),
        (2, 4, 1, [1, 1, 0, 0]),
        (0, 2, 1, [0, 0]),
        (28, 4, 4, [8, 8, 8, 4]),
        (71, 3, 1, [24, 24, 23]),
    ],
)
def test_uneven_parts(dim: int, ranks: int, multiple_of: int, expected: list[int]) -> None:
    assert [get_dim_for_local_rank(dim, ranks, rank, multiple_of) for rank in range(ranks)] == expected
    assert Partition.of(dim, ranks, multiple_of).sizes() == tuple(expected)


def test_parts_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="dim: got 10; expected a multiple >= 0 of multiple_of, 4"):
        get_dim_for_local_rank(10, 2, 0, 4)  # and not 8 of 10 entries in silence
    for rank in (-1, 2):
        with pytest.raises(ValueError, match=f"local_rank: got {rank}"):
            get_dim_for_local_rank(10, 2, rank)
    with pytest.raises(ValueError, match="blocks: got"):
        Partition.of(10, 2, 1, (4, 4))
    with pytest.raises(ValueError, match="multiple_of: got"):
        Partition.of(8, 2, (1, 2), (4, 2, 2))


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("blocks, multiple_of", [(None, 1), ((6, 5), 1), ((12, 4, 4), (3, 1, 1))])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_shards_make_the_whole(dim, blocks, multiple_of, ranks) -> None:
    size = sum(blocks or (11,))
    partition = Partition.of(size, ranks, multiple_of, blocks)
    whole = torch.randn(size, 2).movedim(0, dim)
    shards = [partition.shard(whole, rank, dim) for rank in range(ranks)]
    assert torch.equal(partition.combine(shards, dim), whole)
    for rank, shard in enumerate(shards):
        entries = [entry for where in partition.ranges(rank) for entry in where]
        assert torch.equal(shard, whole.index_select(dim, torch.tensor(entries, dtype=torch.int64)))
        assert shard.shape[dim] == partition.local_size(rank) == sum(partition.parts(rank))
        assert shard.untyped_storage().nbytes() == 4 * shard.numel()  # does not keep the whole alive
    with pytest.raises(ValueError, match=f"whole: got {size + 1} entries"):
        partition.shard(torch.zeros(size + 1), 0)
    with pytest.raises(ValueError, match="shards: got sizes"):
        partition.combine([*shards, shards[0]], dim)


def test_a_single_process() -> None:
    assert resolve_group(None) == Group() == Group("", 1, 0)
    x = torch.randn(3, 4, requires_grad=True)
    for function in (all_gather, gather_shards, reduce_scatter, take_shard):
        assert function(x, None, 1) is x
        assert torch.equal(function(x, None, 1, [4]), x)
    assert all_reduce(x, None) is x and copy_to_ranks(x, None) is x
    for pending in (
        all_gather_async(x, None, 1),
        reduce_scatter_async(x, None, 1),
        all_reduce_async(x, None),
    ):
        assert torch.equal(pending.wait(), x) and not pending.wait().requires_grad
    model = nn.Linear(2, 2)
    mark_shared(model)
    sync_shared_params(model, None)
    allreduce_sequence_parallel_grad(model, None)


@pytest.mark.parametrize("group", [1, "0", object(), [0, 1]])
def test_what_is_no_group(group: object) -> None:
    with pytest.raises(ValueError, match=r"group: got .*expected a ProcessGroup"):
        resolve_group(group)  # type: ignore[arg-type]


def test_groups_are_plain_data() -> None:
    group = Group("7", 4, 2)
    assert copy.deepcopy(group) == group == pickle.loads(pickle.dumps(group))


def test_marks() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    mark_sequence_parallel(model[1])
    mark_sequence_parallel(model, "2.bias")
    mark_shared(model[0], "weight")
    mark_shared(model[0], "bias")

    def check(model: nn.Sequential) -> None:
        expected = [model[1].weight, model[1].bias, model[2].bias]
        found = list(sequence_parallel_parameters(model))
        assert [id(parameter) for parameter in found] == [id(parameter) for parameter in expected]
        shared = list(shared_parameters(model))
        assert len(shared) == 2 and shared[0] is model[0].weight and shared[1] is model[0].bias

    check(model)
    check(copy.deepcopy(model))  # parameters lose their attributes here
    with torch.device("meta"):
        on_meta = copy.deepcopy(model).to("meta")
    check(on_meta.to_empty(device="cpu"))  # and here
    with pytest.raises(ValueError, match=r"names: got scale.*\['bias', 'weight'\]"):
        mark_shared(model[0], "scale")


def test_tied_parameters_are_marked_once() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    model["b"].weight = model["a"].weight
    mark_shared(model["b"])
    mark_shared(model["a"])
    (only,) = shared_parameters(model)
    assert only is model["a"].weight


def test_random_stream_continues() -> None:
    stream = RngStream(3, same_on_all_ranks=True)
    before = torch.get_rng_state()
    with stream.active():
        first = torch.rand(4)
    saved = stream.state_dict()
    with stream.active():
        second = torch.rand(4)
    with pytest.raises(RuntimeError, match="inside"), stream.active():
        torch.rand(4)
        raise RuntimeError("inside")
    assert torch.equal(torch.get_rng_state(), before)
    again = RngStream(3, same_on_all_ranks=True)
    with again.active():
        assert torch.equal(torch.rand(4), first)
    again.load_state_dict(saved)
    with again.active():
        assert torch.equal(torch.rand(4), second)
    for other in (RngStream(4, same_on_all_ranks=True), RngStream(3, same_on_all_ranks=False)):
        with other.active():
            assert not torch.equal(torch.rand(4), first)

"""What tensor-parallel layers stand on: groups, collectives with gradients, partitions, marks, random streams.

Every function takes the group as a ``torch.distributed.ProcessGroup``, a one-dimensional ``DeviceMesh``, a
:class:`Group`, or None, which is a single process: there every collective is the identity.
"""

from .collectives import all_gather, all_reduce, copy_to_ranks, gather_shards, reduce_scatter, take_shard
from .group import Group, GroupLike, resolve_group
from .parameters import (
    allreduce_sequence_parallel_grad,
    mark_sequence_parallel,
    mark_shared,
    sequence_parallel_parameters,
    shared_parameters,
    sync_shared_params,
)
from .partition import Partition, get_dim_for_local_rank
from .pending import Pending, all_gather_async, all_reduce_async, reduce_scatter_async
from .rng import RngStream

__all__ = [
    "Group",
    "GroupLike",
    "Partition",
    "Pending",
    "RngStream",
    "all_gather",
    "all_gather_async",
    "all_reduce",
    "all_reduce_async",
    "allreduce_sequence_parallel_grad",
    "copy_to_ranks",
    "gather_shards",
    "get_dim_for_local_rank",
    "mark_sequence_parallel",
    "mark_shared",
    "reduce_scatter",
    "reduce_scatter_async",
    "resolve_group",
    "sequence_parallel_parameters",
    "shared_parameters",
    "sync_shared_params",
    "take_shard",
]

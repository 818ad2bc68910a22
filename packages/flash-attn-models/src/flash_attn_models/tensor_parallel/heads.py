"""Attention heads over ranks: who computes which, and the projections to and from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from flash_attn_ops.distributed import Group, Partition, all_reduce_async, get_dim_for_local_rank
from flash_attn_ops.library import once_differentiable
from flash_attn_ops.tensor_parallel import column_parallel_linear
from torch import Tensor, nn

from flash_attn_models.errors import bad_argument
from flash_attn_models.tensor_parallel.layers import ColumnLinear, RowLinear


@dataclass(frozen=True)
class HeadPartition(Partition):
    """How the rows [q (H D) | k (Hk D) | v (Hk D)] are cut over ranks: by key/value heads, each with its queries.

    With at least as many key/value heads as ranks, each rank has some of its own, the first ranks one more where they
    are uneven. With fewer, ``world_size / Hk`` ranks hold each of them, alike, and share its queries.

    Make it with ``of_heads``.
    """

    @classmethod
    def of_heads(cls, n_head: int, n_head_kv: int, d_head: int, world_size: int) -> HeadPartition:
        """
        Raises:
            ValueError: more ranks than query heads, or fewer key/value heads than ranks where they do not divide the
                ranks, or have fewer queries each than ranks that hold them.
        """
        ratio = n_head // n_head_kv
        if n_head_kv < world_size and (world_size % n_head_kv or ratio < world_size // n_head_kv):
            raise bad_argument(
                "process_group",
                f"{world_size} ranks for {n_head} query heads and {n_head_kv} key/value heads",
                f"at most {n_head_kv} ranks, or a multiple of {n_head_kv} up to {n_head}",
                "use a group of such a size",
            )
        rows, rows_kv = n_head * d_head, n_head_kv * d_head
        return cls((rows, rows_kv, rows_kv), (ratio * d_head, d_head, d_head), world_size)

    @property
    def d_head(self) -> int:
        return self.multiples[1]

    @property
    def n_head(self) -> int:
        return self.blocks[0] // self.d_head

    @property
    def n_head_kv(self) -> int:
        return self.blocks[1] // self.d_head

    @property
    def is_shared(self) -> bool:
        """Whether several ranks hold the same key/value head."""
        return self.n_head_kv < self.world_size

    def heads(self, rank: int) -> tuple[range, range]:
        """The query heads and the key/value heads of a rank."""
        ratio = self.multiples[0] // self.d_head
        if not self.is_shared:
            first, count = _part(self.n_head_kv, self.world_size, rank)
            return range(first * ratio, (first + count) * ratio), range(first, first + count)
        group, sharer = divmod(rank, self.world_size // self.n_head_kv)
        first, count = _part(ratio, self.world_size // self.n_head_kv, sharer)
        return range(group * ratio + first, group * ratio + first + count), range(group, group + 1)

    def ranges(self, rank: int) -> list[range]:
        starts = (0, self.blocks[0], self.blocks[0] + self.blocks[1])
        q, kv = self.heads(rank)
        return [
            range(start + heads.start * self.d_head, start + heads.stop * self.d_head)
            for start, heads in zip(starts, (q, kv, kv), strict=True)
        ]

    def parts(self, rank: int) -> tuple[int, ...]:
        return tuple(len(rows) for rows in self.ranges(rank))

    def combine(self, shards: Sequence[Tensor], dim: int = 0) -> Tensor:
        """The inverse of ``shard``. Of rows that several ranks hold, the last one's are taken."""
        return _combined(self, shards, dim)


@dataclass(frozen=True)
class QueryPartition(Partition):
    """How ``size`` values of each query head are cut over ranks. Make it with ``of_heads``."""

    heads: HeadPartition

    @classmethod
    def of_heads(cls, heads: HeadPartition, size: int) -> QueryPartition:
        return cls((heads.n_head * size,), (size,), heads.world_size, heads)

    def ranges(self, rank: int) -> list[range]:
        heads, size = self.heads.heads(rank)[0], self.multiples[0]
        return [range(heads.start * size, heads.stop * size)]

    def parts(self, rank: int) -> tuple[int, ...]:
        return tuple(len(values) for values in self.ranges(rank))


@dataclass(frozen=True)
class KeyValuePartition(Partition):
    """How the rows [k (Hk D) | v (Hk D)] are cut over ranks: as those of the heads. Make it with ``of_heads``."""

    heads: HeadPartition

    @classmethod
    def of_heads(cls, heads: HeadPartition) -> KeyValuePartition:
        return cls(heads.blocks[1:], heads.multiples[1:], heads.world_size, heads)

    def ranges(self, rank: int) -> list[range]:
        queries = self.heads.blocks[0]
        return [range(rows.start - queries, rows.stop - queries) for rows in self.heads.ranges(rank)[1:]]

    def parts(self, rank: int) -> tuple[int, ...]:
        return tuple(len(rows) for rows in self.ranges(rank))

    def combine(self, shards: Sequence[Tensor], dim: int = 0) -> Tensor:
        """As that of ``HeadPartition``."""
        return _combined(self, shards, dim)


class HeadColumnLinear(ColumnLinear):
    """A projection to heads: the packed one of queries, keys and values, that of queries alone, or that of keys and
    values.

    Args:
        in_features: of the input.
        partition: of the outputs, which says what they are.
        group: the ranks.
        bias: whether there is one.
        sequence_parallel: in training, the input is cut along dimension 0.
        device, dtype: of the parameters ``weight`` (local outputs, in_features) and ``bias`` (local outputs,).
    """

    partition: HeadPartition | QueryPartition | KeyValuePartition

    def __init__(
        self,
        in_features: int,
        partition: HeadPartition | QueryPartition | KeyValuePartition,
        group: Group,
        *,
        bias: bool,
        sequence_parallel: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        # The layer's own parameters, of a plain partition, never exist: drawing them would move the generator on.
        super().__init__(
            *(in_features, partition.size, group),
            bias=bias,
            sequence_parallel=sequence_parallel,
            device="meta",
            dtype=dtype,
        )
        self.partition = partition
        local = partition.local_size(group.rank)
        self.weight = nn.Parameter(torch.empty(local, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(local, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    @property
    def summed_parameters(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias; see ``summed_over_sharers``."""
        bias = None if self.bias is None else summed_over_sharers(self.bias, self.partition, self.group)
        return summed_over_sharers(self.weight, self.partition, self.group), bias

    def forward(self, x: Tensor) -> Tensor:
        """x (tokens, ..., in_features) -> (all tokens, ..., this rank's outputs, such as [q | k | v])."""
        weight, bias = self.summed_parameters
        return column_parallel_linear(x, weight, bias, self.group, sequence_parallel=self.cuts_tokens)


class HeadRowLinear(RowLinear):
    """The projection of all query heads' results to the model's width, cut as a ``HeadPartition`` says.

    Args:
        partition: of the heads.
        out_features: of the output.
        group, bias, sequence_parallel, device, dtype: as of ``HeadColumnLinear``; the parameters are ``weight``
            (out_features, local inputs) and ``bias`` (out_features,), which all ranks hold.
    """

    def __init__(
        self,
        partition: HeadPartition,
        out_features: int,
        group: Group,
        *,
        bias: bool,
        sequence_parallel: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        queries = QueryPartition.of_heads(partition, partition.d_head)
        super().__init__(
            *(queries.size, out_features, group),
            bias=bias,
            sequence_parallel=sequence_parallel,
            device="meta",  # as in HeadColumnLinear
            dtype=dtype,
        )
        self.partition = queries
        local = queries.local_size(group.rank)
        self.weight = nn.Parameter(torch.empty(out_features, local, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()


def summed_over_sharers(
    rows: Tensor, partition: HeadPartition | QueryPartition | KeyValuePartition, group: Group
) -> Tensor:
    """This rank's rows of a parameter, as a partition says; gradients of those that several ranks hold, of keys and
    values, are added up over these ranks."""
    heads = partition if isinstance(partition, HeadPartition) else partition.heads
    if isinstance(partition, QueryPartition) or not heads.is_shared or not torch.is_grad_enabled():
        return rows
    queries = partition.parts(group.rank)[0] if isinstance(partition, HeadPartition) else 0
    return _SumOfSharers.apply(rows, heads, queries, group)


class _SumOfSharers(torch.autograd.Function):
    """The identity, where backward adds up what the ranks that hold a key/value head have for its rows, which are those
    behind so many of queries."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, partition: HeadPartition, queries: int, group: Group) -> Tensor:
        ctx.partition, ctx.queries, ctx.group = partition, queries, group
        return rows.view_as(rows)

    @staticmethod
    @once_differentiable("the sum over ranks that share heads")
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        partition, queries, group = ctx.partition, ctx.queries, ctx.group
        own = gradient[queries:]
        # A slot for each key/value head, so that one reduction over all ranks serves without groups of sharers.
        slots = own.new_zeros(partition.n_head_kv, *own.shape)
        head = partition.heads(group.rank)[1].start
        slots[head] = own
        summed = all_reduce_async(slots, group, inplace=True).wait()
        return torch.cat([gradient[:queries], summed[head]]), None, None, None


def _combined(partition: Partition, shards: Sequence[Tensor], dim: int) -> Tensor:
    """The whole of what ranks hold, where several may hold the same."""
    sizes = tuple(shard.shape[dim] for shard in shards)
    if sizes != partition.sizes():
        raise bad_argument(
            "shards",
            f"sizes {list(sizes)} in dimension {dim}",
            f"{list(partition.sizes())}, one for each rank",
            "pass the shards of all ranks in order",
        )
    shape = list(shards[0].shape)
    shape[dim] = partition.size
    whole = shards[0].new_empty(shape)
    for rank, shard in enumerate(shards):
        for rows, part in zip(partition.ranges(rank), shard.split(partition.parts(rank), dim), strict=True):
            whole.narrow(dim, rows.start, len(rows)).copy_(part)
    return whole


def _part(count: int, world_size: int, rank: int) -> tuple[int, int]:
    """The first one and the number of this rank's of ``count`` things."""
    sizes = [get_dim_for_local_rank(count, world_size, other) for other in range(rank + 1)]
    return sum(sizes[:-1]), sizes[-1]

"""Who holds which part of a dimension."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flash_attn_ops.arguments import bad_argument


def get_dim_for_local_rank(dim: int, world_size: int, local_rank: int, multiple_of: int = 1) -> int:
    """This rank's part of ``dim`` entries, in units of ``multiple_of``, as even as can be: the first ranks get one unit
    more where the units do not divide evenly.

    Raises:
        ValueError: when ``dim`` is not a multiple of ``multiple_of``, or there is no such rank.
    """
    if dim < 0 or multiple_of < 1 or dim % multiple_of:
        raise bad_argument(
            "dim", dim, f"a multiple >= 0 of multiple_of, {multiple_of}", "pad it, or lower multiple_of"
        )
    if not 0 <= local_rank < world_size:
        raise bad_argument(
            "local_rank", local_rank, f"a rank of {world_size}", "pass the rank within the group"
        )
    units, larger_ranks = divmod(dim // multiple_of, world_size)
    return (units + (local_rank < larger_ranks)) * multiple_of


@dataclass(frozen=True)
class Partition:
    """How a dimension is cut over ranks.

    It consists of blocks, one after the other (value and gate of a gated MLP; q, k and v), each of which is cut on its
    own. A rank holds its parts of all of them, one after the other.

    Args:
        blocks: sizes of the blocks.
        multiples: of which each block's parts are multiples.
        world_size: number of ranks.
    """

    blocks: tuple[int, ...]
    multiples: tuple[int, ...]
    world_size: int

    @classmethod
    def of(
        cls,
        size: int,
        world_size: int,
        multiple_of: int | Sequence[int] = 1,
        blocks: Sequence[int] | None = None,
    ) -> Partition:
        """The partition of ``size`` entries in ``blocks`` (one, by default); ``multiple_of`` is for all blocks, or one
        for each."""
        sizes = (size,) if blocks is None else tuple(blocks)
        if sum(sizes) != size:
            raise bad_argument("blocks", list(sizes), f"sizes that add up to {size}", "pass all blocks")
        multiples = (multiple_of,) * len(sizes) if isinstance(multiple_of, int) else tuple(multiple_of)
        if len(multiples) != len(sizes):
            raise bad_argument(
                "multiple_of", list(multiples), f"one for each of {len(sizes)} blocks", "pass as many"
            )
        for block, multiple in zip(sizes, multiples, strict=True):
            get_dim_for_local_rank(block, world_size, 0, multiple)  # which checks them
        return cls(sizes, multiples, world_size)

    @property
    def size(self) -> int:
        return sum(self.blocks)

    def parts(self, rank: int) -> tuple[int, ...]:
        """The sizes of this rank's parts of the blocks."""
        return tuple(
            get_dim_for_local_rank(block, self.world_size, rank, multiple)
            for block, multiple in zip(self.blocks, self.multiples, strict=True)
        )

    def local_size(self, rank: int) -> int:
        return sum(self.parts(rank))

    def sizes(self) -> tuple[int, ...]:
        """The local sizes of all ranks: the ``sizes`` of the collectives."""
        return tuple(self.local_size(rank) for rank in range(self.world_size))

    def ranges(self, rank: int) -> list[range]:
        """Where this rank's parts lie in the whole dimension, a range for each block."""
        parts_of_ranks = [self.parts(other) for other in range(rank + 1)]
        ranges = []
        for block, start_of_block in enumerate(itertools.accumulate((0, *self.blocks[:-1]))):
            start = start_of_block + sum(parts[block] for parts in parts_of_ranks[:-1])
            ranges.append(range(start, start + parts_of_ranks[-1][block]))
        return ranges

    def shard(self, whole: Tensor, rank: int, dim: int = 0) -> Tensor:
        """This rank's part of ``whole``, in its own memory.

        Raises:
            ValueError: when the dimension does not have the partition's size.
        """
        if whole.shape[dim] != self.size:
            raise bad_argument(
                "whole",
                f"{whole.shape[dim]} entries in dimension {dim}",
                f"{self.size}",
                "pass the tensor of all ranks; pad a vocabulary first",
            )
        parts = [whole.narrow(dim, where.start, len(where)) for where in self.ranges(rank)]
        return torch.cat(parts, dim)

    def combine(self, shards: Sequence[Tensor], dim: int = 0) -> Tensor:
        """The inverse of :meth:`shard`, from the shards of all ranks in order.

        Raises:
            ValueError: when there is not one of the right size for each rank.
        """
        sizes = tuple(shard.shape[dim] for shard in shards)
        if sizes != self.sizes():
            raise bad_argument(
                "shards",
                f"sizes {list(sizes)} in dimension {dim}",
                f"{list(self.sizes())}, one for each rank",
                "pass the shards of all ranks in order",
            )
        of_ranks = [shard.split(self.parts(rank), dim) for rank, shard in enumerate(shards)]
        return torch.cat([parts[block] for block in range(len(self.blocks)) for parts in of_ranks], dim)

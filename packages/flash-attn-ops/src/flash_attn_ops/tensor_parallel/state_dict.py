"""Between the state dict of one process and those of the ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from flash_attn_ops.arguments import bad_argument
from flash_attn_ops.distributed import Partition


@runtime_checkable
class Partitioned(Protocol):
    """A module of which ranks hold parts. Model code may define its own."""

    def partitions(self) -> dict[str, tuple[Partition, int]]:
        """Name of a parameter: how it is cut, and along which dimension. All ranks hold the others alike."""


def parameter_partitions(model: nn.Module) -> dict[str, tuple[Partition, int]]:
    """How entries of ``model.state_dict()`` are cut: name, partition, dimension. All ranks hold the others alike."""
    return {
        f"{prefix}.{name}" if prefix else name: cut
        for prefix, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, Partitioned)
        for name, cut in module.partitions().items()
    }


def shard_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The state dict of one rank, from that of a single process with the same names.

    Args:
        model: the parallel model, of any rank (also on the meta device); it is not changed.
        state_dict: of the whole model. Entries that the model's parallel layers do not cut are passed on as they are.
        rank: within the group.

    Raises:
        ValueError: naming the entry that does not have the size of the whole layer.
    """
    cuts = parameter_partitions(model)
    shards = {}
    for name, whole in state_dict.items():
        if name not in cuts:
            shards[name] = whole
            continue
        partition, dim = cuts[name]
        if whole.dim() <= dim or whole.shape[dim] != partition.size:
            raise bad_argument(
                name,
                f"shape {tuple(whole.shape)}",
                f"{partition.size} entries in dimension {dim}, as the whole layer has",
                "pass the state dict of the whole model; pad a vocabulary before it is cut",
            )
        shards[name] = partition.shard(whole, rank, dim)
    return shards


def combine_state_dicts(model: nn.Module, state_dicts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The inverse of :func:`shard_state_dict`, from the state dicts of all ranks in order.

    Entries that are not cut are taken from the first rank.

    Raises:
        ValueError: state dicts with different names, or shards whose sizes are not those of the ranks.
    """
    if not state_dicts or any(shards.keys() != state_dicts[0].keys() for shards in state_dicts):
        raise bad_argument(
            "state_dicts",
            f"{len(state_dicts)} with different names" if state_dicts else "none",
            "one for each rank, of one model",
            "pass the state dicts of all ranks",
        )
    cuts = parameter_partitions(model)
    whole = {}
    for name, first in state_dicts[0].items():
        if name not in cuts:
            whole[name] = first
            continue
        partition, dim = cuts[name]
        whole[name] = partition.combine([shards[name] for shards in state_dicts], dim)
    return whole

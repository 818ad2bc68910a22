"""State dicts of one process and of the ranks of a tensor-parallel model, and how to get from one to the other.

How each entry is cut is asked of the model itself, built without memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import flash_attn_ops.tensor_parallel as ops
import torch
from flash_attn_ops.distributed import Group, gather_shards
from torch import Tensor, nn

from flash_attn_models.errors import bad_argument, did_you_mean
from flash_attn_models.tensor_parallel.plan import TensorParallel

if TYPE_CHECKING:
    from flash_attn_models.bert.config import BertConfig
    from flash_attn_models.gpt.config import GPTConfig
    from flash_attn_models.vit.config import ViTConfig

    Config = GPTConfig | BertConfig | ViTConfig


def shard_state_dict(
    state_dict: Mapping[str, Tensor], config: Config, rank: int, world_size: int
) -> dict[str, Tensor]:
    """The state dict of one rank, from that of a single process.

    Args:
        state_dict: of a GPT, BERT or ViT model of this package, with heads or without, or part of one. Tensors that
            are not cut are passed on as they are; the others are copied.
        config: the model's.
        rank, world_size: which of how many ranks.

    Raises:
        ValueError: no such rank; ranks that cannot share the model; entries that it does not have, or that are not of
            its size.
    """
    if not 0 <= rank < world_size:
        raise bad_argument("rank", rank, f"a rank of {world_size}", "pass a number below world_size")
    model = _empty_model(config, state_dict, Group("", world_size, rank))
    return ops.shard_state_dict(model, state_dict, rank)


def combine_state_dicts(state_dicts: Sequence[Mapping[str, Tensor]], config: Config) -> dict[str, Tensor]:
    """The inverse of ``shard_state_dict``, bit for bit, from the state dicts of all ranks in order.

    Tensors that are not cut are those of the first rank.

    Raises:
        ValueError: state dicts with different names, or with entries that the model does not have or of other sizes.
    """
    if not state_dicts:
        raise bad_argument("state_dicts", "none", "one for each rank", "pass the state dicts of all ranks")
    model = _empty_model(config, state_dicts[0], Group("", len(state_dicts), 0))
    return ops.combine_state_dicts(model, state_dicts)


def local_parts(model: nn.Module) -> Callable[[str, Tensor], Tensor]:
    """A function of the name of an entry of the model's state dict, and of the entry as a single process has it: this
    rank's part, in its own memory, or the tensor itself if it is not cut.

    Of a tensor that is mapped from a file, only the part is read where rows are cut. The function raises ValueError for
    an entry of another size.

    Args:
        model: a model of this rank; one of a single process has all.
    """
    parallel = getattr(model, "parallel", None)
    if not isinstance(parallel, TensorParallel) or not parallel.is_parallel:
        return lambda name, whole: whole
    cuts, rank = ops.parameter_partitions(model), parallel.group.rank

    def part(name: str, whole: Tensor) -> Tensor:
        if name not in cuts:
            return whole
        partition, dim = cuts[name]
        return partition.shard(whole, rank, dim)

    return part


@torch.no_grad()
def gather_state_dict(model: nn.Module) -> dict[str, Tensor] | None:
    """The state dict of the whole model on the CPU of the group's first rank; None on the others.

    All ranks must call it. Entries are gathered one at a time, so that a GPU holds one of them whole.
    """
    parallel = getattr(model, "parallel", None)
    if not isinstance(parallel, TensorParallel):
        raise bad_argument(
            "model", f"a {type(model).__name__}", "a model of flash_attn_models", "unwrap it: model.module"
        )
    group, cuts = parallel.group, ops.parameter_partitions(model)
    whole = {}
    for name, tensor in model.state_dict().items():
        if parallel.is_parallel and name in cuts:
            partition, dim = cuts[name]
            gathered = gather_shards(tensor, group, dim, partition.sizes())
            if group.rank == 0:
                whole[name] = partition.combine(gathered.split(partition.sizes(), dim), dim).cpu()
        elif group.rank == 0:
            whole[name] = tensor.cpu()
    return whole if group.rank == 0 else None


def _empty_model(config: Config, names: Iterable[str], group: Group) -> nn.Module:
    """The model that has entries of these names, on the meta device, as a rank of the group has it."""
    # Models are made of the layers that this package makes, and so are loaded when they are needed.
    from flash_attn_models.bert import BertConfig, BertForPreTraining, BertModel
    from flash_attn_models.gpt import GPTConfig, GPTLMHeadModel
    from flash_attn_models.gpt.model import GPTModel
    from flash_attn_models.vit import ViTConfig, ViTForImageClassification, ViTModel

    names = list(names)
    has_pooler = any(name.startswith("pooler.") for name in names)
    options: dict[str, Any] = {"process_group": group, "device": "meta"}
    model: nn.Module
    if isinstance(config, GPTConfig):
        whole = any(name.startswith(("transformer.", "lm_head.", "project_out.")) for name in names)
        model = GPTLMHeadModel(config, **options) if whole else GPTModel(config, **options)
    elif isinstance(config, BertConfig):
        if any(name.startswith(("bert.", "head.", "seq_relationship.")) for name in names):
            model = BertForPreTraining(config, **options)
        else:
            model = BertModel(config, with_pooler=has_pooler, **options)
    elif isinstance(config, ViTConfig):
        if any(name.startswith(("vit.", "head.")) for name in names):
            model = ViTForImageClassification(config, **options)
        else:
            model = ViTModel(config, with_pooler=has_pooler, **options)
    else:
        raise bad_argument(
            "config", f"a {type(config).__name__}", "a GPTConfig, BertConfig or ViTConfig", "pass the model's"
        )
    known = list(model.state_dict())
    unknown = [name for name in names if name not in known]
    if unknown:
        raise bad_argument(
            "state_dict",
            f"an entry {unknown[0]!r}{did_you_mean(unknown[0], known)}",
            f"entries of {type(model).__name__}",
            "convert a checkpoint to this package's names first, and pass the config that belongs to it",
        )
    return model

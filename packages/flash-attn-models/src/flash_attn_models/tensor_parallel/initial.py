"""Initial weights and sizes of models, spread over ranks or not."""

from __future__ import annotations

import torch
from flash_attn_ops.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    parameter_partitions,
)
from torch import nn

_PARALLEL = (ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding)


@torch.no_grad()
def draw_weights(module: nn.Module, std: float) -> None:
    """If the module is a linear layer or an embedding: a normal weight, and zero for the bias and a padding token.

    A rank draws the whole weight and keeps its part, so that ranks with one seed have the parts of what a single
    process with this seed has, and go on alike.
    """
    if isinstance(module, _PARALLEL):
        partition, dim = module.partitions()["weight"]
        shape = list(module.weight.shape)
        shape[dim] = partition.size
        whole = torch.empty(shape, device=module.weight.device, dtype=module.weight.dtype)
        nn.init.normal_(whole, std=std)
        if isinstance(module, VocabParallelEmbedding) and module.padding_idx is not None:
            whole[module.padding_idx].zero_()
        module.weight.copy_(partition.shard(whole, module.group.rank, dim))
    elif isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            module.weight[module.padding_idx].zero_()
    else:
        return
    bias = getattr(module, "bias", None)
    if bias is not None:
        nn.init.zeros_(bias)


def count_parameters(module: nn.Module) -> int:
    """Parameters of the whole, on however many ranks it is."""
    cuts = parameter_partitions(module)
    count = 0
    for name, parameter in module.named_parameters():
        size = parameter.numel()
        if name in cuts:
            partition, dim = cuts[name]
            size = size // parameter.shape[dim] * partition.size
        count += size
    return count

"""Layers of which every rank of a group holds a part (Shoeybi et al. 2019, arXiv:1909.08053), and sequence parallelism
between them (Korthikanti et al. 2022, arXiv:2205.05198).

Their results and gradients are those of the layers of one process. So are their initial weights: a layer draws all
weights of the whole layer, in the same order, and keeps its part; with one seed on all ranks it is the part of what a
single process draws, and torch's generator goes on from the same state. (The whole weight exists for a moment; on the
meta device nothing does, and ``reset_parameters`` draws later.) :func:`shard_state_dict` and
:func:`combine_state_dicts` go between checkpoints of one process and of the ranks.

With ``sequence_parallel`` tensors between layers are cut along dimension 0, the tokens: rank r of W has the r-th of W
equal parts. Tokens that W does not divide are refused; pad them.
"""

from .embedding import ColumnParallelEmbedding, ParallelGPT2Embeddings, VocabParallelEmbedding
from .fused_mlp import ParallelFusedMLP
from .linear import (
    ColumnParallelLinear,
    RowParallelLinear,
    column_parallel_linear,
    row_parallel_linear,
)
from .mlp import ParallelGatedMLP, ParallelMLP
from .state_dict import combine_state_dicts, parameter_partitions, shard_state_dict

__all__ = [
    "ColumnParallelEmbedding",
    "ColumnParallelLinear",
    "ParallelFusedMLP",
    "ParallelGPT2Embeddings",
    "ParallelGatedMLP",
    "ParallelMLP",
    "RowParallelLinear",
    "VocabParallelEmbedding",
    "column_parallel_linear",
    "combine_state_dicts",
    "parameter_partitions",
    "row_parallel_linear",
    "shard_state_dict",
]

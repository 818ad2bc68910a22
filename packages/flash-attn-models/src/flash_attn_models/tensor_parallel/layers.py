"""The parallel layers of flash_attn_ops as models use them: tokens are cut in training mode alone.

In evaluation mode every rank has all tokens, so that there may be any number of them, a single one while generating.
"""

from __future__ import annotations

import torch
from flash_attn_ops.activations import Activation, GatedActivation
from flash_attn_ops.distributed import all_reduce, reduce_scatter
from flash_attn_ops.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    column_parallel_linear,
    row_parallel_linear,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class ColumnLinear(ColumnParallelLinear):
    """``ColumnParallelLinear`` whose input is cut along dimension 0 in training with ``sequence_parallel``."""

    @property
    def cuts_tokens(self) -> bool:
        return self.sequence_parallel and self.training

    def forward(self, x: Tensor) -> Tensor:
        """x (tokens, ..., in_features) -> (all tokens, ..., this rank's outputs)."""
        return column_parallel_linear(
            x, self.weight, self.bias, self.group, sequence_parallel=self.cuts_tokens
        )


class RowLinear(RowParallelLinear):
    """``RowParallelLinear`` whose output is cut along dimension 0 in training with ``sequence_parallel``."""

    @property
    def cuts_tokens(self) -> bool:
        return self.sequence_parallel and self.training

    def forward(self, x: Tensor) -> Tensor:
        """x (all tokens, ..., this rank's inputs) -> (tokens, ..., out_features)."""
        return row_parallel_linear(x, self.weight, self.bias, self.group, sequence_parallel=self.cuts_tokens)


class VocabularyEmbedding(VocabParallelEmbedding):
    """``VocabParallelEmbedding`` whose result is cut along dimension 0 in training with ``sequence_parallel``."""

    def forward(self, indices: Tensor) -> Tensor:
        """indices (tokens, ...), the same on all ranks -> (tokens, ..., embedding_dim), or this rank's part of it."""
        partial = self.partial(indices)
        if self.sequence_parallel and self.training:
            return reduce_scatter(partial, self.group)
        return all_reduce(partial, self.group)


class ParallelMLP(nn.Module):
    """fc2(activation(fc1(x))), with the hidden features cut over the ranks.

    Args:
        fc1, fc2: the layers.
        activation: of the hidden features, or ``GatedActivation``, which halves them.

    Attributes:
        checkpoint_lvl: if above 0, backward computes activation and fc2 again (its communication too) instead of
            keeping the activation. 0 after construction.
    """

    def __init__(self, fc1: nn.Module, fc2: nn.Module, activation: Activation | GatedActivation) -> None:
        super().__init__()
        self.fc1 = fc1
        self.activation = activation
        self.fc2 = fc2
        self.checkpoint_lvl = 0

    def forward(self, x: Tensor) -> Tensor:
        """x (tokens, ..., d_model) -> (tokens, ..., d_model)."""
        hidden = self.fc1(x)
        if self.checkpoint_lvl > 0 and torch.is_grad_enabled():
            return checkpoint(self._out, hidden, use_reentrant=False)
        return self._out(hidden)

    def _out(self, hidden: Tensor) -> Tensor:
        return self.fc2(self.activation(hidden))

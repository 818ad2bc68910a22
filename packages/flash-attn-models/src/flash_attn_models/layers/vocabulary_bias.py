"""The parameter of a head whose weight is the token embedding, and which has a bias all the same."""

from __future__ import annotations

import torch
from flash_attn_ops.distributed import Partition
from torch import nn

from flash_attn_models.tensor_parallel.plan import SINGLE_PROCESS, TensorParallel


class VocabularyBias(nn.Module):
    """A bias of each token's logit; zero at first.

    Args:
        vocab_size: number of tokens.
        parallel: the ranks over which the vocabulary is cut; a single process by default.

    Parameters: ``bias`` (vocab_size,); of a rank, its part.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        parallel: TensorParallel = SINGLE_PROCESS,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.partition = parallel.vocabulary(vocab_size)
        size = self.partition.local_size(parallel.group.rank)
        self.bias = nn.Parameter(torch.zeros(size, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.bias)

    def partitions(self) -> dict[str, tuple[Partition, int]]:
        """How the bias is cut: name, partition, dimension."""
        return {"bias": (self.partition, 0)}

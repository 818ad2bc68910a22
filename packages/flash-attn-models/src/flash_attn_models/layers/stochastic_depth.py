"""Stochastic depth: in training, sequences skip a branch at random (Huang et al. 2016, arXiv 1603.09382)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flash_attn_models.errors import bad_argument
from flash_attn_models.layers.packed import Documents


class StochasticDepth(nn.Module):
    """x times 0 for a sequence with the given probability, else times what keeps the mean; x itself in evaluation.

    Args:
        probability: with which a sequence skips the branch, in [0, 1).
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        if not 0.0 <= probability < 1.0:
            raise bad_argument(
                "drop_path", probability, "a probability in [0, 1)", "use 0.0 for branches that nobody skips"
            )
        self.probability = probability

    def forward(self, x: Tensor, documents: Documents | None = None) -> Tensor:
        """x (B,...), or packed (T,d_model) with its documents, each of which skips or stays as a whole."""
        if self.probability == 0.0 or not self.training:
            return x
        stays = 1.0 - self.probability
        sequences = x.shape[0] if documents is None else documents.cu_seqlens.shape[0]
        keep = torch.empty(sequences, device=x.device, dtype=x.dtype).bernoulli_(stays).div_(stays)
        if documents is not None:
            keep = keep.index_select(0, documents.numbers)
        return x * keep.view(-1, *[1] * (x.ndim - 1))

    def extra_repr(self) -> str:
        return f"{self.probability}"

"""Token embedding with optional learned positions."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class GPTEmbeddings(nn.Module):
    """dropout(word_embeddings[ids] + position_embeddings[position]).

    Args:
        vocab_size, d_model: shape of the token embedding.
        n_positions: number of learned positions; None for models without.
        dropout: of the sum.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        *,
        n_positions: int | None = None,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab_size, d_model, device=device, dtype=dtype)
        self.position_embeddings = (
            None if n_positions is None else nn.Embedding(n_positions, d_model, device=device, dtype=dtype)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, input_ids: Tensor, offset: int = 0) -> Tensor:
        """input_ids (B,S), of which the first is at position ``offset`` -> (B,S,d_model)."""
        x = self.word_embeddings(input_ids)
        if self.position_embeddings is not None:
            positions = torch.arange(offset, offset + input_ids.shape[1], device=input_ids.device)
            x = x + self.position_embeddings(positions)
        return self.dropout(x)

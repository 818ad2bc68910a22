"""Token embedding with optional learned positions, and optionally of another width than the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flash_attn_models.tensor_parallel.plan import SINGLE_PROCESS, TensorParallel


class GPTEmbeddings(nn.Module):
    """dropout(scale * project_in(word_embeddings[ids]) + position_embeddings[position + position_offset]).

    Args:
        vocab_size, d_model: shape of the token embedding.
        n_positions: number of learned positions; None for models without.
        position_offset: rows of the position table in front of that of position 0 (OPT has 2).
        d_embedding: width of the token embedding if it is another than d_model; ``project_in`` leads from one to the
            other.
        scale: factor of the token embedding.
        dropout: of the sum.
        parallel: the ranks over which the vocabulary is cut; a single process by default.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        *,
        n_positions: int | None = None,
        position_offset: int = 0,
        d_embedding: int | None = None,
        scale: float = 1.0,
        dropout: float = 0.0,
        parallel: TensorParallel = SINGLE_PROCESS,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.position_offset = position_offset
        self.scale = scale
        self.parallel = parallel
        self.word_embeddings = parallel.embedding(
            vocab_size, d_model if d_embedding is None else d_embedding, **factory
        )
        self.project_in = (
            None if d_embedding is None else nn.Linear(d_embedding, d_model, bias=False, **factory)
        )
        self.position_embeddings = (
            None if n_positions is None else nn.Embedding(n_positions + position_offset, d_model, **factory)
        )
        parallel.mark(self.project_in, self.position_embeddings)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, input_ids: Tensor, offset: int | Tensor = 0, position_ids: Tensor | None = None
    ) -> Tensor:
        """input_ids (B,S), whose first ones are at position ``offset``, or ``offset[b]`` of (B,) -> (B,S,d_model).

        With ``position_ids``, integers of the same shape, each is where these say, and the shape may be any. Where
        ranks share the tokens, positions come first, and the result is this rank's part of (S,B,d_model).
        """
        is_cut = self.parallel.cuts_tokens(self.training)
        x = self.word_embeddings(input_ids.t() if is_cut else input_ids)
        if self.project_in is not None:
            x = self.project_in(x)
        if self.scale != 1.0:
            x = x * self.scale
        if self.position_embeddings is not None:
            if position_ids is None:
                first = offset[:, None] if isinstance(offset, Tensor) else offset
                position_ids = torch.arange(input_ids.shape[1], device=input_ids.device) + first
            if is_cut:
                position_ids = position_ids.expand(input_ids.shape).t()
                position_ids = self.parallel.own_part(position_ids, self.training)
            x = x + self.position_embeddings(position_ids + self.position_offset)
        return self.dropout(x)

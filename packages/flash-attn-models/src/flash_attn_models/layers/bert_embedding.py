"""BERT's input embedding."""

from __future__ import annotations

import torch
from flash_attn_ops.norm import LayerNorm
from torch import Tensor, nn

from flash_attn_models.tensor_parallel.plan import SINGLE_PROCESS, TensorParallel


class BertEmbeddings(nn.Module):
    """dropout(norm(word_embeddings[ids] + token_type_embeddings[types] + position_embeddings[positions])).

    Args:
        vocab_size, n_positions, n_token_types, d_model: shapes of the three tables.
        pad_token_id: the token whose row gets no gradient from here; None is no token.
        norm_eps: of the norm.
        dropout: of the normalised sum.
        parallel: the ranks over which the vocabulary is cut; a single process by default.
    """

    def __init__(
        self,
        vocab_size: int,
        n_positions: int,
        n_token_types: int,
        d_model: int,
        *,
        pad_token_id: int | None = None,
        norm_eps: float = 1e-12,
        dropout: float = 0.0,
        parallel: TensorParallel = SINGLE_PROCESS,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.parallel = parallel
        self.word_embeddings = parallel.embedding(
            vocab_size, d_model, padding_idx=pad_token_id, device=device, dtype=dtype
        )
        self.position_embeddings = nn.Embedding(n_positions, d_model, device=device, dtype=dtype)
        self.token_type_embeddings = nn.Embedding(n_token_types, d_model, device=device, dtype=dtype)
        self.norm = LayerNorm(d_model, eps=norm_eps, device=device, dtype=dtype)
        self.dropout = nn.Dropout(dropout)
        parallel.mark(self.position_embeddings, self.token_type_embeddings, self.norm)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """input_ids (...), positions and types of shapes that broadcast with it -> (...,d_model).

        Without types, all tokens have type 0. Where ranks share the tokens, ids (T,), with positions and types of the
        same shape, give this rank's part of (T,d_model).
        """
        words = self.word_embeddings(input_ids)
        position_ids = self.parallel.own_part(position_ids, self.training)
        if token_type_ids is not None:
            token_type_ids = self.parallel.own_part(token_type_ids, self.training)
        types = (
            self.token_type_embeddings.weight[0]
            if token_type_ids is None
            else self.token_type_embeddings(token_type_ids)
        )
        return self.dropout(self.norm(words + types + self.position_embeddings(position_ids)))

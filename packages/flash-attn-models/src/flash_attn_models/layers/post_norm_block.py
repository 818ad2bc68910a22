"""The post-norm transformer block of encoders."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from flash_attn_models.layers.bidirectional import BidirectionalSelfAttention


class PostNormBlock(nn.Module):
    """One layer: x = norm1(dropout(mixer(x)) + x); x = norm2(dropout(mlp(x)) + x).

    Dropout, addition and norm are one pass over memory, and belong to the norm.

    Args:
        mixer: attention.
        norm1, norm2: norms with ``forward(x, residual)``, which drop elements of x in training.
        mlp: feed-forward layer, ``forward(x)``.
    """

    def __init__(
        self, mixer: BidirectionalSelfAttention, norm1: nn.Module, mlp: nn.Module, norm2: nn.Module
    ) -> None:
        super().__init__()
        self.mixer = mixer
        self.norm1 = norm1
        self.mlp = mlp
        self.norm2 = norm2

    def forward(self, x: Tensor, **where: Any) -> Tensor:
        """x to a tensor of its shape; the options are those of ``BidirectionalSelfAttention.forward``."""
        x = self.norm1(self.mixer(x, **where), residual=x)
        return self.norm2(self.mlp(x), residual=x)

    def forward_rows(
        self, x: Tensor, rows: Tensor, cu_rows: Tensor, cu_seqlens: Tensor, max_seqlen: int | None = None
    ) -> Tensor:
        """Only the given rows of the result: see ``BidirectionalSelfAttention.forward_rows``."""
        parallel = self.mixer.parallel
        entered = parallel.enter(x, self.training)
        attended = self.mixer.attend_rows(entered, rows, cu_rows, cu_seqlens, max_seqlen)
        if parallel.cuts_tokens(self.training):  # x has not all rows then
            x, rows = entered, parallel.own_part(rows, self.training)
        x = self.norm1(attended, residual=x.index_select(0, rows))
        return self.norm2(self.mlp(x), residual=x)

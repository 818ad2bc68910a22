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

    def forward(
        self, x: Tensor, *, rows: Tensor | None = None, cu_rows: Tensor | None = None, **where: Any
    ) -> Tensor:
        """x to a tensor of its shape, or to some rows of it.

        Args:
            x, where: see ``BidirectionalSelfAttention.forward``.
            rows, cu_rows: of packed tokens, the only ones to compute: see ``BidirectionalSelfAttention.attend_rows``.
        """
        # One entrance for both: what wraps a layer's call, such as FSDP or compilation, then wraps all that it does.
        if rows is None:
            residual, attended = x, self.mixer(x, **where)
        else:
            assert cu_rows is not None
            residual, attended = self._attend_rows(x, rows, cu_rows, **where)
        x = self.norm1(attended, residual=residual)
        return self.norm2(self.mlp(x), residual=x)

    def _attend_rows(self, x: Tensor, rows: Tensor, cu_rows: Tensor, **where: Any) -> tuple[Tensor, Tensor]:
        """These rows of x and of attention's output; of both this rank's part where ranks share the tokens."""
        parallel = self.mixer.parallel
        entered = parallel.enter(x, self.training)
        attended = self.mixer.attend_rows(entered, rows, cu_rows, **where)
        if parallel.cuts_tokens(self.training):  # x has not all rows then
            x, rows = entered, parallel.own_part(rows, self.training)
        return x.index_select(0, rows), attended

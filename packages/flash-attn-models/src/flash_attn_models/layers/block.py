"""The pre-norm transformer block, arranged so that each residual addition happens inside a norm."""

from __future__ import annotations

from torch import Tensor, nn

from flash_attn_models.layers.kv_cache import KVCache


class Block(nn.Module):
    """One layer: r = r + dropout(mixer(norm1(r))); r = r + dropout(mlp(norm2(r))).

    The sum of a branch and the residual stream is left to the next norm, which adds and normalises in one
    pass over memory. So a block takes and returns a pair: the last branch's output, and the residual without
    it.

    Args:
        norm1, norm2: norms with ``forward(x, residual, prenorm=True) -> (norm(x + residual), x + residual)``.
        mixer: attention, ``forward(x, cache)``.
        mlp: feed-forward layer, ``forward(x)``.
        dropout: of each branch's output.
    """

    def __init__(
        self, norm1: nn.Module, mixer: nn.Module, norm2: nn.Module, mlp: nn.Module, *, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1 = norm1
        self.mixer = mixer
        self.norm2 = norm2
        self.mlp = mlp
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, cache: KVCache | None = None
    ) -> tuple[Tensor, Tensor]:
        """Branch x (B,S,d_model) and the residual it belongs to (None: none yet) -> both after the layer."""
        x, residual = self.norm1(x, residual=residual, prenorm=True)
        x = self.dropout(self.mixer(x, cache))
        x, residual = self.norm2(x, residual=residual, prenorm=True)
        return self.dropout(self.mlp(x)), residual

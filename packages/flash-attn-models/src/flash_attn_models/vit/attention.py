"""Self-attention over the tokens of an image.

Dimensions in comments: B batch, S tokens, H heads, D width of a head.
"""

from __future__ import annotations

import torch
from flash_attn_ops.attention import flash_attn_func
from torch import Tensor

from flash_attn_models.layers.bidirectional import BidirectionalSelfAttention


class ViTAttention(BidirectionalSelfAttention):
    """``BidirectionalSelfAttention``, where ``Wqkv`` may lack the bias that ``out_proj`` has, and where the first token
    alone may ask."""

    def __init__(
        self,
        d_model: int,
        n_head: int,
        *,
        qkv_bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(d_model, n_head, dropout=dropout, device=device, dtype=dtype)
        if not qkv_bias:
            self.Wqkv.register_parameter("bias", None)

    def forward_first(self, x: Tensor) -> Tensor:
        """The same as ``forward(x)[:, :1]``, and nothing computed for other tokens but their keys and values.

        x (B,S,d_model) -> (B,1,d_model).
        """
        q, k, v = self._project_apart(x[:, :1], x)
        out = flash_attn_func(q, k, v, dropout_p=self._dropout_p)
        return self.out_proj(out.flatten(-2))

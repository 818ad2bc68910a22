"""Self-attention over the tokens of an image.

Dimensions in comments: B batch, S tokens, H heads, D width of a head.
"""

from __future__ import annotations

from flash_attn_ops.attention import flash_attn_func
from torch import Tensor

from flash_attn_models.layers.bidirectional import BidirectionalSelfAttention


class ViTAttention(BidirectionalSelfAttention):
    """``BidirectionalSelfAttention`` where the first token alone may ask."""

    def forward_first(self, x: Tensor) -> Tensor:
        """The same as ``forward(x)[:, :1]``, and nothing computed for other tokens but their keys and values.

        x (B,S,d_model) -> (B,1,d_model).
        """
        x = self.parallel.enter(x, self.training)
        q, k, v = self._project_apart(x[:, :1], x)
        with self.parallel.randomness_of_heads(self._dropout_p > 0.0):
            out = flash_attn_func(q, k, v, dropout_p=self._dropout_p)
        return self.out_proj(out.flatten(-2))

"""Bidirectional self-attention of encoders, over padded batches or packed tokens.

Dimensions in comments: B batch, S tokens of a padded sequence, T packed tokens, R rows of them, H heads, D width of a
head.
"""

from __future__ import annotations

import torch
from flash_attn_ops.attention import (
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_qkvpacked_func,
)
from torch import Tensor, nn
from torch.nn import functional as F

from flash_attn_models.layers.head_sizes import head_sizes
from flash_attn_models.tensor_parallel.plan import SINGLE_PROCESS, TensorParallel


class BidirectionalSelfAttention(nn.Module):
    """out_proj(softmax(q k^T / sqrt(D)) v), with q, k, v from one projection; every token sees its whole sequence.

    Args:
        d_model: width of the input and output.
        n_head: heads, a divisor of d_model.
        bias: of the two projections.
        qkv_bias: of the first one, if that is another.
        dropout: of the attention probabilities, in training.
        parallel: the ranks over which heads are cut; a single process by default. Where they share the tokens in
            training, x is this rank's part of its first dimension, and so is the result.

    Parameters: ``Wqkv`` with rows [q (H D) | k (H D) | v (H D)], and ``out_proj``.
    """

    def __init__(
        self,
        d_model: int,
        n_head: int,
        *,
        bias: bool = True,
        qkv_bias: bool | None = None,
        dropout: float = 0.0,
        parallel: TensorParallel = SINGLE_PROCESS,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.parallel = parallel
        _, self.d_head = head_sizes(d_model, n_head, None, None)
        partition = parallel.heads(n_head, n_head, self.d_head)
        self.n_head = len(partition.heads(parallel.group.rank)[0])  # of this rank
        self.dropout = dropout
        self.Wqkv = parallel.qkv(
            d_model, partition, bias=bias if qkv_bias is None else qkv_bias, device=device, dtype=dtype
        )
        self.out_proj = parallel.heads_out(d_model, partition, bias=bias, device=device, dtype=dtype)

    def forward(
        self,
        x: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """x to a tensor of its shape.

        Args:
            x: (B,S,d_model); with ``cu_seqlens`` (T,d_model), the tokens of all sequences one after the other.
            key_padding_mask: of a padded batch, bool (B,S): True is a real token. Others are seen by no token.
            cu_seqlens: int32 (B+1,), where each sequence begins, and T.
            max_seqlen: the longest sequence, a hint.
        """
        qkv = self.Wqkv(x).unflatten(-1, (3, self.n_head, self.d_head))
        with self.parallel.randomness_of_heads(self._dropout_p > 0.0):
            if cu_seqlens is None:
                out = flash_attn_qkvpacked_func(qkv, self._dropout_p, key_padding_mask=key_padding_mask)
            else:
                out = flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen, self._dropout_p)
        return self.out_proj(out.flatten(-2))

    def attend_rows(
        self,
        entered: Tensor,
        rows: Tensor,
        cu_rows: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """The same as ``forward(x, cu_seqlens=cu_seqlens)[rows]``, and nothing computed for other rows but their
        keys and values.

        Args:
            entered: ``parallel.enter(x)``, for x (T,d_model).
            rows: int64 (R,), ascending.
            cu_rows: int32 (B+1,), where the rows of each sequence begin among all rows, and R.
            cu_seqlens, max_seqlen: of x.

        Returns:
            (R,d_model). Where ranks share the tokens, this rank's part of it; they must divide R then, which may be
            more than ``cu_rows[-1]``.
        """
        q, k, v = self._project_apart(entered.index_select(0, rows), entered)
        with self.parallel.randomness_of_heads(self._dropout_p > 0.0):
            out = flash_attn_varlen_func(
                q, k, v, cu_rows, cu_seqlens, max_seqlen, max_seqlen, dropout_p=self._dropout_p
            )
        return self.out_proj(out.flatten(-2))

    def _project_apart(self, asking: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of the tokens ``asking``, keys and values of those of x, each (..., H, D)."""
        sizes = (self.n_head * self.d_head, 2 * self.n_head * self.d_head)
        weight_q, weight_kv = self.Wqkv.weight.split(sizes)
        bias_q, bias_kv = (None, None) if self.Wqkv.bias is None else self.Wqkv.bias.split(sizes)
        q = F.linear(asking, weight_q, bias_q).unflatten(-1, (self.n_head, self.d_head))
        k, v = F.linear(x, weight_kv, bias_kv).unflatten(-1, (2, self.n_head, self.d_head)).unbind(-3)
        return q, k, v

    @property
    def _dropout_p(self) -> float:
        return self.dropout if self.training else 0.0

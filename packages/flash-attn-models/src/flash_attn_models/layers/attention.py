"""Causal self-attention: multi-head, multi-query or grouped-query; rotary positions, ALiBi, sliding window, softcap,
normalised queries and keys; key/value cache.

Dimensions in comments: B batch, S new tokens, T all tokens so far, H query heads, Hk key/value heads, D width
of a head.
"""

from __future__ import annotations

import torch
from flash_attn_ops.attention import flash_attn_func, flash_attn_with_kvcache
from flash_attn_ops.rotary import RotaryEmbedding
from torch import Tensor, nn

from flash_attn_models.layers.alibi import ALiBi
from flash_attn_models.layers.kv_cache import Cache


class CausalSelfAttention(nn.Module):
    """out_proj(softmax(scale q k^T + bias, causal) v), with q, k, v from one projection.

    Args:
        d_model: width of the input and output.
        n_head: query heads.
        n_head_kv: key/value heads, a divisor of n_head; each serves n_head / n_head_kv query heads. None is
            n_head.
        d_head: head width D; None is d_model / n_head.
        qkv_bias, out_bias: biases of the two projections.
        rotary: rotates queries and keys by their position; None for models with other position information.
            Layers may share one module.
        alibi: adds -slope * distance to the scores; None for models with other position information. Layers may
            share one.
        window: each token sees this many last ones, itself among them; None is all.
        softcap: products become ``softcap * tanh(scale q k^T / softcap)``; 0 is off.
        softmax_scale: factor of the scores; None is 1 / sqrt(D).
        q_norm, k_norm: norms over D, before positions are applied; None leaves queries and keys as they are.
        dropout: of the attention probabilities, in training.
        layer: index of this layer in the cache.

    Parameters: ``Wqkv`` with rows [q (H D) | k (Hk D) | v (Hk D)], ``out_proj``, and those of the norms.
    """

    def __init__(
        self,
        d_model: int,
        n_head: int,
        *,
        n_head_kv: int | None = None,
        d_head: int | None = None,
        qkv_bias: bool = True,
        out_bias: bool = True,
        rotary: RotaryEmbedding | None = None,
        alibi: ALiBi | None = None,
        window: int | None = None,
        softcap: float = 0.0,
        softmax_scale: float | None = None,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
        dropout: float = 0.0,
        layer: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.n_head = n_head
        self.n_head_kv = n_head if n_head_kv is None else n_head_kv
        self.d_head = d_model // n_head if d_head is None else d_head
        self.dropout = dropout
        self.layer = layer
        self.rotary = rotary
        self.alibi = alibi
        self.window_size = (-1 if window is None else window - 1, -1)
        self.softcap = softcap
        self.softmax_scale = softmax_scale
        heads = self.n_head + 2 * self.n_head_kv
        self.Wqkv = nn.Linear(d_model, heads * self.d_head, bias=qkv_bias, device=device, dtype=dtype)
        self.q_norm = q_norm
        self.k_norm = k_norm
        self.out_proj = nn.Linear(
            self.n_head * self.d_head, d_model, bias=out_bias, device=device, dtype=dtype
        )

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """x (B,S,d_model) -> (B,S,d_model). With a cache, row b of x follows the ``cache.lengths[b]`` tokens in it."""
        heads = self.Wqkv(x).unflatten(-1, (-1, self.d_head))  # (B,S,H+2Hk,D)
        q, k, v = heads.split([self.n_head, self.n_head_kv, self.n_head_kv], dim=-2)
        if self.q_norm is not None:
            q = self.q_norm(q)
        if self.k_norm is not None:
            k = self.k_norm(k)
        out = self._attend(q, k, v) if cache is None else self._attend_to_cache(q, k, v, cache)
        return self.out_proj(out.flatten(-2))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B,S,H,D), k and v (B,S,Hk,D) -> (B,S,H,D)."""
        if self.rotary is not None:
            q, k = self.rotary(q, k)
        return flash_attn_func(
            q,
            k,
            v,
            dropout_p=self.dropout if self.training else 0.0,
            softmax_scale=self.softmax_scale,
            causal=True,
            window_size=self.window_size,
            softcap=self.softcap,
            alibi_slopes=None if self.alibi is None else self.alibi.slopes(q.device),
        )

    def _attend_to_cache(self, q: Tensor, k: Tensor, v: Tensor, cache: Cache) -> Tensor:
        """The same for tokens that follow those in the cache, to which theirs are added: one call that rotates,
        appends and attends."""
        cache.check_keys(k)
        cos: Tensor | None = None
        sin: Tensor | None = None
        if self.rotary is not None:
            if self.rotary.scale_base is None:
                cos, sin = self.rotary.tables(cache.max_positions, q.device)
            else:  # keys have tables of their own, which the call does not know
                q, k = self.rotary(q, k, seqlen_offset=cache.lengths, max_seqlen=cache.max_positions)
        # Causal, window and ALiBi are bottom-right aligned, so S new queries against T keys see exactly what
        # precedes them.
        out: Tensor = flash_attn_with_kvcache(
            q,
            cache.k[self.layer],
            cache.v[self.layer],
            k,
            v,
            rotary_cos=cos,
            rotary_sin=sin,
            cache_seqlens=cache.lengths,
            block_table=cache.block_table,
            softmax_scale=self.softmax_scale,
            causal=True,
            window_size=self.window_size,
            softcap=self.softcap,
            rotary_interleaved=self.rotary is not None and self.rotary.interleaved,
            alibi_slopes=None if self.alibi is None else self.alibi.slopes(q.device),
        )
        return out

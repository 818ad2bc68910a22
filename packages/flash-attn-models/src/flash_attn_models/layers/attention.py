"""Causal self-attention: multi-head, multi-query or grouped-query; rotary positions, ALiBi, sliding window, softcap,
sinks, normalised queries and keys, depthwise convolution; packed documents; key/value cache.

Dimensions in comments: B batch, S new tokens, T packed tokens, H query heads, Hk key/value heads, D width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from flash_attn_ops.attention import (
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from flash_attn_ops.distributed import Partition
from flash_attn_ops.rotary import RotaryEmbedding
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flash_attn_models.errors import bad_argument
from flash_attn_models.layers.alibi import ALiBi
from flash_attn_models.layers.depthwise_conv import CausalDepthwiseConv
from flash_attn_models.layers.head_sizes import head_sizes
from flash_attn_models.layers.kv_cache import Cache
from flash_attn_models.layers.packed import Documents
from flash_attn_models.tensor_parallel.heads import QueryPartition, summed_over_sharers
from flash_attn_models.tensor_parallel.plan import SINGLE_PROCESS, TensorParallel


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
        sinks: each head has one more logit in its softmax, a parameter, without a value: what a token attends to if
            nothing else deserves it. Zero at first.
        conv_width: width of a causal depthwise convolution over queries, keys and values, before all else; None is
            none.
        dropout: of the attention probabilities, in training.
        layer: index of this layer in the cache.
        parallel: the ranks over which heads are cut; a single process by default. A rank has whole groups of queries
            with their key/value head; if there are fewer of these than ranks, several ranks hold the same one.

    Parameters: ``Wqkv`` with rows [q (H D) | k (Hk D) | v (Hk D)], ``out_proj``, those of the norms, ``sinks`` (H,),
    and those of ``dwconv`` with channels in the order of the rows of Wqkv.

    Attributes:
        checkpointing: if set to True, attention (between the two projections) is computed again in the backward pass,
            and keeps nothing but queries, keys and values. False after construction.
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
        sinks: bool = False,
        conv_width: int | None = None,
        dropout: float = 0.0,
        layer: int = 0,
        parallel: TensorParallel = SINGLE_PROCESS,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.parallel = parallel
        if window is not None and window < 1:
            raise bad_argument("window", window, "at least 1 token, or None", "leave it out for all tokens")
        all_heads_kv, self.d_head = head_sizes(d_model, n_head, n_head_kv, d_head)
        self.partition = parallel.heads(n_head, all_heads_kv, self.d_head)
        self.heads, heads_kv = self.partition.heads(parallel.group.rank)
        self.n_head, self.n_head_kv = len(self.heads), len(heads_kv)  # of this rank
        self.dropout = dropout
        self.checkpointing = False
        self.layer = layer
        self.rotary = rotary
        self.alibi = alibi
        self.window_size = (-1 if window is None else window - 1, -1)
        self.softcap = softcap
        self.softmax_scale = softmax_scale
        rows = (self.n_head + 2 * self.n_head_kv) * self.d_head
        self.Wqkv = parallel.qkv(d_model, self.partition, bias=qkv_bias, device=device, dtype=dtype)
        self.dwconv = (
            None if conv_width is None else CausalDepthwiseConv(rows, conv_width, device=device, dtype=dtype)
        )
        self.q_norm = q_norm
        self.k_norm = k_norm
        self.sinks = nn.Parameter(torch.zeros(self.n_head, device=device, dtype=dtype)) if sinks else None
        self.out_proj = parallel.heads_out(d_model, self.partition, bias=out_bias, device=device, dtype=dtype)

    def forward(self, x: Tensor, cache: Cache | None = None, *, documents: Documents | None = None) -> Tensor:
        """x (B,S,d_model) -> (B,S,d_model). With a cache, row b of x follows the ``cache.lengths[b]`` tokens in it.

        With ``documents``, and then without a cache, x is packed (T,d_model), and each document is by itself.
        """
        qkv = self.Wqkv(x)
        # Where ranks share the tokens, positions come first: (S,B,d_model), of which each has a part.
        positions_first = documents is None and self.parallel.cuts_tokens(self.training)
        if positions_first:
            qkv = qkv.transpose(0, 1)
        if self.dwconv is not None:
            qkv = (
                self._convolve(self.dwconv, qkv, documents)
                if cache is None
                else self.dwconv.forward_cached(qkv, cache, self.layer)
            )
        heads = qkv.unflatten(-1, (-1, self.d_head))  # (B,S,H+2Hk,D)
        if cache is not None:
            out = self._attend_to_cache(*self._queries_keys_values(heads), cache)
        elif self.checkpointing and torch.is_grad_enabled():
            out = checkpoint(self._attend, heads, documents, use_reentrant=False)
        else:
            out = self._attend(heads, documents)
        out = out.flatten(-2)
        return self.out_proj(out.transpose(0, 1) if positions_first else out)

    def partitions(self) -> dict[str, tuple[Partition, int]]:
        """How parameters of the layer itself, and of the convolution, are cut: name, partition, dimension."""
        cuts: dict[str, tuple[Partition, int]] = {}
        if self.sinks is not None:
            cuts["sinks"] = (QueryPartition.of_heads(self.partition, 1), 0)
        if self.dwconv is not None:
            cuts |= {f"dwconv.{name}": (self.partition, 0) for name, _ in self.dwconv.named_parameters()}
        return cuts

    def _convolve(self, dwconv: nn.Module, qkv: Tensor, documents: Documents | None) -> Tensor:
        if not self.partition.is_shared:
            return dwconv(qkv, documents)
        parameters = {
            name: summed_over_sharers(parameter, self.partition, self.parallel.group)
            for name, parameter in dwconv.named_parameters()
        }
        return torch.func.functional_call(dwconv, parameters, (qkv, documents))

    def _slopes(self, device: torch.device) -> Tensor | None:
        """ALiBi's of this rank's heads."""
        if self.alibi is None:
            return None
        return self.alibi.slopes(device)[self.heads.start : self.heads.stop]

    def _queries_keys_values(self, heads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(...,H+2Hk,D) to q, k and v, normalised."""
        q, k, v = heads.split([self.n_head, self.n_head_kv, self.n_head_kv], dim=-2)
        if self.q_norm is not None:
            q = self.parallel.on_own_heads(self.q_norm, q)
        if self.k_norm is not None:
            k = self.parallel.on_own_heads(self.k_norm, k)
        return q, k, v

    def _attend(self, heads: Tensor, documents: Documents | None) -> Tensor:
        """(B,S,H+2Hk,D) -> (B,S,H,D); or packed, with T in the place of B and S."""
        options: dict[str, Any] = {
            "dropout_p": self.dropout if self.training else 0.0,
            "softmax_scale": self.softmax_scale,
            "causal": True,
            "window_size": self.window_size,
            "softcap": self.softcap,
            "alibi_slopes": self._slopes(heads.device),
            "learnable_sink": self.sinks,
        }
        with self.parallel.randomness_of_heads(options["dropout_p"] > 0.0):
            if self.rotary is None and self.q_norm is None and self.k_norm is None:
                # As they come from the projection: their gradient is made in one piece.
                options["num_heads_q"] = self.n_head
                if documents is None:
                    return flash_attn_qkvpacked_func(heads, **options)
                return flash_attn_varlen_qkvpacked_func(
                    heads, documents.cu_seqlens, documents.max_seqlen, **options
                )
            q, k, v = self._queries_keys_values(heads)
            if documents is None:
                if self.rotary is not None:
                    q, k = self.rotary(q, k)
                return flash_attn_func(q, k, v, **options)
            where, longest = documents.cu_seqlens, documents.max_seqlen
            if self.rotary is not None:
                q, k = self.rotary(q, k, max_seqlen=longest, cu_seqlens=where)
            return flash_attn_varlen_func(q, k, v, where, where, longest, longest, **options)

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
            alibi_slopes=self._slopes(q.device),
            learnable_sink=self.sinks,
        )
        return out

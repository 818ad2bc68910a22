"""Attention functions for the layer above, and which of their paths a model takes."""

from __future__ import annotations

import torch
from flash_attn_ops.attention import Explanation, explain, flash_attn_func, flash_attn_varlen_func

from flash_attn_models.gpt.config import GPTConfig

__all__ = ["Explanation", "attention_path", "explain", "flash_attn_func", "flash_attn_varlen_func"]


def attention_path(
    config: GPTConfig, *, seqlen: int, device: torch.device | str, dtype: torch.dtype
) -> Explanation:
    """What the attention of a model in training will run on, and why each faster path was passed over.

    Args:
        config: the model; the last layer's window and all options of its attention count.
        seqlen: tokens per sequence.
        device, dtype: where and in which precision attention computes (under autocast, autocast's dtype).
    """

    # Expanded, so that asking about a long sequence takes no memory.
    def heads(count: int) -> torch.Tensor:
        return torch.empty(1, 1, count, config.head_dim, device=device, dtype=dtype).expand(1, seqlen, -1, -1)

    k = heads(config.num_heads_kv)
    window = config.window_of(config.n_layer - 1)
    return explain(
        heads(config.n_head),
        k,
        k,
        dropout_p=config.attn_dropout,
        softmax_scale=config.softmax_scale,
        causal=True,
        window_size=(-1 if window is None else window - 1, -1),
        softcap=0.0 if config.softcap is None else config.softcap,
        alibi_slopes=torch.empty(config.n_head, device=device) if config.position == "alibi" else None,
        learnable_sink=torch.empty(config.n_head, device=device, dtype=dtype) if config.sinks else None,
    )

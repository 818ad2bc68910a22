"""Attention functions for the layer above, and which of their paths a model takes."""

from __future__ import annotations

import torch
from flash_attn_ops.attention import (
    Explanation,
    explain,
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_qkvpacked_func,
)

from flash_attn_models.errors import bad_argument
from flash_attn_models.gpt.config import GPTConfig

__all__ = [
    "Explanation",
    "attention_path",
    "explain",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_qkvpacked_func",
]


def attention_path(
    config: GPTConfig,
    *,
    seqlen: int,
    device: torch.device | str,
    dtype: torch.dtype,
    layer: int | None = None,
) -> Explanation:
    """What the attention of a model in training will run on, and why each faster path was passed over.

    Args:
        config: the model; all options of its attention count.
        seqlen: tokens per sequence.
        device, dtype: where and in which precision attention computes (under autocast, autocast's dtype).
        layer: which layer, from 0 on. None is all: where layers with a window and without take different paths, the
            answer is about those that take the slower one.

    Raises:
        ValueError: no such layer.
    """
    if layer is None:
        # Layers differ in windows and in scales; the latter change no path.
        of_windows = {config.window_of(i): i for i in range(config.n_layer)}
        answers = [
            attention_path(config, seqlen=seqlen, device=device, dtype=dtype, layer=i)
            for i in of_windows.values()
        ]
        return max(answers, key=lambda answer: (len(answer.reasons), len(answer.sm80_backward)))
    if not 0 <= layer < config.n_layer:
        raise bad_argument("layer", layer, f"a layer of n_layer={config.n_layer}", "count from 0")

    # Expanded, so that asking about a long sequence takes no memory.
    def heads(count: int) -> torch.Tensor:
        return torch.empty(1, 1, count, config.head_dim, device=device, dtype=dtype).expand(1, seqlen, -1, -1)

    k = heads(config.num_heads_kv)
    window = config.window_of(layer)
    return explain(
        heads(config.n_head),
        k,
        k,
        dropout_p=config.attn_dropout,
        softmax_scale=config.softmax_scale_of(layer),
        causal=True,
        window_size=(-1 if window is None else window - 1, -1),
        softcap=0.0 if config.softcap is None else config.softcap,
        alibi_slopes=torch.empty(config.n_head, device=device) if config.position == "alibi" else None,
        learnable_sink=torch.empty(config.n_head, device=device, dtype=dtype) if config.sinks else None,
    )

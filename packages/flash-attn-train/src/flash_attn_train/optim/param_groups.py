"""Which parameters AdamW decays."""

from __future__ import annotations

from typing import Any

from torch import nn


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two AdamW groups: matrices with ``weight_decay``, everything else with 0.

    Not decayed are biases and normalisation weights, recognised by having fewer than two dimensions whatever
    module holds them, and embeddings, recognised by their module (a tied output layer is an embedding too).
    Frozen parameters are in no group; a parameter shared by several modules is in one group, once.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        is_plain = parameter.ndim < 2 or id(parameter) in embeddings
        (plain if is_plain else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]

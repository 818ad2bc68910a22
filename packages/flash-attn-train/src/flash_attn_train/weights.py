"""The weights of a checkpoint, under the names that the model has for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flash_attn_train.callbacks.ema import EMA_KEY
from flash_attn_train.errors import CheckpointError
from flash_attn_train.optim.parameters import plain_name

_PREFIX = "model."  # of the attribute of the Lightning module that has the model


def has_average(checkpoint: Mapping[str, Any]) -> bool:
    return bool(checkpoint.get(EMA_KEY))


def model_weights(checkpoint: Mapping[str, Any], *, use_ema: bool, source: str) -> dict[str, Tensor]:
    """Weights and buffers of the model in a checkpoint that Lightning wrote, whole and on the CPU.

    Args:
        use_ema: take averaged weights where the checkpoint has them.
        source: what a message calls the checkpoint.

    Raises:
        CheckpointError: there are none.
    """
    stored = _plain(checkpoint.get("state_dict", {}))
    if not stored:
        raise CheckpointError(
            f"{source}: got a file without weights under 'state_dict' named '{_PREFIX}*', expected a checkpoint that "
            "flash-attn-train wrote. Convert other files to a folder in Hugging Face layout."
        )
    averages = _plain(checkpoint.get(EMA_KEY) or {}) if use_ema else {}
    return {name: _average_of(name, stored, averages) for name in stored}


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    plain = {plain_name(name): tensor for name, tensor in tensors.items()}
    return {name.removeprefix(_PREFIX): plain[name] for name in plain if name.startswith(_PREFIX)}


def _average_of(name: str, stored: Mapping[str, Tensor], averages: Mapping[str, Tensor]) -> Tensor:
    """The average in the dtype of the weights. There is none of buffers; of a tied matrix under one name only."""
    own = stored[name]
    if name in averages:
        return averages[name].to(own.dtype)
    if own.ndim >= 2:
        for other, average in averages.items():
            if average.shape == own.shape and torch.equal(stored[other], own):
                return average.to(own.dtype)
    return own

"""Labels out of range: found at once on a CPU, and on a GPU when asked."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from flash_attn_ops.arguments import bad_argument
from flash_attn_ops.dispatch import has_memory

VARIABLE = "FLASH_ATTN_OPS_VALIDATE_LABELS"


def check_labels(labels: Tensor, num_classes: int, ignore_index: int, validate: bool | None) -> None:
    """``validate`` None is the environment's choice, and then the CPU's labels are always read, since that costs no
    waiting, where there are any. Compiled graphs cannot read them."""
    if torch.compiler.is_compiling():
        return
    if validate is None:
        validate = labels.device.type == "cpu" or os.environ.get(VARIABLE) == "1"
        validate = validate and has_memory(labels)
    if not validate:
        return
    outside = ((labels < 0) | (labels >= num_classes)) & (labels != ignore_index)
    if outside.any():
        row = int(outside.flatten().nonzero()[0])
        expected = f"classes in [0, {num_classes}) or ignore_index ({ignore_index})"
        got = f"{labels.flatten()[row].item()} in row {row}, the first of {int(outside.sum())} out of range"
        raise bad_argument("labels", got, expected, "map the labels to the logits' classes")

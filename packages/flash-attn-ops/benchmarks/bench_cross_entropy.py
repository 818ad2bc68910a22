"""Cross-entropy of 8192 rows against eager torch and torch.compile.

Bytes that must move: forward reads the logits; backward reads them and writes their gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from flash_attn_ops.cross_entropy import cross_entropy
from memory_bound import Case, run
from torch import Tensor

ROWS = 8192


def make_case(classes: int) -> Case:
    labels = torch.randint(0, classes, (ROWS,), device="cuda")

    def inputs() -> list[Tensor]:
        return [torch.randn(ROWS, classes, device="cuda", dtype=torch.bfloat16).requires_grad_()]

    def ours(logits: Tensor) -> Tensor:
        return cross_entropy(logits, labels)

    def theirs(logits: Tensor) -> Tensor:
        return F.cross_entropy(
            logits.float(), labels
        )  # in bfloat16 the loss would be rounded to three digits

    logits_bytes = 2 * ROWS * classes
    return Case(
        {"dtype": "bfloat16", "rows": ROWS, "classes": classes},
        inputs,
        {"ours": ours, "torch": theirs, "torch.compile": torch.compile(theirs, dynamic=False)},
        forward_bytes=logits_bytes,
        backward_bytes=2 * logits_bytes,
    )


def cases(quick: bool) -> list[Callable[[], Case]]:
    sizes = [32768] if quick else [32768, 50257, 131072]
    return [partial(make_case, classes) for classes in sizes]


if __name__ == "__main__":
    run("cross_entropy", __doc__.splitlines()[0], cases)

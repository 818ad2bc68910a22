"""How much a model has been trained on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class Seen(Metric):
    """Tokens and samples that all processes have trained on, since the first step of the first session.

    Counts what is in the batches, so that it stays right if a resumed run has another batch size or other sequence
    lengths. The saved totals (:meth:`totals`) are those of all processes together: a resumed run may have another
    number of them. Padding (attention_mask 0) is not counted. Nothing waits for the device before :meth:`totals`.
    """

    is_differentiable = False
    full_state_update = False
    tokens: Tensor
    samples: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("tokens", "samples"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, batch: dict[str, Any]) -> None:
        """Adds a batch: of ``input_ids`` (B,S) and maybe ``attention_mask`` (B,S), or of ``images`` (B,C,H,W)."""
        if "input_ids" in batch:
            self.samples += len(batch["input_ids"])
            mask = batch.get("attention_mask")
            self.tokens += batch["input_ids"].numel() if mask is None else (mask != 0).sum()
        else:
            self.samples += len(batch["images"])

    def compute(self) -> Tensor:
        """int64 (2,): tokens and samples."""
        return torch.stack([self.tokens, self.samples])

    def totals(self) -> dict[str, int]:
        """Plain numbers. All processes must call it together; it waits for the device."""
        self._computed = None  # torchmetrics keeps the last result, also where only restore() came after it
        tokens, samples = self.compute().tolist()
        return {"tokens": tokens, "samples": samples}

    def restore(self, totals: dict[str, int], *, is_first: bool) -> None:
        """Continues from what an earlier session saved; ``is_first`` on exactly one of the processes."""
        self.reset()
        if is_first:
            self.tokens += totals["tokens"]
            self.samples += totals["samples"]

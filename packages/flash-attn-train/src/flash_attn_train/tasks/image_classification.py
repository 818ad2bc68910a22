"""One label for each image."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from flash_attn_train.configs import ImageClassificationConfig, ViTModelConfig
from flash_attn_train.models import vit_config
from flash_attn_train.tasks.task import Batch, StepOutput, Task


class ImageClassification(Task):
    """Cross-entropy on the class of an image.

    Batches have ``images`` (B,C,H,W), normalised, and ``labels``: classes (B,) int64, or where images are mixed
    probabilities (B,classes).
    """

    @property
    def tokens_per_sample(self) -> int:
        assert isinstance(self.config.model, ViTModelConfig)
        return vit_config(self.config.model, self.sizes).n_tokens

    def step(self, batch: Batch) -> StepOutput:
        assert isinstance(self.config.task, ImageClassificationConfig)
        labels = batch["labels"]
        logits = self.model(batch["images"]).logits
        smoothing = self.config.task.label_smoothing if self.training else 0.0
        # In float32 also under autocast, as autocast does for losses.
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
        if labels.ndim == 1:
            counted = (labels != -100).sum()
        else:
            counted = torch.full((), len(labels), dtype=torch.int64, device=labels.device)
        return StepOutput(loss, counted, logits, labels)

"""One label for each text."""

from __future__ import annotations

from flash_attn_models.loss import cross_entropy

from flash_attn_train.configs import BertModelConfig, SequenceClassificationConfig
from flash_attn_train.tasks.task import Batch, StepOutput, Task


class SequenceClassification(Task):
    """Cross-entropy on the class of a text.

    Batches have ``input_ids`` and ``attention_mask`` (B,S), False at padding, and ``labels`` (B,).
    """

    @property
    def tokens_per_sample(self) -> int:
        assert isinstance(self.config.model, BertModelConfig)
        return self.config.model.max_seqlen

    def step(self, batch: Batch) -> StepOutput:
        assert isinstance(self.config.task, SequenceClassificationConfig)
        labels = batch["labels"]
        logits = self.model(batch["input_ids"], batch["attention_mask"])
        smoothing = self.config.task.label_smoothing if self.training else 0.0
        loss = cross_entropy(logits, labels, label_smoothing=smoothing)
        return StepOutput(loss, (labels != -100).sum(), logits, labels)

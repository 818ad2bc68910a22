"""Next-token prediction."""

from __future__ import annotations

from flash_attn_models.gpt import GPTLMHeadModel
from flash_attn_models.loss import cross_entropy
from torch import Tensor

from flash_attn_train.configs import GPTModelConfig, HuggingFaceModelConfig
from flash_attn_train.tasks.task import Batch, StepOutput, Task


class LanguageModel(Task):
    """Cross-entropy on the next token.

    Batches have ``input_ids`` and ``labels``, (B,S) int64, the label of a token being the one after it, or -100 where
    it does not count. With ``cu_seqlens`` and ``max_seqlen``, boundaries of documents in the B * S tokens, attention
    stays inside each document and positions start anew.
    """

    @property
    def tokens_per_sample(self) -> int:
        assert isinstance(self.config.model, (GPTModelConfig, HuggingFaceModelConfig))
        return self.config.model.max_seqlen

    def step(self, batch: Batch) -> StepOutput:
        labels = batch["labels"].flatten()
        loss = self.loss(batch, labels)
        return StepOutput(loss, (labels != -100).sum(), None, labels)

    def loss(self, batch: Batch, labels: Tensor) -> Tensor:
        if not isinstance(self.model, GPTLMHeadModel):
            logits = self.model(batch["input_ids"]).logits
            return cross_entropy(logits.flatten(0, 1), labels)
        if "cu_seqlens" not in batch:
            return self.model.loss(batch["input_ids"], batch["labels"])
        return self.model.loss(
            batch["input_ids"].flatten(),
            labels,
            cu_seqlens=batch["cu_seqlens"],
            max_seqlen=batch["max_seqlen"],
        )

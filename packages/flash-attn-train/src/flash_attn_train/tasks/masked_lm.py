"""Prediction of hidden tokens."""

from __future__ import annotations

from flash_attn_models.loss import cross_entropy

from flash_attn_train.configs import BertModelConfig
from flash_attn_train.tasks.task import Batch, StepOutput, Task


class MaskedLM(Task):
    """Cross-entropy on tokens that are hidden from the model (Devlin et al. 2018, arXiv:1810.04805).

    Batches have ``input_ids`` with some of the tokens replaced, ``attention_mask`` (False at padding) and ``labels``
    (-100 but for those to predict), all (B,S).
    """

    targets_vary = True

    @property
    def tokens_per_sample(self) -> int:
        assert isinstance(self.config.model, BertModelConfig)
        return self.config.model.max_seqlen

    def step(self, batch: Batch) -> StepOutput:
        tokens, labels = (batch["input_ids"], batch["attention_mask"]), batch["labels"]
        counted = labels != -100
        if self.training:  # logits never exist together
            return StepOutput(self.model(*tokens, labels=labels).loss, counted.sum(), None, labels)
        logits = self.model(*tokens, masked_tokens_mask=counted).logits
        return StepOutput(cross_entropy(logits, labels[counted]), counted.sum(), logits, labels[counted])

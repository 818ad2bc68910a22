"""BERT with a classification head."""

from __future__ import annotations

from typing import Any

from flash_attn_models.bert import BertConfig, BertModel
from torch import Tensor, nn


class BertForSequenceClassification(nn.Module):
    """dropout, then a linear layer, on BERT's pooled output.

    Parameters: ``bert`` and ``classifier``, as Hugging Face names them.

    Args:
        config: the encoder.
        n_classes: of the head.
        options: ``device``, ``dtype`` and others of ``BertModel``.
    """

    def __init__(self, config: BertConfig, n_classes: int, **options: Any) -> None:
        super().__init__()
        self.config = config
        self.bert = BertModel(config, with_pooler=True, **options)
        self.parallel = self.bert.parallel  # how ranks share it, as our models say it
        factory = {name: options[name] for name in ("device", "dtype") if name in options}
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.d_model, n_classes, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new initial weights from torch's global random generator."""
        self.bert.reset_parameters()
        nn.init.normal_(self.classifier.weight, std=self.config.initializer_range)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Token ids and mask (B,S) -> logits (B,n_classes)."""
        return self.classifier(self.dropout(self.bert(input_ids, attention_mask).pooled))

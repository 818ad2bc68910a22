"""BERT: encoder, pretraining heads, embeddings of texts."""

from flash_attn_models.bert.config import BertConfig
from flash_attn_models.bert.embeddings import encode
from flash_attn_models.bert.heads import (
    BertForMaskedLM,
    BertForPreTraining,
    BertMaskedLMOutput,
    BertPreTrainingOutput,
)
from flash_attn_models.bert.model import BertModel, BertOutput

__all__ = [
    "BertConfig",
    "BertForMaskedLM",
    "BertForPreTraining",
    "BertMaskedLMOutput",
    "BertModel",
    "BertOutput",
    "BertPreTrainingOutput",
    "encode",
]

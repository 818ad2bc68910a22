"""The language-model loss, for the layer above."""

from flash_attn_ops.cross_entropy import CrossEntropyLoss, cross_entropy

__all__ = ["CrossEntropyLoss", "cross_entropy"]

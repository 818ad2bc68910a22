"""What is measured of a model: torchmetrics' Metric classes, reduced over all processes, over whole validations."""

from flash_attn_train.metrics.accuracy import Accuracy
from flash_attn_train.metrics.build import build_metrics
from flash_attn_train.metrics.loss import Loss, Perplexity, bits_per_byte
from flash_attn_train.metrics.seen import Seen

__all__ = ["Accuracy", "Loss", "Perplexity", "Seen", "bits_per_byte", "build_metrics"]

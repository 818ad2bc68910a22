"""Lightning callbacks: measure, show, save."""

from flash_attn_train.callbacks.checkpoint import RunCheckpoint
from flash_attn_train.callbacks.final_validation import FinalValidation
from flash_attn_train.callbacks.metrics import METRICS, Metrics
from flash_attn_train.callbacks.progress import Progress

__all__ = ["METRICS", "FinalValidation", "Metrics", "Progress", "RunCheckpoint"]

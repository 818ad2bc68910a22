"""Lightning callbacks: measure, show, guard, save."""

from flash_attn_train.callbacks.build import WatchedRun, build_callbacks
from flash_attn_train.callbacks.causality import CausalityMonitor
from flash_attn_train.callbacks.checkpoint import RunCheckpoint
from flash_attn_train.callbacks.ema import EMA, EMA_KEY
from flash_attn_train.callbacks.final_validation import FinalValidation
from flash_attn_train.callbacks.gpu_affinity import GpuAffinity
from flash_attn_train.callbacks.loss_scale import LossScaleMonitor
from flash_attn_train.callbacks.metrics import Metrics
from flash_attn_train.callbacks.model_facts import ModelFacts
from flash_attn_train.callbacks.nan_guard import NaNGuard
from flash_attn_train.callbacks.norms import NormMonitor
from flash_attn_train.callbacks.progress import Progress
from flash_attn_train.callbacks.speed import SpeedMonitor

__all__ = [
    "EMA",
    "EMA_KEY",
    "CausalityMonitor",
    "FinalValidation",
    "GpuAffinity",
    "LossScaleMonitor",
    "Metrics",
    "ModelFacts",
    "NaNGuard",
    "NormMonitor",
    "Progress",
    "RunCheckpoint",
    "SpeedMonitor",
    "WatchedRun",
    "build_callbacks",
]

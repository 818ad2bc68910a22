"""Typed configuration: the schema (dataclasses), its groups, and the checks that every config passes."""

from flash_attn_train.configs.callbacks import CallbacksConfig
from flash_attn_train.configs.checks import check_config
from flash_attn_train.configs.data import DataConfig, TextDataConfig, TokenizerConfig
from flash_attn_train.configs.logger import LoggerConfig
from flash_attn_train.configs.metrics import MetricsConfig
from flash_attn_train.configs.model import (
    BertModelConfig,
    GPTModelConfig,
    HuggingFaceModelConfig,
    ModelConfig,
    ViTModelConfig,
)
from flash_attn_train.configs.optimizer import AdamWConfig, OptimizerConfig
from flash_attn_train.configs.scheduler import CosineConfig, SchedulerConfig
from flash_attn_train.configs.schema import (
    CheckpointConfig,
    GenerationConfig,
    TrainConfig,
    TrainerConfig,
)
from flash_attn_train.configs.strategy import SingleDeviceConfig, StrategyConfig
from flash_attn_train.configs.task import (
    ImageClassificationConfig,
    LanguageModelConfig,
    MaskedLMConfig,
    SequenceClassificationConfig,
    TaskConfig,
)
from flash_attn_train.configs.unread import check_read

__all__ = [
    "AdamWConfig",
    "BertModelConfig",
    "CallbacksConfig",
    "CheckpointConfig",
    "CosineConfig",
    "DataConfig",
    "GPTModelConfig",
    "GenerationConfig",
    "HuggingFaceModelConfig",
    "ImageClassificationConfig",
    "LanguageModelConfig",
    "LoggerConfig",
    "MaskedLMConfig",
    "MetricsConfig",
    "ModelConfig",
    "OptimizerConfig",
    "SchedulerConfig",
    "SequenceClassificationConfig",
    "SingleDeviceConfig",
    "StrategyConfig",
    "TaskConfig",
    "TextDataConfig",
    "TokenizerConfig",
    "TrainConfig",
    "TrainerConfig",
    "ViTModelConfig",
    "check_config",
    "check_read",
]

"""Typed configuration: the schema (dataclasses), named presets, and the checks that every config passes."""

from flash_attn_train.configs.checks import check_config
from flash_attn_train.configs.schema import (
    CheckpointConfig,
    DataConfig,
    GenerationConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    SchedulerConfig,
    TokenizerConfig,
    TrainConfig,
    TrainerConfig,
)

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "GenerationConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "SchedulerConfig",
    "TokenizerConfig",
    "TrainConfig",
    "TrainerConfig",
    "check_config",
]

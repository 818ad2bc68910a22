"""Which values of different sections fit together."""

from __future__ import annotations

from flash_attn_train.configs.data import HubTextDataConfig, TextDataConfig
from flash_attn_train.configs.model import (
    BertModelConfig,
    GPTModelConfig,
    HuggingFaceModelConfig,
    ModelConfig,
    ViTModelConfig,
)
from flash_attn_train.configs.schema import TrainConfig
from flash_attn_train.configs.task import (
    ImageClassificationConfig,
    LanguageModelConfig,
    MaskedLMConfig,
    SequenceClassificationConfig,
    TaskConfig,
)
from flash_attn_train.errors import ConfigError

# Task -> the models that can learn it.
_MODELS_OF_TASK: dict[type[TaskConfig], tuple[type[ModelConfig], ...]] = {
    LanguageModelConfig: (GPTModelConfig, HuggingFaceModelConfig),
    MaskedLMConfig: (BertModelConfig,),
    SequenceClassificationConfig: (BertModelConfig,),
    ImageClassificationConfig: (ViTModelConfig,),
}


def check_together(config: TrainConfig) -> None:
    """Raises :class:`ConfigError`, naming both sides, where two values do not fit."""
    _check_task(config)
    _check_shape(config.model)
    _check_batch(config)
    _check_length(config)
    _check_schedule(config)
    _check_activation_checkpointing(config)
    _check_paths(config)


def _check_task(config: TrainConfig) -> None:
    allowed = _MODELS_OF_TASK[type(config.task)]
    if not isinstance(config.model, allowed):
        expected = " or ".join(kind.__name__ for kind in allowed)
        raise ConfigError(
            f"model: got {type(config.model).__name__} for the task {type(config.task).__name__}, expected "
            f"{expected}. Choose another model or task."
        )
    if (
        isinstance(config.task, LanguageModelConfig)
        and config.task.documents == "within"
        and isinstance(config.model, HuggingFaceModelConfig)
    ):
        raise ConfigError(
            "task.documents: got 'within' with a model of transformers, expected 'across'; choose one of our "
            "models to keep attention inside documents."
        )


def _check_shape(model: ModelConfig) -> None:
    if isinstance(model, HuggingFaceModelConfig):
        return
    assert isinstance(model, (GPTModelConfig, BertModelConfig, ViTModelConfig))
    if getattr(model, "d_head", None) is None and model.d_model % model.n_head:
        raise ConfigError(
            f"model.d_model: got {model.d_model}, expected a multiple of model.n_head ({model.n_head}); "
            "change one of the two."
        )
    if isinstance(model, GPTModelConfig) and model.n_head_kv is not None and model.n_head % model.n_head_kv:
        raise ConfigError(
            f"model.n_head_kv: got {model.n_head_kv}, expected a divisor of model.n_head ({model.n_head})."
        )
    if isinstance(model, ViTModelConfig) and model.image_size % model.patch_size:
        raise ConfigError(
            f"model.image_size: got {model.image_size}, expected a multiple of model.patch_size "
            f"({model.patch_size})."
        )


def _check_batch(config: TrainConfig) -> None:
    trainer = config.trainer
    if trainer.global_batch_size is not None and trainer.accumulate_grad_batches != 1:
        raise ConfigError(
            f"trainer.accumulate_grad_batches: got {trainer.accumulate_grad_batches}, expected to be left out "
            f"with trainer.global_batch_size={trainer.global_batch_size}, which sets it."
        )


def _check_length(config: TrainConfig) -> None:
    trainer, data = config.trainer, config.data
    if trainer.max_epochs is None:
        if trainer.max_steps < 1:
            raise ConfigError(
                f"trainer.max_steps: got {trainer.max_steps}, expected a whole number, at least 1; or -1 with "
                "trainer.max_epochs."
            )
        return
    if trainer.max_steps != -1:
        raise ConfigError(
            f"trainer.max_steps: got {trainer.max_steps} with trainer.max_epochs={trainer.max_epochs}, expected one of "
            "the two. Set trainer.max_steps=-1 for the epochs, or trainer.max_epochs=null for the steps."
        )
    if isinstance(data, HubTextDataConfig) and data.streaming:
        raise ConfigError(
            f"trainer.max_epochs: got {trainer.max_epochs} with data.streaming=true, whose length is not known; "
            "expected trainer.max_steps."
        )


def _check_schedule(config: TrainConfig) -> None:
    scheduler = config.scheduler
    if scheduler.decay_steps is None and config.trainer.max_epochs is not None:
        return  # it is checked when the data have said how many steps that is
    decay_steps = scheduler.decay_steps or config.trainer.max_steps
    if scheduler.warmup_steps is not None and scheduler.warmup_steps > decay_steps:
        raise ConfigError(
            f"scheduler.warmup_steps: got {scheduler.warmup_steps}, expected at most {decay_steps}, the "
            "length of the schedule (scheduler.decay_steps, or trainer.max_steps where that is null)."
        )


def _check_activation_checkpointing(config: TrainConfig) -> None:
    what = config.trainer.activation_checkpointing
    if what not in ("none", "layers") and not isinstance(config.model, GPTModelConfig):
        raise ConfigError(
            f"trainer.activation_checkpointing: got {what!r} for a {type(config.model).__name__}, expected none or "
            "layers; only a GPT has it for parts of its layers."
        )


def _check_paths(config: TrainConfig) -> None:
    """Empty ones would be the folder that the command runs in."""
    if (
        isinstance(config.data, TextDataConfig)
        and config.data.path is not None
        and not config.data.path.strip()
    ):
        raise ConfigError(
            f"data.path: got {config.data.path!r}, expected a file or folder of text; or null, for the source of "
            "Python's standard library."
        )
    if not config.output_dir.strip():
        raise ConfigError(f"output_dir: got {config.output_dir!r}, expected a folder, such as runs/mine.")

"""Models of transformers, to compare with: new ones, and pretrained ones."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from torch import nn

from flash_attn_train.configs.model import HuggingFaceModelConfig
from flash_attn_train.errors import CheckpointError, ConfigError


def build_hugging_face_model(config: HuggingFaceModelConfig, vocab_size: int) -> nn.Module:
    """A decoder of transformers with random weights, from torch's global generator.

    Raises:
        ConfigError: transformers is not installed, or the options do not make a model of it.
    """
    try:
        import transformers
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    except ImportError as error:
        raise ConfigError(
            "model: a model of transformers needs that package; pip install flash-attn-train[transformers]."
        ) from error
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ConfigError(
            f"model.model_type: got {config.model_type!r}, expected one that transformers has a causal language "
            f"model of; the nearest is {_nearest(config.model_type, list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))!r}."
        )
    if config.attn_implementation == "fa_kernels":
        from flash_attn_models.transformers_integration import register_with_transformers

        register_with_transformers()
    _check_fields(config, transformers.AutoConfig.for_model(config.model_type))
    # Names of the context length, by family; those that a config does not have are ignored by it.
    lengths = dict.fromkeys(("n_positions", "max_position_embeddings"), config.max_seqlen)
    # Special tokens are the tokenizer's business; a family's own numbers may be past the end of this vocabulary.
    special = dict.fromkeys(("bos_token_id", "eos_token_id"))
    fields = {"vocab_size": vocab_size, **special, **lengths, **config.config}
    try:
        shape = transformers.AutoConfig.for_model(config.model_type, **fields)
        return transformers.AutoModelForCausalLM.from_config(
            shape, attn_implementation=config.attn_implementation
        )
    except ImportError as error:
        raise ConfigError(f"model.attn_implementation={config.attn_implementation}: {error}") from error
    except Exception as error:  # of several kinds, one of them derived from Exception alone
        raise ConfigError(
            f"model: transformers makes no {config.model_type} of model.config={config.config} and "
            f"model.attn_implementation={config.attn_implementation!r}: {error}"
        ) from error


def read_hugging_face_model(kind: Any, source: str, **options: Any) -> tuple[Any, set[str]]:
    """A pretrained model, and the names of the tensors that its files lack: these have random values.

    Args:
        kind: class of transformers, such as AutoModelForCausalLM.
        source: folder, or name on the hub.
        options: of its ``from_pretrained``.

    Raises:
        CheckpointError: it cannot be read.
    """
    folder = Path(source).expanduser()
    try:
        model, report = kind.from_pretrained(
            str(folder) if folder.exists() else source, output_loading_info=True, **options
        )
    except Exception as error:  # of the hub, of safetensors, of pickle, of the config's fields
        raise CheckpointError(f"{source}: transformers cannot read it: {error}") from error
    return model, set(report["missing_keys"])


def _check_fields(config: HuggingFaceModelConfig, default: Any) -> None:
    # transformers keeps what it does not know, and does nothing with it.
    known = {*default.to_dict(), *default.attribute_map}
    if "rope_parameters" in known:
        known |= {"rope_theta", "rope_scaling"}  # names of earlier releases, which it still reads
    for name in config.config:
        if name not in known:
            raise ConfigError(
                f"model.config.{name}: {type(default).__name__} of transformers has no such field; the nearest is "
                f"{_nearest(name, sorted(known))!r}."
            )


def _nearest(name: str, known: list[str]) -> str:
    return difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]

"""A trained model from where it is kept: a run, a checkpoint, or a model in Hugging Face layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import singledispatch
from pathlib import Path
from typing import Any

import torch
from flash_attn_models import from_pretrained
from flash_attn_models.bert import BertForMaskedLM
from flash_attn_models.gpt import GPTLMHeadModel
from flash_attn_models.vit import ViTForImageClassification
from torch import Tensor, nn

from flash_attn_train.checkpoints import read_checkpoint
from flash_attn_train.cli import compose_part
from flash_attn_train.configs import ModelConfig, TrainConfig, ViTModelConfig
from flash_attn_train.errors import CheckpointError, ConfigError
from flash_attn_train.hugging_face import read_hugging_face_model
from flash_attn_train.label_names import read_label_names
from flash_attn_train.models import DataSizes, build_model
from flash_attn_train.run_folder import find_checkpoint, folder_of_checkpoint
from flash_attn_train.saved_config import for_measuring, override_keys, restore_config
from flash_attn_train.weights import has_average, model_weights

# Context in which a pretrained decoder is measured unless model.max_seqlen says another; some have 131,072.
_LONGEST_CONTEXT = 1024
# Ends of the names of the matrix with a row for each token: of ours, and of transformers' models.
_TOKEN_EMBEDDINGS = ("word_embeddings.weight", "wte.weight", "embed_tokens.weight", "embed_in.weight")


@dataclass(frozen=True)
class Restored:
    """A model with trained weights, on the CPU.

    Attributes:
        model: in evaluation mode.
        config: for one process on this machine.
        sizes: of the model: rows of its vocabulary, or classes.
        weights: "trained", or "averaged".
        checkpoint: file or folder; None of a pretrained model.
        step: optimizer steps that it was trained for; None where that is not known.
        tokenizer: tokenizer.json of the run; None where there is none.
        data_key: of the data that it was trained on; None where that is not known.
        label_names: of the classes, by class number; empty where they are not known.
    """

    model: nn.Module
    config: TrainConfig
    sizes: DataSizes
    weights: str
    checkpoint: Path | None = None
    step: int | None = None
    tokenizer: Path | None = None
    data_key: str | None = None
    label_names: Sequence[str] = ()


def restore(source: str, overrides: Sequence[str] = (), *, use_ema: bool = True) -> Restored:
    """The model of a source, with the config to measure it by.

    Args:
        source: a run folder; a checkpoint of a run; a checkpoint that Lightning wrote of another module whose model is
            its attribute ``model``, with task and model in ``overrides``; a folder in Hugging Face layout or the name
            of a model on the hub.
        overrides: ``key=value`` and ``GROUP=NAME`` as for flash-attn-train, on top of the source's own.
        use_ema: take averaged weights where a checkpoint has them.

    Raises:
        CheckpointError: the source cannot be read, or has not the weights of the model.
        ConfigError: an override is wrong.
    """
    path = find_checkpoint(source)
    return _of_hub(source, overrides) if path is None else _of_checkpoint(path, overrides, use_ema)


def _of_checkpoint(path: Path, overrides: Sequence[str], use_ema: bool) -> Restored:
    checkpoint = read_checkpoint(path)
    tensors = model_weights(checkpoint, use_ema=use_ema, source=str(path))
    if "config" in checkpoint:
        config = restore_config(checkpoint["config"], overrides, source=str(path))
    else:
        override_keys(overrides)
        config = compose_part(["experiment=none", *overrides])
    folder = folder_of_checkpoint(path)
    found = folder.tokenizer if folder is not None and folder.tokenizer.is_file() else None
    config = for_measuring(config, override_keys(overrides), found)
    sizes = _sizes_of(config.model, tensors)
    names = read_label_names(checkpoint, folder)
    model = build_model(config.model, sizes)
    _load(model, tensors, str(path))
    return Restored(
        model=model.eval(),
        config=config,
        sizes=sizes,
        weights="averaged" if use_ema and has_average(checkpoint) else "trained",
        checkpoint=path,
        step=checkpoint.get("global_step"),
        tokenizer=found,
        data_key=checkpoint.get("data_key"),
        label_names=names if len(names) == sizes.num_classes else [],
    )


def _load(model: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:  # names every tensor that is missing, unexpected or of another shape
        raise CheckpointError(
            f"{source} has not the weights of the model: {error}. Leave model=... out to take the checkpoint's own, or "
            "give the model that it is of."
        ) from error


@singledispatch
def _sizes_of(config: ModelConfig, tensors: Mapping[str, Tensor]) -> DataSizes:
    """Vocabulary and classes, from the shapes of weights."""
    embeddings = [tensor for name, tensor in tensors.items() if name.endswith(_TOKEN_EMBEDDINGS)]
    if not embeddings:
        raise CheckpointError(
            f"the checkpoint has no matrix whose name ends in {', '.join(_TOKEN_EMBEDDINGS)}; expected the "
            f"weights of a {type(config).__name__}. Name the checkpoint's model with model=..."
        )
    classes = tensors.get("classifier.weight")  # of BERT with a head for classes
    return DataSizes(len(embeddings[0]), 0 if classes is None else len(classes))


@_sizes_of.register
def _(config: ViTModelConfig, tensors: Mapping[str, Tensor]) -> DataSizes:
    if "head.weight" not in tensors:
        raise CheckpointError(
            "the checkpoint has no head.weight; expected the weights of a vision transformer with its head. Name the "
            "checkpoint's model with model=..."
        )
    return DataSizes(num_classes=len(tensors["head.weight"]))


def _of_hub(source: str, overrides: Sequence[str]) -> Restored:
    given = override_keys(overrides)
    if "model=hugging_face" in overrides:
        model = _of_transformers(source)
        own = ["model=hugging_face", "task=language_model"]
        vocab_size, num_classes = model.config.vocab_size, 0
        context = getattr(model.config, "max_position_embeddings", None)
        sizes = {"model.model_type": model.config.model_type, "model.max_seqlen": _context(context)}
        has_text = True
    else:
        model = _of_models_package(source)
        own, sizes = _describe(model, source)
        vocab_size, num_classes = (getattr(model.config, name, 0) for name in ("vocab_size", "n_classes"))
        has_text = not isinstance(model, ViTForImageClassification)
    if has_text and not given & {"tokenizer.name", "tokenizer.path"}:
        is_folder = Path(source).expanduser().is_dir()
        sizes["tokenizer.path" if is_folder else "tokenizer.name"] = str(source)
    own = [text for text in own if text.partition("=")[0] not in given]
    config = compose_part(["experiment=none", *own, *overrides])
    for key, value in sizes.items():
        if key not in given:
            section, name = key.split(".")
            setattr(getattr(config, section), name, value)
    return Restored(
        model=model.eval(),
        config=for_measuring(config, given),
        sizes=DataSizes(vocab_size, num_classes),
        weights="trained",
    )


def _of_models_package(source: str) -> Any:
    path = Path(source).expanduser()
    try:
        return from_pretrained(path if path.exists() else source, device="cpu", dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise _unreadable(source, error) from error


def _of_transformers(source: str) -> Any:
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise ConfigError(
            "model: got 'hugging_face', which needs transformers; pip install 'flash-attn-train[transformers]'."
        ) from error
    try:
        model, missing = read_hugging_face_model(AutoModelForCausalLM, source, dtype=torch.float32)
    except CheckpointError as error:
        raise _unreadable(source, error) from error
    if missing:
        raise CheckpointError(
            f"{source}: its files have no {', '.join(sorted(missing)[:3])} ({len(missing)} tensors of the model are "
            "missing); expected all of them, since random ones would be measured in their place."
        )
    return model


def _unreadable(source: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{source}: cannot be read: {error} Expected a run folder or .ckpt of flash-attn-train, a folder with "
        "config.json and weights in Hugging Face layout, or the name of such a model on the hub."
    )


def _describe(model: Any, source: str) -> tuple[list[str], dict[str, Any]]:
    """Task and model that a pretrained model is of, and the options that data depend on."""
    if isinstance(model, GPTLMHeadModel):
        return ["task=language_model", "model=gpt"], {"model.max_seqlen": _context(model.config.max_seqlen)}
    if isinstance(model, BertForMaskedLM):
        return ["task=masked_lm", "model=bert"], {"model.max_seqlen": model.config.max_seqlen}
    if isinstance(model, ViTForImageClassification):
        config = model.config
        for name in ("image_size", "patch_size"):
            value = getattr(config, name)
            if not isinstance(value, int) and len(set(value)) > 1:
                raise CheckpointError(f"{source}: its {name} is {value}, expected a square.")
        square = {
            f"model.{name}": value if isinstance(value, int) else value[0]
            for name, value in (("image_size", config.image_size), ("patch_size", config.patch_size))
        }
        return ["task=image_classification", "model=vit"], {**square, "model.channels": config.n_channels}
    raise CheckpointError(
        f"{source}: got a {type(model).__name__}, which has no head to measure; expected a decoder, a BERT for masked "
        "tokens or a ViT with its head."
    )


def _context(length: int | None) -> int:
    return _LONGEST_CONTEXT if length is None else min(length, _LONGEST_CONTEXT)

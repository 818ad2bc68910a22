"""Weights to start training from: of an earlier run, or of a model in Hugging Face layout."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from flash_attn_models import from_pretrained
from flash_attn_models.bert import BertModel
from flash_attn_models.errors import did_you_mean
from flash_attn_models.gpt import RotaryScaling
from flash_attn_models.vit import ViTConfig, ViTModel, interpolate_positions
from torch import Tensor, nn

from flash_attn_train.checkpoints import map_checkpoint, read_checkpoint
from flash_attn_train.errors import CheckpointError
from flash_attn_train.run_folder import find_checkpoint
from flash_attn_train.weights import model_weights

# What the models package may leave out of a pretrained encoder's files, and what pretraining left over: of no use for
# a model that has no place for them.
_LEFT_OVER = ("bert.pooler.*", "seq_relationship.*")
# Fields of an architecture that do not change what the weights mean, or that shapes are checked for. "d_head",
# "n_head_kv" and the like may be null; their resolved values are compared instead.
_MAY_DIFFER = {
    "vocab_size",
    "max_seqlen",
    "image_size",
    "n_classes",
    "class_names",
    "d_inner",
    "d_head",
    "n_head_kv",
    "rotary_dim",
    "initializer_range",
    "residual_in_fp32",
    "attn_implementation",
    *("bos_token_id", "eos_token_id", "pad_token_id"),
    *("dropout", "embedding_dropout", "attn_dropout", "head_dropout", "drop_path"),
}
# Options of the model group that the models package has under another name.
_ARCHITECTURE_NAMES = {"model.pool": "model.pooling", "model.channels": "model.n_channels"}
_RESOLVED = ("head_dim", "num_heads_kv", "num_rotary_dims")
_POSITIONS = "embeddings.position_embeddings"
_MAX_NAMES_IN_MESSAGE = 6


@dataclasses.dataclass(frozen=True)
class Weights:
    """Weights that were read.

    Attributes:
        tensors: by the names that the model has for them.
        architecture: the source's config fields as far as they are known.
        grid: rows and columns of patches of a ViT; None of others, or where it is not known.
    """

    tensors: Mapping[str, Tensor]
    architecture: Mapping[str, Any]
    grid: tuple[int, int] | None = None


def load_warm_start(
    model: nn.Module,
    source: str,
    *,
    skip: Sequence[str] = (),
    use_ema: bool = True,
    vocab_padding: int = 128,
) -> list[str]:
    """Fills the model with the weights of ``source``, whole or not at all.

    The source is a run folder or checkpoint of this package, a folder in Hugging Face layout, or the name of a model on
    the hub. Every tensor must be in both, under the same name and in the same shape, with these exceptions:

    - names that ``skip`` matches: they keep their initial values, or are left out if only the source has them;
    - a vocabulary that is up to ``vocab_padding`` rows larger or smaller: rows that only the model has keep their
      initial values, those that only the source has are left out;
    - positions of a ViT for another image size: bicubic interpolation with antialiasing, as timm does it;
    - pooler and next-sentence head of a BERT for a model without them.

    Args:
        model: one of the models package or of transformers, on any device, not sharded yet.
        source: see above.
        skip: shell-style patterns of names, such as ``head.*`` for a head of another size.
        use_ema: of a checkpoint with averaged weights take these; False takes those that were trained.
        vocab_padding: see above.

    Returns:
        Names of the model's tensors that kept initial values, whole or in part.

    Raises:
        CheckpointError: a source that cannot be read, names or shapes that differ, a pattern of ``skip`` that matches
            nothing, or an architecture that computes something else with the same weights.
    """
    own = model.state_dict()
    fitted, partial = _fit(model, _read(model, source, use_ema), source, skip, vocab_padding)
    with torch.no_grad():
        for name, tensor in fitted.items():
            own[name][: len(tensor)].copy_(tensor) if tensor.ndim else own[name].copy_(tensor)
    return sorted([*(own.keys() - fitted.keys()), *partial])


def check_warm_start(
    model: nn.Module, source: str, *, skip: Sequence[str] = (), use_ema: bool = True, vocab_padding: int = 128
) -> None:
    """Raises what :func:`load_warm_start` would, but for damage inside tensors; loads nothing.

    Args:
        model: on device "meta" will do.
        source, skip, use_ema, vocab_padding: see there. Of our checkpoints, and of folders that the models package
            loads, names and shapes are read and no weights.
    """
    _fit(model, _read(model, source, use_ema, is_check=True), source, skip, vocab_padding)


def _fit(
    model: nn.Module, weights: Weights, source: str, skip: Sequence[str], vocab_padding: int
) -> tuple[dict[str, Tensor], list[str]]:
    """What the model's tensors get, by name, and which of them get fewer rows than they have."""
    own = model.state_dict()
    _check_architecture(model, weights.architecture, source)
    _check_skip(skip, own, weights.tensors, source)
    wanted = {name: tensor for name, tensor in own.items() if not _matches(name, skip)}
    offered = {name: tensor for name, tensor in weights.tensors.items() if not _matches(name, skip)}
    _check_names(wanted, offered, source, skip)

    fitted, partial, wrong = {}, [], []
    rows = _vocabulary_sizes(model, weights.architecture)
    for name, tensor in wanted.items():
        found = _with_grid(offered[name], name, model, weights.grid)
        if found.shape == tensor.shape:
            fitted[name] = found
        elif _is_vocabulary(found, tensor, rows, vocab_padding):
            fitted[name] = found[: len(tensor)]
            partial += [name] if len(found) < len(tensor) else []
        else:
            wrong.append(f"{name} {tuple(found.shape)} instead of {tuple(tensor.shape)}")
    if wrong:
        raise CheckpointError(
            f"model.warm_start={source}: got {_listed(wrong)}; expected the model's shapes. Choose the sizes of the "
            "source, or leave these tensors at their initial values: "
            f"{_skip_all([text.split()[0] for text in wrong], fitted, skip)}."
        )
    return fitted, partial


def _read(model: nn.Module, source: str, use_ema: bool, *, is_check: bool = False) -> Weights:
    path = find_checkpoint(source)
    if path is not None:
        # Averages have the shapes of the weights.
        return _of_run(path, use_ema and not is_check, map_checkpoint if is_check else read_checkpoint)
    if _is_of_transformers(model):
        return _of_transformers(model, source)
    return _of_models_package(model, source, device="meta" if is_check else "cpu")


def _of_run(path: Path, use_ema: bool, read: Callable[[Path], dict[str, Any]]) -> Weights:
    """Weights in a checkpoint that Lightning wrote for this package."""
    checkpoint = read(path)
    tensors = model_weights(checkpoint, use_ema=use_ema, source=f"model.warm_start={path}")
    fields = {
        _ARCHITECTURE_NAMES.get(key, key).removeprefix("model."): value
        for key, value in checkpoint.get("config", {}).items()
        if key.startswith("model.")
    }
    grid = None
    if "image_size" in fields and "patch_size" in fields:
        grid = (fields["image_size"] // fields["patch_size"],) * 2
    return Weights(tensors, fields | _resolved(fields), grid)


def _resolved(options: Mapping[str, Any]) -> dict[str, Any]:
    """What null and nested options of a decoder stand for, by the architecture's names."""
    if not {"d_model", "n_head", "d_head", "n_head_kv", "position", "rotary_fraction"} <= options.keys():
        return {}
    head_dim = options["d_head"] or options["d_model"] // options["n_head"]
    rotary_dims = 2 * round(head_dim * options["rotary_fraction"] / 2)
    scaling = options.get("rotary_scaling")
    return {
        "rotary_scaling": RotaryScaling.from_dict(scaling) if scaling else None,
        "head_dim": head_dim,
        "num_heads_kv": options["n_head_kv"] or options["n_head"],
        "num_rotary_dims": rotary_dims if options["position"] == "rotary" else 0,
    }


def _of_transformers(model: Any, source: str) -> Weights:
    from flash_attn_train.hugging_face import read_hugging_face_model

    try:
        loaded, missing = read_hugging_face_model(type(model), source)
    except CheckpointError as error:
        raise _unreadable(source, error) from error
    fields = loaded.config.to_dict()
    named = {name: fields[name] for name in ("model_type", "vocab_size") if name in fields}
    tensors = {name: tensor for name, tensor in loaded.state_dict().items() if name not in missing}
    return Weights(tensors, named)


def _of_models_package(model: nn.Module, source: str, *, device: str) -> Weights:
    path = Path(source).expanduser()
    try:
        loaded = from_pretrained(path if path.exists() else source, device=device, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise _unreadable(source, error) from error
    config = loaded.config
    tensors = dict(loaded.state_dict())
    # An encoder without a head is at home under its name in models with one.
    for encoder, name in ((BertModel, "bert"), (ViTModel, "vit")):
        if isinstance(loaded, encoder) and hasattr(model, name):
            tensors = {f"{name}.{key}": tensor for key, tensor in tensors.items()}
    fields = {item.name: getattr(config, item.name) for item in dataclasses.fields(config)}
    fields |= {name: getattr(config, name) for name in _RESOLVED if hasattr(config, name)}
    return Weights(tensors, fields, config.grid if isinstance(config, ViTConfig) else None)


def _unreadable(source: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"model.warm_start={source}: cannot be read: {error} Expected a run folder or .ckpt of flash-attn-train, a "
        "folder with config.json and weights in Hugging Face layout, or the name of such a model on the hub."
    )


def _is_of_transformers(model: nn.Module) -> bool:
    # Without importing transformers, which may not be installed.
    return any(base.__module__.startswith("transformers.") for base in type(model).__mro__)


def _check_architecture(model: nn.Module, fields: Mapping[str, Any], source: str) -> None:
    """Weights may fit by name and shape, and yet mean something else: other heads, activation, rotation."""
    config = getattr(model, "config", None)
    differing = [
        f"{name} ({value!r} there, {getattr(config, name)!r} here)"
        for name, value in fields.items()
        if name not in _MAY_DIFFER and hasattr(config, name) and getattr(config, name) != value
    ]
    if differing:
        raise CheckpointError(
            f"model.warm_start={source}: got another architecture: {', '.join(differing)}; expected the same. "
            "Set the model's options to those of the source."
        )


def _check_skip(skip: Sequence[str], own: Iterable[str], offered: Iterable[str], source: str) -> None:
    names = [*own, *offered]
    for pattern in skip:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise CheckpointError(
                f"model.warm_start_skip: got {pattern!r}, which matches no tensor of the model or of {source}"
                f"{did_you_mean(pattern, names)}; expected a pattern of whole names, such as 'lm_head.*'."
            )


def _check_names(
    wanted: Mapping[str, Tensor], offered: dict[str, Tensor], source: str, skip: Sequence[str]
) -> None:
    missing = [name for name in wanted if name not in offered]
    unexpected = [name for name in offered if name not in wanted and not _matches(name, _LEFT_OVER)]
    problems = []
    if missing:
        problems.append(f"no {_listed([name + did_you_mean(name, unexpected) for name in missing])}")
    if unexpected:
        problems.append(
            f"{_listed([name + did_you_mean(name, missing) for name in unexpected])} that the model has no place for"
        )
    if problems:
        raise CheckpointError(
            f"model.warm_start={source}: got {'; and '.join(problems)}; expected the model's own tensors. Choose the "
            "model that the source has, or let what it lacks stay at its initial values, and leave out what the model "
            f"has no place for: {_skip_all([*missing, *unexpected], wanted.keys() & offered.keys(), skip)}."
        )


def _skip_all(names: Iterable[str], fitting: Iterable[str], skip: Sequence[str]) -> str:
    """The option with which all these names are passed over, and none of those that fit."""
    fitting = list(fitting)
    patterns = dict.fromkeys(skip)
    for name in names:
        parts = name.split(".")
        prefixes = (".".join(parts[:count]) + "." for count in range(1, len(parts)))
        alone = (prefix for prefix in prefixes if not any(other.startswith(prefix) for other in fitting))
        prefix = next(alone, None)
        patterns[name if prefix is None else f"{prefix}*"] = None
    return f"'model.warm_start_skip=[{','.join(patterns)}]'"


def _with_grid(tensor: Tensor, name: str, model: nn.Module, grid: tuple[int, int] | None) -> Tensor:
    """Positions of a ViT for the model's grid of patches; other tensors as they are."""
    config = getattr(model, "config", None)
    if grid is None or not isinstance(config, ViTConfig) or not name.endswith(_POSITIONS):
        return tensor
    return interpolate_positions(tensor, grid, config.grid, n_prefix=config.n_prefix, antialias=True)


def _vocabulary_sizes(model: nn.Module, fields: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Of the source, where it says, and of the model."""
    return fields.get("vocab_size"), getattr(getattr(model, "config", None), "vocab_size", None)


def _is_vocabulary(found: Tensor, tensor: Tensor, sizes: tuple[int | None, int | None], padding: int) -> bool:
    """Whether the two differ in the rows of the vocabulary alone, and by no more than padding."""
    theirs, ours = sizes
    return (
        found.ndim == tensor.ndim > 0
        and found.shape[1:] == tensor.shape[1:]
        and len(tensor) == ours
        and theirs in (None, len(found))  # our checkpoints do not say
        and abs(len(found) - len(tensor)) <= padding
    )


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _listed(names: list[str]) -> str:
    rest = len(names) - _MAX_NAMES_IN_MESSAGE
    return ", ".join(names[:_MAX_NAMES_IN_MESSAGE]) + (f" and {rest} more" if rest > 0 else "")

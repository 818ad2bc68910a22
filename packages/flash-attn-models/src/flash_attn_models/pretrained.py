"""Models by name or in folders of Hugging Face, Meta or Megatron-LM: load decoders, BERT and ViT; and save them so that
transformers loads them."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from flash_attn_ops.distributed import GroupLike
from torch import Tensor

from flash_attn_models.bert import BertForMaskedLM, BertForPreTraining, BertModel
from flash_attn_models.bert import hugging_face as bert_hugging_face
from flash_attn_models.checkpoint_files import TensorInfo, open_checkpoint, read_json, write_safetensors
from flash_attn_models.errors import bad_argument, listed
from flash_attn_models.gpt.hugging_face import (
    MODEL_TYPES,
    Layout,
    config_from_hugging_face,
    config_to_hugging_face,
    hugging_face_layout,
    to_hugging_face,
)
from flash_attn_models.gpt.hugging_face.config_fields import TOKEN_FIELDS
from flash_attn_models.gpt.megatron import is_megatron, open_megatron
from flash_attn_models.gpt.meta_llama import is_meta_llama, open_meta_llama
from flash_attn_models.gpt.model import GPTLMHeadModel
from flash_attn_models.hub import find_folder
from flash_attn_models.tensor_parallel.spread import on_first_rank, spread_model
from flash_attn_models.tensor_parallel.state_dict import gather_state_dict, local_parts
from flash_attn_models.typed_config import is_int
from flash_attn_models.vit import hugging_face as vit_hugging_face

_BERT_MODELS = (BertModel, BertForMaskedLM, BertForPreTraining)


class Checkpoint(Protocol):
    """Tensors of which name, shape and dtype are known before they are read."""

    tensors: dict[str, TensorInfo]

    def read(self, name: str) -> Tensor: ...


def from_pretrained(
    name_or_folder: str | os.PathLike[str],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    process_group: GroupLike = None,
    sequence_parallel: bool = False,
) -> Any:
    """The model of this name, or in this folder, in evaluation mode.

    A name is a size of a family ("llama-3.2-1b"), or a repository of the Hugging Face hub ("openai-community/gpt2"),
    which is downloaded into huggingface_hub's cache unless it is there: safetensors, and .bin files only where there
    are no safetensors. The environment variables HF_HOME, HF_TOKEN and HF_HUB_OFFLINE do what they do elsewhere.

    Args:
        name_or_folder: the name, or a folder as of ``load_pretrained``; a folder of this name comes first.
        device, dtype: see ``load_pretrained``.
        revision: branch, tag or commit of the repository.
        token: for repositories that need one; None is that of ``hf auth login``.
        cache_dir: where downloads are kept.
        local_files_only: take what is cached, and don't connect.
        process_group, sequence_parallel: see ``load_pretrained``. Each rank downloads unless files are there.

    Raises:
        ValueError: as ``load_pretrained``; a name that is neither, a repository or revision that does not exist.
        OSError: a repository that one must ask for; no connection, or nothing cached.
    """
    folder = find_folder(
        name_or_folder,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    return load_pretrained(
        folder, device, dtype, process_group=process_group, sequence_parallel=sequence_parallel
    )


def load_pretrained(
    folder: str | os.PathLike[str],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    process_group: GroupLike = None,
    sequence_parallel: bool = False,
) -> Any:
    """The model in a local folder, in evaluation mode.

    It is a ``GPTLMHeadModel``; in a Hugging Face folder of type "bert" it is a ``BertModel``, ``BertForMaskedLM`` or
    ``BertForPreTraining``, with the heads and the pooler that the files have weights of; of type "vit" likewise a
    ``ViTModel`` or ``ViTForImageClassification``.

    Everything is checked before a weight is read, and each weight goes straight to its place: the model needs
    memory for one copy of the weights (two for a .bin file in the format before torch 1.6, which cannot be
    mapped), and there is no half-loaded model after an error.

    Args:
        folder: of Hugging Face, with ``config.json`` and ``model.safetensors`` or ``pytorch_model.bin``, or their
            shards with an index; Meta's own of a LLaMA, with ``params.json`` and ``consolidated.NN.pth``; or of a GPT
            of Megatron-LM, with ``mp_rank_XX/model_optim_rng.pt`` or the folders of its iterations. Parts of
            model-parallel ranks are joined, a tensor at a time.
        device: of the model; None is torch's default device.
        dtype: of the model; None is the one that the weights are stored in.
        process_group, sequence_parallel: the ranks over which the model is spread, as of its class. Each keeps its part
            of each tensor.

    Raises:
        ValueError: a missing, damaged or incomplete file; a config that asks for what this model does not
            have; missing, unexpected or wrongly shaped tensors, by name with the closest match. Buffers of
            older checkpoints that hold no weights (attention masks, rotary frequencies) are no error.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and _can_be_of_weights(dtype)):
        raise bad_argument(
            "dtype",
            repr(dtype),
            "a torch.dtype of at least 16-bit floating point, or None",
            "give torch.bfloat16, for example",
        )
    model, layout, checkpoint = _open(Path(folder))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    stored_as = _check_names(checkpoint, layout, folder)
    _check_tensors(checkpoint, layout, stored_as, shapes, folder)
    _check_tied_head(checkpoint, layout, stored_as, folder)
    if process_group is not None or sequence_parallel:
        model = spread_model(model, process_group, sequence_parallel)
    device = torch.get_default_device() if device is None else device
    dtype = _stored_dtype(checkpoint, stored_as.values(), folder) if dtype is None else dtype

    weights, part_of = {}, local_parts(model)
    for entry in layout.entries:
        joined = entry.join([checkpoint.read(stored_as[name]) for name in entry.theirs])
        joined = part_of(entry.ours, joined)
        weights[entry.ours] = joined.to(device, dtype, copy=True, memory_format=torch.contiguous_format)
    model.load_state_dict(weights, assign=True)
    return model.eval()


def save_pretrained(
    model: GPTLMHeadModel | bert_hugging_face.AnyBert | vit_hugging_face.AnyViT,
    folder: str | os.PathLike[str],
    *,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a Hugging Face folder, which transformers and ``load_pretrained`` load with the same weights.

    The folder appears complete or not at all: it is written beside its place and then renamed. If the model is spread
    over ranks, all of them must call this; the first one gathers the weights and writes.

    Args:
        folder: must not exist yet, or be empty.
        max_shard_bytes: larger models are split into several safetensors files of at most this size (a single
            larger tensor has its own).

    Raises:
        ValueError: a model that no Hugging Face family can express (naming the fields of the nearest one), or
            a folder that holds something or cannot be written.
    """
    if not isinstance(model, (GPTLMHeadModel, *_BERT_MODELS, *vit_hugging_face.MODELS)):
        raise bad_argument(
            "model",
            f"a {type(model).__name__}",
            "a GPTLMHeadModel, or a BERT or ViT model",
            "unwrap it: model.module, or model._orig_mod",
        )
    if not is_int(max_shard_bytes) or max_shard_bytes < 1:
        raise bad_argument(
            "max_shard_bytes", repr(max_shard_bytes), "at least 1", "leave it out for shards of 5 GB"
        )
    fields, layout = _description(model)
    fields["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    state_dict = gather_state_dict(model) if model.parallel.is_parallel else model.state_dict()
    on_first_rank(
        model.parallel,
        lambda: _write_folder(
            Path(folder).resolve(), fields, to_hugging_face(state_dict or {}, layout), max_shard_bytes
        ),
    )


def _write_folder(
    place: Path, fields: Mapping[str, Any], tensors: Mapping[str, Tensor], max_shard_bytes: int
) -> None:
    partial = _make_partial_folder(place)
    try:
        write_safetensors(partial, tensors, max_shard_bytes)
        (partial / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        if place.exists():
            place.rmdir()  # empty: checked before, and an error if somebody has filled it since
        partial.rename(place)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _open(folder: Path) -> tuple[Any, Layout, Checkpoint]:
    """The model of a folder, without memory, and the layout and the files of its weights."""
    if (folder / "config.json").is_file():
        fields = read_json(folder / "config.json")
        checkpoint = open_checkpoint(folder)
        return *_empty_model(folder, fields, checkpoint), checkpoint
    for is_here, open_folder in ((is_meta_llama, open_meta_llama), (is_megatron, open_megatron)):
        if folder.is_dir() and is_here(folder):
            config, layout, parallel = open_folder(folder)
            return GPTLMHeadModel(config, device="meta"), layout, parallel
    raise bad_argument(
        "folder",
        str(folder),
        "a local folder with config.json and weights",
        "give the folder of a model, or its name to from_pretrained, which downloads it, as "
        "huggingface_hub.snapshot_download(name) does",
    )


def _empty_model(folder: Path, fields: Mapping[str, Any], checkpoint: Checkpoint) -> tuple[Any, Layout]:
    """The model that config.json asks for, without memory, and the layout of its checkpoint."""
    if fields.get("model_type") == "bert":
        bert_config = bert_hugging_face.config_from_hugging_face(fields)
        form = bert_hugging_face.Form.of_names(checkpoint.tensors)
        layout = bert_hugging_face.hugging_face_layout(bert_config, form)
        return form.build(bert_config, device="meta"), layout
    if fields.get("model_type") == "vit":
        return vit_hugging_face.empty_model(fields, checkpoint.tensors)
    if fields.get("model_type") not in MODEL_TYPES:
        raise bad_argument(
            "config field 'model_type'",
            repr(fields.get("model_type")),
            f"one of {', '.join(map(repr, (*MODEL_TYPES, 'bert', 'vit')))}",
            "use a model of one of these types",
        )
    config = config_from_hugging_face({**fields, **_tokens_of_generation(folder)})
    return GPTLMHeadModel(config, device="meta"), hugging_face_layout(config, fields["model_type"])


def _tokens_of_generation(folder: Path) -> dict[str, Any]:
    """Special tokens of generation_config.json, which count: chat models have more ends there than in config.json."""
    file = folder / "generation_config.json"
    fields = read_json(file) if file.is_file() else {}
    return {name: fields[name] for name in TOKEN_FIELDS if fields.get(name) is not None}


def _description(
    model: GPTLMHeadModel | bert_hugging_face.AnyBert | vit_hugging_face.AnyViT,
) -> tuple[dict[str, Any], Layout]:
    """The contents of config.json for this model, and the layout of its checkpoint."""
    if isinstance(model, vit_hugging_face.MODELS):
        return vit_hugging_face.description(model)
    if isinstance(model, _BERT_MODELS):
        form = bert_hugging_face.Form.of_model(model)
        fields = bert_hugging_face.config_to_hugging_face(model.config, form.architecture)
        return fields, bert_hugging_face.hugging_face_layout(model.config, form)
    fields = config_to_hugging_face(model.config)
    return fields, hugging_face_layout(model.config, fields["model_type"])


def _make_partial_folder(place: Path) -> Path:
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise bad_argument(
            "folder",
            str(place),
            "a folder that is empty or does not exist yet",
            "choose another name, or move what is there",
        )
    partial = place.with_name(f".{place.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise bad_argument(
            "folder", f"{place} ({error.strerror})", "a place that can be written to", "choose another place"
        ) from error
    return partial


def _check_names(checkpoint: Checkpoint, layout: Layout, folder: str | os.PathLike[str]) -> dict[str, str]:
    """Each tensor's full Hugging Face name to its name in the files; error if one is missing or too many."""
    stored = list(checkpoint.tensors)
    headless = layout.is_headless(stored)
    stored_as = {
        name: name.removeprefix(layout.base_prefix) if headless else layout.name_in(checkpoint.tensors, name)
        for entry in layout.entries
        for name in entry.theirs
    }
    expected = set(stored_as.values())
    missing = [name for name in stored_as.values() if name not in checkpoint.tensors]
    unexpected = [
        name
        for name in stored
        if name not in expected and name != layout.tied_head and not layout.buffers.fullmatch(name)
    ]
    problems = []
    if missing:
        problems.append(f"missing {listed(missing, unexpected)}")
    if unexpected:
        problems.append(f"unexpected {listed(unexpected, missing)}")
    if problems:
        raise bad_argument(
            f"weights in {folder}",
            "; ".join(problems),
            "exactly the tensors that config.json asks for, and no heads of other tasks",
            "give config.json and weights of the same model",
        )
    return stored_as


def _check_tensors(
    checkpoint: Checkpoint,
    layout: Layout,
    stored_as: dict[str, str],
    shapes: dict[str, tuple[int, ...]],
    folder: str | os.PathLike[str],
) -> None:
    wrong = []
    for entry in layout.entries:
        for name, expected in zip(entry.theirs, entry.split_shapes(shapes[entry.ours]), strict=True):
            stored = checkpoint.tensors[stored_as[name]]
            if stored.shape != expected:
                wrong.append(f"{stored_as[name]} {stored.shape} instead of {expected}")
            if not _can_be_of_weights(stored.dtype):
                wrong.append(f"{stored_as[name]} of {stored.dtype} instead of at least 16-bit floating point")
    if wrong:
        raise bad_argument(
            f"weights in {folder}",
            listed(wrong),
            "the shapes that follow from config.json, not quantised",
            "give config.json and weights of the same model",
        )


def _can_be_of_weights(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize >= 2


def _check_tied_head(
    checkpoint: Checkpoint, layout: Layout, stored_as: dict[str, str], folder: str | os.PathLike[str]
) -> None:
    """Some files repeat the embedding as the head; if the two differ, one of them would be lost."""
    head = layout.tied_head
    if head in checkpoint.tensors and not torch.equal(
        checkpoint.read(head), checkpoint.read(stored_as[layout.embedding])
    ):
        raise bad_argument(
            f"weights in {folder}",
            f"{head} that differs from {stored_as[layout.embedding]}",
            "equal tensors, since config.json ties them",
            "set tie_word_embeddings to false in config.json to keep both",
        )


def _stored_dtype(
    checkpoint: Checkpoint, names: Iterable[str], folder: str | os.PathLike[str]
) -> torch.dtype:
    dtypes = {checkpoint.tensors[name].dtype for name in names}
    if len(dtypes) > 1:
        raise bad_argument(
            "dtype",
            f"None for weights in {folder} of {', '.join(sorted(map(str, dtypes)))}",
            "a dtype",
            "give the dtype to load in",
        )
    return dtypes.pop()

"""Folders of Megatron-LM: ``mp_rank_XX/model_optim_rng.pt``, one for each rank of tensor parallelism."""

from __future__ import annotations

import argparse
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flash_attn_models.checkpoint_files import TensorInfo, unreadable
from flash_attn_models.errors import bad_argument
from flash_attn_models.gpt.config import GPTConfig
from flash_attn_models.gpt.hugging_face.state_dict import Layout, to_hugging_face
from flash_attn_models.gpt.megatron.config import Opaque, config_from_args, config_to_args
from flash_attn_models.gpt.megatron.layout import (
    EMBEDDING,
    HEAD,
    LATEST_VERSION,
    Names,
    division,
    megatron_layout,
)
from flash_attn_models.gpt.model import GPTLMHeadModel
from flash_attn_models.parallel_checkpoint import ParallelCheckpoint, numbered_files

_LATEST = "latest_checkpointed_iteration.txt"
_RANK = re.compile(r"mp_rank_(\d+)(?:_(\d+))?")
# Of arrays, in files that hold the state of numpy's random generator.
_ARRAYS = ("numpy.core.multiarray._reconstruct", "numpy.ndarray", "numpy.dtype")
_FILES = ("model_optim_rng.pt", "model_rng.pt")


class MegatronFile:
    """The file of one rank, mapped into memory.

    Attributes:
        tensors: of the model, by their path in its nested dictionaries.
        args: of the run.
        version: of the checkpoint.
    """

    def __init__(self, path: Path) -> None:
        try:
            stored = _load(path)
            self._tensors = dict(_flat(stored["model"], ""))
        except Exception as error:  # each way to damage a file has exceptions of its own
            raise unreadable(path, error) from error
        self.tensors = {name: TensorInfo(tuple(t.shape), t.dtype, path) for name, t in self._tensors.items()}
        self.version = float(stored.get("checkpoint_version", 0))
        args = stored.get("args")
        if args is None:
            raise bad_argument(
                str(path),
                "no 'args'",
                "the arguments of the run, which say what the model is",
                "add them: checkpoint['args'] = argparse.Namespace(num_layers=...), and save the file again",
            )
        self.args: dict[str, Any] = dict(args) if isinstance(args, Mapping) else vars(args)

    def read(self, name: str) -> Tensor:
        """The tensor of this name."""
        return self._tensors[name]


def is_megatron(folder: Path) -> bool:
    """Whether the folder holds a checkpoint in this form: that of one iteration, or of a run, which names its last."""
    return (folder / _LATEST).is_file() or any(
        _RANK.fullmatch(path.name) for path in folder.iterdir() if path.is_dir()
    )


def open_megatron(folder: Path) -> tuple[GPTConfig, Layout, ParallelCheckpoint]:
    """The config, the layout and the files of a model, checked, without reading a weight.

    No code runs: of what a file holds besides tensors, plain values and the namespace of arguments are loaded, and
    objects of Megatron-LM's own classes are left empty.

    Raises ValueError for an argument that asks for what this model does not have, for pipeline parallelism, and for
    files that are missing or damaged.
    """
    paths = _rank_files(_iteration(folder))
    ranks = [MegatronFile(path) for path in paths]
    first = ranks[0]
    if EMBEDDING not in first.tensors:
        found = ", ".join(list(first.tensors)[:5])
        raise bad_argument(
            str(paths[0]),
            f"tensors {found}",
            f"those of Megatron-LM's GPT, with {EMBEDDING}",
            "convert a checkpoint of Megatron Core with its tools/checkpoint/convert.py --saver legacy",
        )
    args, version = first.args, first.version
    gated = bool(args.get("swiglu"))
    checkpoint = ParallelCheckpoint(
        ranks, paths, lambda name, _: division(name, version=version, gated=gated)
    )
    rows = checkpoint.tensors[EMBEDDING].shape[0]
    untied = HEAD in checkpoint.tensors
    config = config_from_args({"untie_embeddings_and_output_weights": untied, **args}, padded_vocab_size=rows)
    layout = megatron_layout(
        config,
        version=version,
        padding=rows - config.vocab_size,
        names=Names.of(checkpoint.tensors),
    )
    return config, layout, checkpoint


def save_megatron(model: GPTLMHeadModel, folder: str | os.PathLike[str]) -> None:
    """Write a checkpoint in one part that Megatron-LM's legacy GPT loads (``--use-legacy-models --load``), without
    optimizer state.

    Args:
        folder: must not exist yet, or be empty. The file is ``release/mp_rank_00/model_optim_rng.pt`` in it.

    Raises:
        ValueError: a model that Megatron-LM's GPT cannot express, or a folder that holds something.
    """
    if not isinstance(model, GPTLMHeadModel):
        raise bad_argument(
            "model", f"a {type(model).__name__}", "a GPTLMHeadModel", "unwrap it: model.module"
        )
    if model.parallel.is_parallel:
        raise bad_argument(
            "model",
            "a model spread over ranks",
            "one that is whole",
            "write it with save_pretrained and load that without a process group",
        )
    place = Path(folder)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise bad_argument(
            "folder", str(place), "a folder that is empty or does not exist yet", "choose another name"
        )
    args = argparse.Namespace(**config_to_args(model.config))
    tensors = to_hugging_face(model.state_dict(), megatron_layout(model.config))
    stored = {
        "args": args,
        "checkpoint_version": LATEST_VERSION,
        "iteration": 0,
        "model": _nested(tensors),
    }
    rank = place / "release" / "mp_rank_00"
    rank.mkdir(parents=True)
    torch.save(stored, rank / _FILES[0])
    (place / _LATEST).write_text("release\n", encoding="utf-8")


def _iteration(folder: Path) -> Path:
    """The folder of the last iteration of a run, or the folder itself."""
    latest = folder / _LATEST
    if not latest.is_file():
        return folder
    name = latest.read_text(encoding="utf-8").strip()
    iteration = folder / (f"iter_{int(name):07d}" if name.isdigit() else "release")
    if not iteration.is_dir():
        raise bad_argument(
            str(latest), repr(name), f"an iteration that is there, as folder {iteration.name}", "complete it"
        )
    return iteration


def _rank_files(folder: Path) -> list[Path]:
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        match = _RANK.fullmatch(path.name)
        if match is None:
            continue
        if int(match[2] or 0) > 0:
            raise bad_argument(
                str(folder),
                f"{path.name}, a part of pipeline parallelism",
                "all layers in each file",
                "merge the parts with Megatron-LM's tools/checkpoint/convert.py",
            )
        file = next((path / name for name in _FILES if (path / name).is_file()), None)
        if file is None:
            raise bad_argument(str(path), "no model_optim_rng.pt", "that file", "complete the download")
        found[int(match[1])] = file
    if not found:
        raise bad_argument(str(folder), "no mp_rank_00", "one folder for each rank", "give another folder")
    return numbered_files(folder, found)


def _load(path: Path) -> dict[str, Any]:
    """Only tensors, plain containers, the namespace of arguments, and nothing instead of Megatron-LM's objects."""
    foreign: list[Any] = [(Opaque, name) for name in _ARRAYS]
    if zipfile.is_zipfile(path):
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        foreign += [(Opaque, name) for name in unknown if name.split(".")[0] in ("megatron", "numpy")]
    with torch.serialization.safe_globals([argparse.Namespace, *foreign]):
        stored: dict[str, Any] = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    return stored


def _flat(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, value in tree.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")


def _nested(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """As Megatron-LM keeps them: a dictionary for each of its modules, and inside the decoder flat names."""
    model: dict[str, Any] = {"language_model": {"embedding": {}, "encoder": {}}}
    parts = model["language_model"]
    for name, tensor in tensors.items():
        _, part, rest = name.split(".", 2)
        if part == "embedding":
            module, kind = rest.split(".")
            parts["embedding"].setdefault(module, {})[kind] = tensor
        else:
            parts.setdefault(part, {})[rest] = tensor
    return model

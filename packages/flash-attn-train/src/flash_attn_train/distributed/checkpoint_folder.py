"""Checkpoints of many ranks: a folder into which each writes its part.

::

    last.ckpt -> .last.ckpt.5e1f09ab    replaced as a whole, see flash_attn_train.atomic.publish_folder
      tensors/                          torch.distributed.checkpoint: weights and optimizer state by name
      rest.pt                           everything else
      manifest.json                     size and checksum of each file; written last
"""

from __future__ import annotations

import json
import pickle
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from flash_attn_train.atomic import atomic_write, new_folder_for, publish_folder, remove_path, sync_folder
from flash_attn_train.distributed.launch import from_all_ranks, is_rank_zero, on_rank_zero, rank
from flash_attn_train.distributed.optimizer_state import NamedGroups, NamedState, numbered_state
from flash_attn_train.errors import CheckpointError

TENSORS, REST, MANIFEST = "tensors", "rest.pt", "manifest.json"


def is_checkpoint_folder(path: Path) -> bool:
    """Whether ``path`` is meant to be such a checkpoint, whole or not."""
    return path.is_dir() and any((path / name).exists() for name in (TENSORS, REST, MANIFEST))


def write_checkpoint_folder(
    path: Path, checkpoint: dict[str, Any], optimizers: list[tuple[NamedState, NamedGroups]]
) -> None:
    """Writes a checkpoint; to be called on all ranks. ``path`` is replaced once the new one is complete on disk.

    Args:
        path: on a file system that all ranks share.
        checkpoint: Lightning's. Tensors of its state_dict may be DTensors, of which each rank writes its part; of
            plain ones, which all ranks have alike, one writes each.
        optimizers: as :func:`flash_attn_train.distributed.optimizer_state.named_state` says.

    Raises:
        CheckpointError: on all ranks, if one cannot write; the checkpoint before is still there.
    """
    try:
        temporary = on_rank_zero(lambda: new_folder_for(path))
        try:
            _write(temporary, checkpoint, optimizers)
            on_rank_zero(lambda: publish_folder(temporary, path))
        except BaseException:
            if is_rank_zero():
                remove_path(temporary)
            raise
    except (Exception, CheckpointException) as error:  # torch's is no Exception
        kept = "; the one before is still there" if path.exists() else ""
        raise CheckpointError(f"cannot write checkpoint {path}: {_cause(error)}{kept}.") from error


def _write(
    folder: Path, checkpoint: dict[str, Any], optimizers: list[tuple[NamedState, NamedGroups]]
) -> None:
    tensors: dict[str, Tensor] = {}
    others: dict[str, Any] = {}
    entries: dict[str, Any] = {f"model/{name}": value for name, value in checkpoint["state_dict"].items()}
    for number, (state, _) in enumerate(optimizers):
        for name, values in state.items():
            entries |= {f"optimizer/{number}/{name}/{field}": value for field, value in values.items()}
    for key, value in entries.items():
        if isinstance(value, Tensor):
            tensors[key] = value
        else:
            others[key] = value
    rest = {
        name: value for name, value in checkpoint.items() if name not in ("state_dict", "optimizer_states")
    }
    # Such as averaged weights, which callbacks keep.
    rest = tree_map_only(DTensor, lambda tensor: tensor.full_tensor().cpu(), rest)
    rest |= {
        "names": list(checkpoint["state_dict"]),
        "groups": [groups for _, groups in optimizers],
        "others": {key: value for part in from_all_ranks(others) for key, value in part.items()},
    }
    with _quiet():
        dcp.save(
            tensors,
            storage_writer=dcp.FileSystemWriter(folder / TENSORS, sync_files=True),
            no_dist=not _many(),
        )
    checksums = [_checksum(file) for file in sorted((folder / TENSORS).glob(f"__{rank()}_*"))]
    checksums = [checksum for part in from_all_ranks(checksums) for checksum in part]

    def finish() -> None:
        with atomic_write(folder / REST) as file:
            torch.save(rest, file)
        checksums.extend([_checksum(folder / REST), _checksum(folder / TENSORS / ".metadata")])
        files = {file.relative_to(folder).as_posix(): facts for file, facts in checksums}
        with atomic_write(folder / MANIFEST) as file:
            file.write(json.dumps({"format": 1, "files": files}, indent=1).encode())
        sync_folder(folder / TENSORS)

    on_rank_zero(finish)


def read_checkpoint_folder(path: Path) -> dict[str, Any]:
    """The whole checkpoint in the form of a single process's, on the CPU. Needs no other ranks and no GPU.

    Raises:
        OSError, ValueError, RuntimeError: the folder is not whole, or damaged.
    """
    verify_checkpoint_folder(path)
    rest = read_rest(path)
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in entries(path).items()
    }
    load_tensors(path, tensors, no_dist=True)
    values = {**rest.pop("others"), **tensors}
    groups = rest.pop("groups")
    checkpoint = {"state_dict": {name: values[f"model/{name}"] for name in rest.pop("names")}, **rest}
    states = []
    for number, of_one in enumerate(groups):
        state: NamedState = {}
        prefix = f"optimizer/{number}/"
        for key, value in values.items():
            if key.startswith(prefix):
                name, _, field = key.removeprefix(prefix).rpartition("/")
                state.setdefault(name, {})[field] = value
        states.append(numbered_state(state, of_one))
    return {**checkpoint, "optimizer_states": states}


def read_rest(path: Path) -> dict[str, Any]:
    """What is not weights or optimizer state, and of these the names and groups."""
    return torch.load(path / REST, map_location="cpu", weights_only=True)


def load_tensors(path: Path, tensors: dict[str, Any], *, no_dist: bool = False) -> None:
    """Fills tensors, DTensors included, in place with the entries of these names."""
    try:
        with _quiet():
            dcp.load(tensors, storage_reader=dcp.FileSystemReader(path / TENSORS), no_dist=no_dist)
    except CheckpointException as error:  # which is no Exception
        raise ValueError(_cause(error)) from error


def entries(path: Path) -> dict[str, TensorStorageMetadata]:
    """Shapes and dtypes of what the tensors folder has, by key."""
    with open(path / TENSORS / ".metadata", "rb") as file:
        metadata = _MetadataUnpickler(file).load()
    return {
        key: entry
        for key, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def verify_checkpoint_folder(path: Path) -> None:
    """Raises ValueError unless all files are there with the sizes and checksums of the manifest."""
    if not (path / MANIFEST).is_file():
        raise ValueError(f"{MANIFEST} is missing")
    for name, facts in json.loads((path / MANIFEST).read_text())["files"].items():
        if not (path / name).is_file():
            raise ValueError(f"{name} is missing")
        found = _checksum(path / name)[1]
        if found["bytes"] != facts["bytes"]:
            raise ValueError(f"{name} has {found['bytes']} bytes, expected {facts['bytes']}")
        if found != facts:
            raise ValueError(f"{name} does not match its checksum")


class _MetadataUnpickler(pickle.Unpickler):
    """Reads torch.distributed.checkpoint's metadata, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        known = module == Metadata.__module__ or (module, name) in (
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("pathlib", "PosixPath"),
            ("pathlib._local", "PosixPath"),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
            ("torch.distributed.tensor._dtensor_spec", "ShardOrderEntry"),
        )
        if known or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise ValueError(f"its metadata name {module}.{name}, which no checkpoint needs")


def _checksum(file: Path) -> tuple[Path, dict[str, int]]:
    checksum = size = 0
    with open(file, "rb") as content:
        while block := content.read(1 << 22):
            checksum, size = zlib.crc32(block, checksum), size + len(block)
    return file, {"bytes": size, "crc32": checksum}


def _many() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _cause(error: BaseException) -> str:
    """The innermost error's message: torch.distributed.checkpoint wraps those of ranks."""
    for failure in getattr(error, "failures", {}).values():
        return _cause(failure[0] if isinstance(failure, tuple) else failure)
    return str(error)

"""Reading and writing the weight files of a Hugging Face folder: safetensors or .bin, whole or in shards.

Opening a checkpoint reads names, shapes and dtypes; tensors are read one at a time, so that a model can be
filled without a second copy of all weights in memory.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from flash_attn_models.errors import bad_argument

SAFETENSORS = "model.safetensors"
BIN = "pytorch_model.bin"


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a stored tensor before reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path


class WeightFile(Protocol):
    """One opened file."""

    tensors: dict[str, TensorInfo]

    def read(self, name: str) -> Tensor:
        """The tensor of this name, on the CPU; the caller copies it before the file is closed."""
        ...


class SafetensorsFile:
    """A safetensors file, mapped into memory."""

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        self._path = path
        self._file = safe_open(path, framework="pt")
        self.tensors = {name: self._info(name) for name in self._file.keys()}  # noqa: SIM118 (not a mapping)

    def _info(self, name: str) -> TensorInfo:
        stored = self._file.get_slice(name)
        kind = stored.get_dtype()
        if kind not in _SAFETENSORS_DTYPES:
            raise ValueError(f"{name} has values of kind {kind}, which is no dtype of this package's models")
        return TensorInfo(tuple(stored.get_shape()), _SAFETENSORS_DTYPES[kind], self._path)

    def read(self, name: str) -> Tensor:
        return self._file.get_tensor(name)


class BinFile:
    """A file written by ``torch.save``; mapped into memory unless it is in the format before torch 1.6."""

    def __init__(self, path: Path) -> None:
        # Only tensors and plain containers are unpickled: a weight file cannot run code.
        stored = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        not_tensors = [name for name, value in stored.items() if not isinstance(value, Tensor)]
        if not_tensors:
            raise ValueError(f"{not_tensors[0]!r} is not a tensor")
        self._stored = dict(stored)
        self.tensors = {name: TensorInfo(tuple(t.shape), t.dtype, path) for name, t in self._stored.items()}

    def read(self, name: str) -> Tensor:
        return self._stored[name]


class Checkpoint:
    """All tensors of a folder, over however many files.

    Attributes:
        tensors: name to shape, dtype and file.
    """

    def __init__(self, files: list[WeightFile]) -> None:
        self._file_of = {name: file for file in files for name in file.tensors}
        self.tensors = {name: info for file in files for name, info in file.tensors.items()}

    def read(self, name: str) -> Tensor:
        """The tensor of this name."""
        try:
            return self._file_of[name].read(name)
        except Exception as error:
            raise unreadable(self.tensors[name].file, error) from error


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open ``model.safetensors`` or its shards; without them ``pytorch_model.bin`` or its shards.

    Raises ValueError naming the file that is missing, cut short, corrupt, or not what the index says.
    """
    for name in (SAFETENSORS, BIN):
        if (folder / name).exists():
            return Checkpoint([open_weight_file(folder / name)])
        index = folder / f"{name}.index.json"
        if index.exists():
            return Checkpoint(_open_shards(index))
    found = sorted(path.name for path in folder.iterdir())
    raise bad_argument(
        "folder",
        f"{folder} with {', '.join(found) or 'no files'}",
        f"weights in {SAFETENSORS} or {BIN}, or in shards with {SAFETENSORS}.index.json or {BIN}.index.json",
        "complete the download, or give the folder that holds the weights",
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError naming the file if it does not hold one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    if not isinstance(content, dict):
        raise bad_argument(
            str(path), f"a JSON {type(content).__name__}", "a JSON object", "download the file again"
        )
    return content


def write_safetensors(folder: Path, tensors: Mapping[str, Tensor], max_shard_bytes: int) -> None:
    """Write tensors to ``model.safetensors``, or to shards with an index if they do not fit into one file."""
    from safetensors.torch import save_file

    tensors = _apart(tensors)
    shards = list(_split_into_shards(tensors, max_shard_bytes))
    if len(shards) == 1:
        save_file(shards[0], folder / SAFETENSORS, metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file_name)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / f"{SAFETENSORS}.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _open_shards(index: Path) -> list[WeightFile]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise bad_argument(
            str(index), "no usable 'weight_map'", "an object of tensor name to file name", "download it again"
        )
    files = []
    for file_name in sorted(set(weight_map.values())):
        path = index.parent / file_name
        if path.parent != index.parent:
            raise bad_argument(
                str(index), f"shard {file_name!r}", "names of files in the same folder", "download it again"
            )
        if not path.exists():
            raise bad_argument(
                str(index), f"no file {file_name}", "every shard that it lists", f"download {file_name}"
            )
        file = open_weight_file(path)
        listed = {name for name, its_file in weight_map.items() if its_file == file_name}
        if listed != set(file.tensors):
            odd = sorted(listed ^ set(file.tensors))
            raise bad_argument(
                str(path),
                f"other tensors than {index.name} lists: {', '.join(odd[:5])}",
                "the same ones",
                "download both again",
            )
        files.append(file)
    return files


def open_weight_file(path: Path) -> WeightFile:
    """Open one file. Raises ValueError naming it if it cannot be read."""
    try:
        return SafetensorsFile(path) if path.suffix == ".safetensors" else BinFile(path)
    except Exception as error:  # each format, and each way to damage it, has exceptions of its own
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> ValueError:
    """The error for a file that cannot be read."""
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    return bad_argument(
        str(path), f"a file that cannot be read ({reason})", "a complete, undamaged file", "download it again"
    )


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, where none is another one too: safetensors refuses that, as of weights tied by hand."""
    apart: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, tensor in tensors.items():
        place = tensor.data_ptr()
        apart[name] = tensor.clone() if place in places else tensor
        places.add(place)
    return apart


def _split_into_shards(tensors: Mapping[str, Tensor], max_shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if shard and size + tensor.nbytes > max_shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

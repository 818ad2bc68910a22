"""Checkpoints of model-parallel training: each file holds a part of every large tensor, and they are read as one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from flash_attn_models.checkpoint_files import TensorInfo
from flash_attn_models.errors import bad_argument


@dataclass(frozen=True)
class Division:
    """How a tensor is divided over the files.

    Attributes:
        dim: along which dimension; None: every file has all of it.
        sections: the tensor is so many of equal size along ``dim``, and each file has its part of all of them.
    """

    dim: int | None = None
    sections: int = 1

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The tensor from the parts, one per file."""
        if self.dim is None or len(parts) == 1:
            return parts[0]
        divided = [part.chunk(self.sections, self.dim) for part in parts]
        return torch.cat([of_file[i] for i in range(self.sections) for of_file in divided], self.dim)

    def joined_shape(self, part: Sequence[int], files: int) -> tuple[int, ...]:
        """The shape of the tensor whose parts have this one."""
        return tuple(size * files if dim == self.dim else size for dim, size in enumerate(part))


class Parts(Protocol):
    """One file, or what else holds tensors by name."""

    tensors: dict[str, TensorInfo]

    def read(self, name: str) -> Tensor: ...


class ParallelCheckpoint:
    """The tensors of all ranks, joined. It is read like one file: a tensor at a time.

    Args:
        ranks: the files, in the order of ranks.
        paths: of the same, for messages.
        division: how the tensor of a name, with the shape that it has in one file, is divided.

    Raises:
        ValueError: files of unlike tensors, naming the first of them.
    """

    def __init__(
        self,
        ranks: Sequence[Parts],
        paths: Sequence[Path],
        division: Callable[[str, tuple[int, ...]], Division],
    ) -> None:
        self._ranks = list(ranks)
        self._divisions: Mapping[str, Division] = {
            name: division(name, info.shape) for name, info in ranks[0].tensors.items()
        }
        for rank, path in zip(ranks[1:], paths[1:], strict=True):
            _check_alike(ranks[0].tensors, rank.tensors, paths[0], path)
        self.tensors = {
            name: TensorInfo(
                self._divisions[name].joined_shape(info.shape, len(self._ranks)), info.dtype, info.file
            )
            for name, info in ranks[0].tensors.items()
        }

    def read(self, name: str) -> Tensor:
        """The whole tensor of this name, on the CPU."""
        division = self._divisions[name]
        ranks = self._ranks[:1] if division.dim is None else self._ranks
        return division.join([rank.read(name) for rank in ranks])


def numbered_files(folder: Path, found: Mapping[int, Path]) -> list[Path]:
    """The files by rank. Raises ValueError if one is missing between 0 and the last."""
    missing = sorted(set(range(max(found) + 1)) - set(found))
    if missing:
        raise bad_argument(
            "folder",
            f"{folder} with {len(found)} of {max(found) + 1} parts, without number {', '.join(map(str, missing))}",
            "all parts of the model",
            "complete the download",
        )
    return [found[rank] for rank in range(len(found))]


def _check_alike(
    first: Mapping[str, TensorInfo], other: Mapping[str, TensorInfo], first_path: Path, path: Path
) -> None:
    odd = sorted(first.keys() ^ other.keys())
    if odd:
        raise bad_argument(
            str(path),
            f"other tensors than {first_path.name}: {', '.join(odd[:5])}",
            "parts of the same tensors",
            "put the files of one model into one folder",
        )
    for name, info in other.items():
        if (info.shape, info.dtype) != (first[name].shape, first[name].dtype):
            raise bad_argument(
                str(path),
                f"{name} {info.shape} of {info.dtype}",
                f"{first[name].shape} of {first[name].dtype} as in {first_path}",
                "put the files of one model into one folder",
            )

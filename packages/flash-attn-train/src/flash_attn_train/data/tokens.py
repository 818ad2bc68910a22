"""One stream of tokens in several memory-mapped files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flash_attn_train.data.token_file import write_token_file

# 2 or 4 GiB per file: small enough to move and to hash, large enough to be few.
SHARD_TOKENS = 1 << 30


class Tokens:
    """The concatenation of token arrays, (n,), read without copying it whole.

    Args:
        shards: unsigned integers, (n_i,) each, all of one dtype; at least one.
    """

    def __init__(self, shards: Sequence[np.ndarray]) -> None:
        self.shards = list(shards)
        self.ends = np.cumsum([len(shard) for shard in self.shards])

    def __len__(self) -> int:
        return int(self.ends[-1])

    @property
    def dtype(self) -> np.dtype:
        return self.shards[0].dtype

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop), as they are stored: a view where they are in one file."""
        shard = int(np.searchsorted(self.ends, start, side="right"))
        parts = []
        while start < stop:
            first = int(self.ends[shard]) - len(self.shards[shard])
            parts.append(self.shards[shard][start - first : stop - first])
            start, shard = int(self.ends[shard]), shard + 1
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, self.dtype), *parts])

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Tokens [start, start + length) for each start, (n, length) int64."""
        rows = np.empty((len(starts), length), np.int64)
        for row, start in zip(rows, starts.tolist(), strict=True):
            row[:] = self.read(start, start + length)
        return rows

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.concatenate(self.shards).astype(dtype or self.dtype)

    def __getstate__(self) -> list[Any]:
        # A memory map would be pickled with all of its tokens; loader processes that are not forked open it again.
        return [
            (shard.filename, shard.dtype, shard.offset, shard.shape)
            if isinstance(shard, np.memmap)
            else shard
            for shard in self.shards
        ]

    def __setstate__(self, state: list[Any]) -> None:
        self.__init__(  # type: ignore[misc]
            [
                np.memmap(item[0], item[1], mode="r", offset=item[2], shape=item[3])
                if isinstance(item, tuple)
                else item
                for item in state
            ]
        )


def write_shards(
    folder: Path, name: str, chunks: Iterable[np.ndarray], dtype: np.dtype, *, shard_tokens: int | None = None
) -> list[str]:
    """Writes the chunks into files NAME-00000.bin, NAME-00001.bin, ... of ``shard_tokens`` tokens (the last one has
    the rest); returns their names, at least one."""
    limit = shard_tokens or SHARD_TOKENS
    source = iter(chunks)
    pending = next(source, None)

    def one_shard() -> Iterator[np.ndarray]:
        nonlocal pending
        room = limit
        while pending is not None and room:
            part, rest = pending[:room], pending[room:]
            room -= len(part)
            yield part
            pending = rest if len(rest) else next(source, None)

    names: list[str] = []
    while pending is not None or not names:
        names.append(f"{name}-{len(names):05d}.bin")
        write_token_file(folder / names[-1], one_shard(), dtype)
    return names

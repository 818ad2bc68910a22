"""Reading .zst files, and noticing when one is cut off: the library's own reader takes that for its end."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from flash_attn_train.data.extras import require

_CHUNK_BYTES = 1 << 20


class ZstdReader(io.RawIOBase):
    """The content of a file of one or more zstd frames, one after the other, as corpora are often written.

    Raises (from reading):
        EOFError: the file ends inside a frame.
        ZstdError: (of the library) the content is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._make: Any = require("zstandard", "data", "reads .zst files").ZstdDecompressor().decompressobj
        self._file = open(path, "rb")  # noqa: SIM115 - closed by close
        self._frame: Any = None
        self._compressed = self._content = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._content:
            self._compressed = self._compressed or self._file.read(_CHUNK_BYTES)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("it ends inside a zstd frame")
                return 0
            self._frame = self._frame or self._make()
            self._content = self._frame.decompress(self._compressed)
            self._compressed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        part, self._content = self._content[: len(buffer)], self._content[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)

    def close(self) -> None:
        self._file.close()
        super().close()

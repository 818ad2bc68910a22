"""Token ids in a file that is memory-mapped, with a header that is checked before use.

Layout, little endian: magic (8 bytes), format version (u32), bytes per token (u32: 2, 4 or 8), number of tokens
(u64), SHA-256 of the token bytes (32 bytes), 8 zero bytes; then the tokens as unsigned integers from byte 64.
The same format, with 8 bytes each, holds where the documents start.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flash_attn_train.atomic import atomic_write
from flash_attn_train.errors import DataError

FORMAT_VERSION = 1

_MAGIC = b"FATOKENS"
_HEADER = struct.Struct("<8sIIQ32s8x")
_DTYPES: dict[int, np.dtype] = {2: np.dtype("<u2"), 4: np.dtype("<u4"), 8: np.dtype("<u8")}
OFFSET_DTYPE = _DTYPES[8]


@dataclass(frozen=True)
class TokenFileHeader:
    """What a token file says about itself."""

    dtype: np.dtype
    count: int
    sha256: str  # of the token bytes


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest type that holds every id: uint16 up to 65,536 tokens, else uint32."""
    return _DTYPES[2 if vocab_size <= 1 << 16 else 4]


def write_token_file(path: Path, chunks: Iterable[np.ndarray], dtype: np.dtype) -> int:
    """Writes all chunks (1-D, integer) one after the other, atomically. Returns the number of tokens."""
    digest, count = hashlib.sha256(), 0
    with atomic_write(path) as file:
        file.write(bytes(_HEADER.size))
        for chunk in chunks:
            payload = chunk.astype(dtype).tobytes()
            digest.update(payload)
            count += len(chunk)
            file.write(payload)
        file.seek(0)
        file.write(_HEADER.pack(_MAGIC, FORMAT_VERSION, dtype.itemsize, count, digest.digest()))
    return count


def read_header(path: Path) -> TokenFileHeader:
    """The header, after checking it and the file's length, but not the content.

    Raises:
        DataError: the file is missing, not a token file, of another format version, or truncated.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            header = file.read(_HEADER.size)
    except OSError as error:
        raise corrupt(path, f"cannot be read ({error.strerror})") from error
    if len(header) < _HEADER.size:
        raise corrupt(path, f"is {size} bytes long, shorter than its header")
    magic, version, itemsize, count, checksum = _HEADER.unpack(header)
    if magic != _MAGIC:
        raise corrupt(path, f"starts with {magic!r}, expected {_MAGIC!r}")
    if version != FORMAT_VERSION:
        raise corrupt(path, f"has format version {version}, expected {FORMAT_VERSION}")
    if itemsize not in _DTYPES:
        raise corrupt(path, f"has {itemsize} bytes per token, expected 2, 4 or 8")
    expected = _HEADER.size + count * itemsize
    if size != expected:
        raise corrupt(path, f"is {size} bytes long, expected {expected} for its {count} tokens")
    return TokenFileHeader(_DTYPES[itemsize], count, checksum.hex())


def open_token_file(path: Path, *, verify: bool = True) -> np.ndarray:
    """The tokens, memory-mapped and read-only, (n,) uint16, uint32 or uint64, after checking header and length
    and, with ``verify``, the checksum.

    Raises:
        DataError: as for :func:`read_header`, or the content does not match its checksum.
    """
    header = read_header(path)
    if header.count == 0:
        return np.empty(0, header.dtype)
    tokens = np.memmap(path, header.dtype, mode="r", offset=_HEADER.size, shape=(header.count,))
    if verify and hashlib.sha256(tokens.data).hexdigest() != header.sha256:
        raise corrupt(path, "does not match its checksum")
    return tokens


def corrupt(path: Path, what: str) -> DataError:
    """The error for a file of the cache that cannot be used."""
    return DataError(f"token file {path} {what}. Delete the folder {path.parent} to have it built again.")

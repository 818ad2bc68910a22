"""Token ids in a file that is memory-mapped, with a header that is checked before use.

Layout, little endian: magic (8 bytes), format version (u32), bytes per token (u32: 2 or 4), number of tokens
(u64), SHA-256 of the token bytes (32 bytes), 8 zero bytes; then the tokens as unsigned integers from byte 64.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from flash_attn_train.atomic import atomic_write
from flash_attn_train.errors import DataError

FORMAT_VERSION = 1

_MAGIC = b"FATOKENS"
_HEADER = struct.Struct("<8sIIQ32s8x")
_DTYPES: dict[int, np.dtype] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}


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


def open_token_file(path: Path) -> np.ndarray:
    """The tokens, memory-mapped and read-only, (n,) uint16 or uint32, after checking header, length and
    checksum.

    Raises:
        DataError: the file is missing, not a token file, of another format version, truncated or changed.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            header = file.read(_HEADER.size)
    except OSError as error:
        raise _corrupt(path, f"cannot be read ({error.strerror})") from error
    if len(header) < _HEADER.size:
        raise _corrupt(path, f"is {size} bytes long, shorter than its header")
    magic, version, itemsize, count, checksum = _HEADER.unpack(header)
    if magic != _MAGIC:
        raise _corrupt(path, f"starts with {magic!r}, expected {_MAGIC!r}")
    if version != FORMAT_VERSION:
        raise _corrupt(path, f"has format version {version}, expected {FORMAT_VERSION}")
    if itemsize not in _DTYPES:
        raise _corrupt(path, f"has {itemsize} bytes per token, expected 2 or 4")
    expected = _HEADER.size + count * itemsize
    if size != expected:
        raise _corrupt(path, f"is {size} bytes long, expected {expected} for its {count} tokens")
    if count == 0:
        return np.empty(0, _DTYPES[itemsize])
    tokens = np.memmap(path, _DTYPES[itemsize], mode="r", offset=_HEADER.size, shape=(count,))
    if hashlib.sha256(tokens.data).digest() != checksum:
        raise _corrupt(path, "does not match its checksum")
    return tokens


def _corrupt(path: Path, what: str) -> DataError:
    return DataError(f"token file {path} {what}. Delete the folder {path.parent} to have it built again.")

"""Checksums of token files are verified as often as they can be for nothing.

Hashing runs at 0.4 to 2 GB/s: nothing for small files, a minute for a large corpus at every start of every process.
So files up to ALWAYS_BYTES are hashed at each opening. A larger one is hashed when it is first opened, and a stamp
beside it says so; it is hashed again when its length, modification time or header is not that of the stamp. That
finds every write to the file, copies and restored backups among them. Decay of the disk itself, which changes bytes
behind the file system's back, is found by `flash-attn-prepare --verify`, which removes the stamps first.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
from filelock import FileLock

from flash_attn_train.atomic import atomic_write
from flash_attn_train.console import say
from flash_attn_train.data.token_file import open_token_file, read_header

ALWAYS_BYTES = 1 << 28


def open_verified(path: Path) -> np.ndarray:
    """Opens a token file, see :func:`flash_attn_train.data.token_file.open_token_file`, verified as above.

    Raises:
        DataError: the file is missing, damaged or changed.
    """
    header = read_header(path)
    size_bytes = path.stat().st_size
    if size_bytes <= ALWAYS_BYTES:
        return open_token_file(path)
    expected = {"bytes": size_bytes, "modified_ns": path.stat().st_mtime_ns, "sha256": header.sha256}
    if _read_stamp(path) == expected:
        return open_token_file(path, verify=False)
    try:
        with FileLock(_stamp_path(path).with_suffix(".lock")):  # of several processes, one hashes
            if _read_stamp(path) == expected:
                return open_token_file(path, verify=False)
            say(f"checking {path} ({size_bytes / 1e9:.1f} GB) ...")
            tokens = open_token_file(path)
            with atomic_write(_stamp_path(path)) as file:
                file.write(json.dumps(expected).encode())
            return tokens
    except OSError:  # the cache can be read but not written: no lock and no stamp
        return open_token_file(path)


def open_verified_anew(path: Path) -> np.ndarray:
    """Opens a token file and hashes it, whatever was found before.

    Raises:
        DataError: the file is missing, damaged or changed.
    """
    try:
        _stamp_path(path).unlink(missing_ok=True)
    except OSError:  # the cache can be read but not written
        return open_token_file(path)
    return open_verified(path)


def _stamp_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.verified")


def _read_stamp(path: Path) -> object:
    with contextlib.suppress(OSError, ValueError):
        return json.loads(_stamp_path(path).read_bytes())
    return None

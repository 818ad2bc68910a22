"""One process prepares, the others wait."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from flash_attn_train.console import say
from flash_attn_train.errors import DataError


@contextmanager
def cache_lock(folder: Path, name: str) -> Iterator[None]:
    """Holds the lock ``name`` of a folder of the cache, which is made if it is not there; waits for another process
    that holds it, and says so. The system lets go of the lock of a process that dies.

    Raises:
        DataError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say(f"another process prepares the same data in {folder}; waiting for it ...")
            lock.acquire()
    except OSError as error:
        raise DataError(
            f"data.cache_dir: cannot write to {folder} ({error.strerror}); expected a writable folder. "
            "Set data.cache_dir to one."
        ) from error
    try:
        yield
    finally:
        lock.release()

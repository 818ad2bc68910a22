"""One run at a time in a run folder."""

from __future__ import annotations

from types import TracebackType

from filelock import FileLock, Timeout

from flash_attn_train.errors import OutputError
from flash_attn_train.run_folder import RunFolder

# After a run was killed, its loaders' processes live on until they notice, which takes up to five seconds.
_PATIENCE_S = 10.0


class FolderLock:
    """Keeps other runs out of a folder from :meth:`acquire` to the end of the ``with`` block. The system lets go of
    the lock of a process that dies."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self._lock = FileLock(folder.path / ".lock")

    def acquire(self) -> None:
        """Takes the lock; the folder must exist.

        Raises:
            OutputError: another run has it.
        """
        try:
            self._lock.acquire(timeout=_PATIENCE_S)
        except Timeout as error:
            raise OutputError(
                f"output_dir: another run is writing into {self.folder.path}; expected a folder of its own. Wait for "
                f"that run, or set output_dir. (If there is none, remove {self._lock.lock_file}.)"
            ) from error
        except NotImplementedError:  # a file system without locks
            return

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

"""Files and folders that are either complete or not there, also after a crash or a full disk."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Opens a file for writing beside ``path`` and renames it to ``path`` once it is complete and on disk.

    If the body raises, the temporary file is removed and whatever was at ``path`` stays as it was.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def new_folder_for(path: Path) -> Path:
    """Makes an empty folder beside ``path`` that :func:`publish_folder` can put there."""
    folder = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    folder.mkdir(parents=True)
    return folder


def publish_folder(folder: Path, path: Path) -> None:
    """Puts a complete folder of :func:`new_folder_for` at ``path``, in place of the file or folder that is there.

    A folder cannot replace another in one step, but a link can: ``path`` becomes a relative symbolic link to the
    folder. At no moment is there nothing at ``path``, or something incomplete.
    """
    sync_folder(folder)
    link = path.with_name(f"{folder.name}.link")
    try:
        os.symlink(folder.name, link, target_is_directory=True)
    except OSError:  # a file system without links: for a moment there is nothing at path
        remove_path(path)
        os.replace(folder, path)
        return
    if (
        path.is_dir() and not path.is_symlink()
    ):  # a link does not replace a folder, such as one that was copied
        os.replace(path, path.with_name(f".{path.name}.{secrets.token_hex(4)}"))
    os.replace(link, path)
    sync_folder(path.parent)
    remove_leftovers(path)


def remove_leftovers(path: Path) -> None:
    """Removes what earlier writes of ``path`` left beside it: those that it replaced, and those that were killed."""
    current = path.parent / os.readlink(path) if path.is_symlink() else None
    for other in (*path.parent.glob(f".{path.name}.????????*"), *path.parent.glob(f"{path.name}.*.tmp")):
        if other != current:
            remove_path(other)


def remove_path(path: Path) -> None:
    """Removes a file, a folder, or a link with the folder that it leads to; if it is there."""
    if path.is_symlink():
        target = path.parent / os.readlink(path)
        path.unlink()
        if target.parent == path.parent and target.is_dir():
            shutil.rmtree(target)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def link_path(source: Path, path: Path) -> None:
    """Puts the file or folder ``source`` at ``path`` too. Its bytes are not copied where the file system has hard
    links; writing ``source`` anew by this module leaves ``path`` as it is."""
    if source.is_dir():
        folder = new_folder_for(path)
        shutil.copytree(source, folder, copy_function=_link_or_copy, dirs_exist_ok=True)
        publish_folder(folder, path)
        return
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    _link_or_copy(source, temporary)
    os.replace(temporary, path)
    sync_folder(path.parent)
    remove_leftovers(path)


def _link_or_copy(source: str | Path, path: str | Path) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)
    try:
        os.link(source, path)
    except OSError:
        shutil.copyfile(source, path)


def sync_folder(folder: Path) -> None:
    """Puts a rename inside ``folder`` on disk; without this it can be lost in a power cut."""
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

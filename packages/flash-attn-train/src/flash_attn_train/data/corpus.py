"""Text files on disk, and which of them are held out for validation."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flash_attn_train.data.source import hash_fraction
from flash_attn_train.errors import DataError

# Not the standard library's own source: other people's packages, test suites (three times the size of the
# library) and generated tables.
_STDLIB_SKIPPED = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "encodings",
    "pydoc_data",
    "lib-dynload",
}


@dataclass(frozen=True)
class Document:
    """One text: a file, or for a corpus of a single file one part of it (``start``, ``stop`` in bytes)."""

    path: Path
    name: str  # relative to the corpus folder, with forward slashes: the same on every machine
    start: int
    stop: int
    sha256: str

    def text(self) -> str:
        """The text, read again.

        Raises:
            DataError: the file went away or has changed since it was found.
        """
        try:
            with open(self.path, "rb") as file:
                file.seek(self.start)
                content = file.read(self.stop - self.start)
        except OSError as error:
            raise DataError(f"data.path: cannot read {self.path}: {error.strerror}.") from error
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise DataError(
                f"data.path: {self.path} has changed since it was found; expected that nothing writes to it while it "
                "is read. Start again when it is complete."
            )
        return content.decode("utf-8")


@dataclass(frozen=True)
class Corpus:
    """Text split into training and validation documents. No file contributes to both, except a corpus of one
    file."""

    title: str
    train: tuple[Document, ...]
    validation: tuple[Document, ...]
    skipped: tuple[str, ...]  # names of files that are not UTF-8 text
    prompt: str  # a beginning that suits the text; "" for none

    @property
    def num_bytes(self) -> dict[str, int]:
        return {
            "train": sum(d.stop - d.start for d in self.train),
            "validation": sum(d.stop - d.start for d in self.validation),
        }

    def texts(self, split: str) -> Iterator[str]:
        return (document.text() for document in self._documents(split))

    def num_texts(self, split: str) -> int:
        return len(self._documents(split))

    def notes(self) -> str:
        if not self.skipped:
            return ""
        return f"{len(self.skipped)} files skipped (not UTF-8 text), e.g. {self.skipped[0]}"

    def _documents(self, split: str) -> tuple[Document, ...]:
        return {"train": self.train, "validation": self.validation}[split]

    def fingerprint(self) -> str:
        """SHA-256 of what is in each split: names and contents, nothing of where or when."""
        digest = hashlib.sha256()
        for split, documents in (("train", self.train), ("validation", self.validation)):
            for document in documents:
                line = f"{split}\0{document.name}\0{document.sha256}\n"
                digest.update(line.encode("utf-8", "surrogatepass"))  # names need not be UTF-8
        return digest.hexdigest()


def read_corpus(path: str | None, *, suffixes: list[str] | None = None, val_fraction: float = 0.05) -> Corpus:
    """Finds the text and splits it.

    Args:
        path: a text file, or a folder that is read recursively (hidden files and folders are passed over);
            None for the source of Python's standard library.
        suffixes: in a folder, only files whose names end with one of these; empty for all files.
        val_fraction: share of files held out. A file is held out if the hash of its relative path falls in
            the lowest ``val_fraction`` of the hash range, so adding files never moves another one across.
            Where that selects none, the file with the lowest hash is held out. A corpus of one file is cut
            instead, at a line end: its last ``val_fraction`` of bytes is held out.

    Files with the same content count once. Files in a folder that are not UTF-8 text are skipped and
    reported.

    Raises:
        DataError: nothing at ``path``, no text in it, or too little to split.
    """
    if path is None:
        root, title, prompt = (
            Path(sysconfig.get_path("stdlib")),
            "Python standard library",
            "def __init__(self",
        )
        files = files_under(root, [".py"], _STDLIB_SKIPPED)
        hint = "This Python has no library source on disk; set data.path to a text file or folder."
    else:
        root, title, prompt = Path(path).expanduser(), str(path), ""
        if root.is_file():
            return _single_file(root, title, val_fraction)
        if not root.is_dir():
            raise DataError(
                f"data.path: {root} does not exist; expected a text file or a folder of text files."
            )
        files = files_under(root, suffixes or [], set())
        hint = "Expected at least one text file" + (f" ending in {', '.join(suffixes)}." if suffixes else ".")

    documents, skipped = _read_documents(root, files)
    if not documents:
        found = f"{len(skipped)} files that are not UTF-8 text, e.g. {skipped[0]}" if skipped else "no text"
        raise DataError(f"data.path: found {found} in {root}. {hint}")
    if len(documents) == 1:
        return _single_file(documents[0].path, title, val_fraction)
    train, validation = _split_by_file(documents, val_fraction)
    return Corpus(title, train, validation, tuple(skipped), prompt)


def files_under(root: Path, suffixes: list[str], skipped_folders: set[str]) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root, onerror=_cannot_list):
        subfolders[:] = sorted(
            name
            for name in subfolders
            if name not in skipped_folders | {"__pycache__"} and not name.startswith(".")
        )
        for name in sorted(names):
            if not name.startswith(".") and (not suffixes or name.endswith(tuple(suffixes))):
                yield Path(folder, name)


def _cannot_list(error: OSError) -> None:
    raise DataError(f"data.path: cannot read {error.filename}: {error.strerror}.") from error


def _is_text(content: bytes) -> bool:
    if b"\0" in content:
        return False
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _read_documents(root: Path, files: Iterator[Path]) -> tuple[list[Document], list[str]]:
    documents: dict[
        str, Document
    ] = {}  # by content, so that copies of a file cannot be on both sides of the split
    skipped = []
    for file in files:
        name = file.relative_to(root).as_posix()
        content = _read(file)
        if not _is_text(content):
            skipped.append(os.fsencode(name).decode("utf-8", "replace"))  # to be printed
        elif content.strip():
            sha256 = hashlib.sha256(content).hexdigest()
            documents.setdefault(sha256, Document(file, name, 0, len(content), sha256))
    return sorted(documents.values(), key=lambda document: document.name), skipped


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"data.path: cannot read {file}: {error.strerror}.") from error


def _split_by_file(
    documents: list[Document], val_fraction: float
) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    ranked = sorted(documents, key=lambda document: hash_fraction(document.name))
    count = sum(hash_fraction(document.name) < val_fraction for document in documents)
    count = min(max(count, 1), len(documents) - 1)
    held_out = {document.name for document in ranked[:count]}
    train = tuple(document for document in documents if document.name not in held_out)
    validation = tuple(document for document in documents if document.name in held_out)
    return train, validation


def _single_file(path: Path, title: str, val_fraction: float) -> Corpus:
    content = _read(path)
    if not content.strip():
        raise DataError(f"data.path: {path} is empty; expected a text file.")
    if not _is_text(content):
        raise DataError(f"data.path: {path} is not UTF-8 text; expected a text file. Convert it to UTF-8.")
    cut = content.rfind(b"\n", 0, int(len(content) * (1.0 - val_fraction))) + 1
    if not content[:cut].strip() or not content[cut:].strip():
        raise DataError(
            f"data.path: {path} ({len(content)} bytes) has no line end at which to hold out "
            f"data.val_fraction={val_fraction} of it; expected more lines, or a folder with several files."
        )
    parts = [
        Document(path, path.name, start, stop, hashlib.sha256(content[start:stop]).hexdigest())
        for start, stop in ((0, cut), (cut, len(content)))
    ]
    return Corpus(title, (parts[0],), (parts[1],), (), "")

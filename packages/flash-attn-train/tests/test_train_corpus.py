"""Reading and splitting text."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from flash_attn_train.data import Corpus, read_corpus
from flash_attn_train.errors import DataError


def names(corpus: Corpus) -> tuple[set[str], set[str]]:
    return {d.name for d in corpus.train}, {d.name for d in corpus.validation}


def test_no_file_is_on_both_sides_and_none_is_lost(corpus_folder: Path) -> None:
    train, validation = names(read_corpus(str(corpus_folder), val_fraction=0.2))
    assert train and validation
    assert not train & validation
    assert train | validation == {
        f.relative_to(corpus_folder).as_posix() for f in corpus_folder.rglob("*.txt")
    }


def test_split_depends_on_relative_paths_alone(corpus_folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(corpus_folder, moved)
    one, other = (read_corpus(str(path), val_fraction=0.2) for path in (corpus_folder, moved))
    assert names(one) == names(other)
    assert one.fingerprint() == other.fingerprint()


def test_adding_files_moves_none_across(corpus_folder: Path, tmp_path: Path) -> None:
    larger = tmp_path / "larger"
    shutil.copytree(corpus_folder, larger)
    before = names(read_corpus(str(larger), val_fraction=0.3))
    for number in range(50):
        (larger / f"new{number}.txt").write_text(f"new text {number}\n")
    after = names(read_corpus(str(larger), val_fraction=0.3))
    assert before[0] <= after[0]
    assert before[1] <= after[1]


def test_split_share_is_near_the_fraction(tmp_path: Path) -> None:
    for number in range(1000):
        (tmp_path / f"{number}.txt").write_text(f"text {number}\n")
    for fraction in (0.05, 0.3):
        count = len(read_corpus(str(tmp_path), val_fraction=fraction).validation)
        assert abs(count / 1000 - fraction) < 4 * (fraction * (1 - fraction) / 1000) ** 0.5


def test_fingerprint_follows_content(corpus_folder: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(corpus_folder, changed)
    file = next(changed.rglob("*.txt"))
    file.write_text(file.read_text().replace("the", "a", 1))
    assert read_corpus(str(changed)).fingerprint() != read_corpus(str(corpus_folder)).fingerprint()


def test_two_files_give_one_each(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n")
    (tmp_path / "b.txt").write_text("two\n")
    for fraction in (0.001, 0.999):
        corpus = read_corpus(str(tmp_path), val_fraction=fraction)
        assert (len(corpus.train), len(corpus.validation)) == (1, 1)


def test_copies_of_a_file_count_once(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"copy{number}.txt").write_text("the same text\n")
        (tmp_path / f"own{number}.txt").write_text(f"own text {number}\n")
    corpus = read_corpus(str(tmp_path), val_fraction=0.5)
    texts = [document.text() for document in (*corpus.train, *corpus.validation)]
    assert len(texts) == len(set(texts)) == 41


def test_single_file_is_cut_at_a_line_end(tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_text("".join(f"líne {number}\n" for number in range(100)), encoding="utf-8")
    corpus = read_corpus(str(file), val_fraction=0.1)
    train, validation = corpus.train[0].text(), corpus.validation[0].text()
    assert train + validation == file.read_text(encoding="utf-8")
    assert train.endswith("\n")
    assert len(validation) / len(train + validation) == pytest.approx(0.1, abs=0.02)


def test_folder_passes_over_binary_hidden_and_other_suffixes(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "c.md", ".hidden.txt", ".git/d.txt", "__pycache__/e.txt", "deep/er/f.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}\n")
    (tmp_path / "picture.txt").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "empty.txt").write_text(" \n")
    everything = read_corpus(str(tmp_path))
    assert set.union(*names(everything)) == {"a.txt", "b.txt", "c.md", "deep/er/f.txt"}
    assert everything.skipped == ("latin.txt", "picture.txt")
    assert set.union(*names(read_corpus(str(tmp_path), suffixes=[".txt"]))) == {
        "a.txt",
        "b.txt",
        "deep/er/f.txt",
    }


def test_names_that_are_not_utf_8(tmp_path: Path) -> None:
    try:
        for number in range(9):
            (tmp_path / os.fsdecode(b"caf\xe9%d" % number)).write_text(f"text {number}\n")
        (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(b"\0")
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    corpus = read_corpus(str(tmp_path))
    assert len(corpus.train) + len(corpus.validation) == 9
    assert len(corpus.fingerprint()) == 64
    corpus.notes().encode()  # can be printed
    assert corpus.notes().endswith("e.g. caf\ufffd.png")


def test_a_file_that_changes_after_it_was_found(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_text(f"text {name}\n")
    document = read_corpus(str(tmp_path)).train[0]
    document.path.write_text("text c\n")
    with pytest.raises(DataError, match=rf"{document.path} has changed since it was found"):
        document.text()


def test_a_folder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.txt", "closed/b.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}\n")
    scandir: Callable[[str], Iterator[os.DirEntry[str]]] = os.scandir

    def refuse(folder: str) -> Iterator[os.DirEntry[str]]:
        if os.fspath(folder).endswith("closed"):
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"data\.path: cannot read .*closed: Permission denied"):
        read_corpus(str(tmp_path))


def test_standard_library() -> None:
    corpus = read_corpus(None)
    train, validation = names(corpus)
    assert "argparse.py" in train | validation
    assert not any(
        part in ("test", "site-packages") for name in train | validation for part in name.split("/")
    )
    assert corpus.num_bytes["train"] > 2_000_000
    assert corpus.num_bytes["validation"] > 50_000


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda path: None, ["does not exist", "expected a text file or a folder"]),
        (lambda path: path.write_text(""), ["is empty"]),
        (lambda path: path.write_text(" \n\t\n"), ["is empty"]),
        (lambda path: path.write_bytes(b"\x7fELF\0\0\1"), ["is not UTF-8 text", "Convert"]),
        (lambda path: path.write_bytes(b"caf\xe9\n" * 9), ["is not UTF-8 text"]),
        (lambda path: path.write_text("one line without an end"), ["no line end", "data.val_fraction"]),
        (lambda path: path.mkdir(), ["found no text"]),
        (
            lambda path: (path.mkdir(), (path / "x.bin").write_bytes(b"\0\1")),
            ["1 files that are not UTF-8", "x.bin"],
        ),
    ],
)
def test_unusable_corpus_is_explained(tmp_path: Path, make: object, parts: list[str]) -> None:
    path = tmp_path / "corpus"
    make(path)  # type: ignore[operator]
    with pytest.raises(DataError) as error:
        read_corpus(str(path))
    assert str(path) in str(error.value)
    for part in ["data.path", *parts]:
        assert part in str(error.value)

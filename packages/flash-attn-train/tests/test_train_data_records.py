"""Text in JSONL, Parquet, CSV and TSV files."""

from __future__ import annotations

import csv
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from flash_attn_train.configs.data import TextDataConfig
from flash_attn_train.data.corpus import Corpus
from flash_attn_train.data.extras import require
from flash_attn_train.data.open_source import open_source
from flash_attn_train.data.record_corpus import RecordCorpus
from flash_attn_train.data.records import count_records, read_records
from flash_attn_train.errors import DataError

ROWS = [{"id": number, "text": f'text {number} "quoted", naïve\nsecond line'} for number in range(50)]


def write_jsonl(path: Path) -> None:
    content = "".join(json.dumps(row) + "\n" for row in ROWS).encode() + b"\n"
    if path.suffix == ".gz":
        content = gzip.compress(content)
    if path.suffix == ".zst":
        zstandard = pytest.importorskip("zstandard", reason="reads .zst files")
        half = content.index(b"\n", len(content) // 2) + 1
        content = b"".join(map(zstandard.compress, (content[:half], content[half:])))  # two frames
    path.write_bytes(content)


def write_csv(path: Path) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["id", "text"])
        writer.writeheader()
        writer.writerows(ROWS)


def write_parquet(path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="reads Parquet files")
    parquet = pytest.importorskip("pyarrow.parquet", reason="reads Parquet files")
    parquet.write_table(arrow.Table.from_pylist(ROWS), path, row_group_size=7)


WRITERS: dict[str, Callable[[Path], None]] = {
    "rows.jsonl": write_jsonl,
    "rows.jsonl.gz": write_jsonl,
    "rows.jsonl.zst": write_jsonl,
    "rows.csv": write_csv,
    "rows.parquet": write_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_rows_of_every_format(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    assert [text for (text,) in read_records(path, ["text"])] == [row["text"] for row in ROWS]
    numbers = [int(number) for _, number in read_records(path, ["text", "id"])]
    assert numbers == list(range(50))
    assert count_records(path) == (50 if name.endswith("parquet") else None)
    with pytest.raises(DataError, match=r"no field 'body'; it has id, text\. Set data\.text_field"):
        list(read_records(path, ["body"]))


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.jsonl.zst", "rows.parquet"])
def test_truncated_files_are_errors(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    os.truncate(path, path.stat().st_size - 20)
    with pytest.raises(DataError, match=rf"cannot read .*{name}: .*Expected a whole"):
        list(read_records(path, ["text"]))


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.jsonl.zst", "rows.parquet"])
def test_damage_anywhere_is_an_error_of_the_data_or_harmless(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    content = path.read_bytes()
    errors = 0
    for place in range(0, len(content), 1 + len(content) // 300):
        damaged = bytearray(content)
        damaged[place] ^= 0b100
        path.write_bytes(damaged)
        try:
            list(read_records(path, ["text"]))
        except DataError as error:
            errors += 1
            assert str(path) in str(error)
    assert errors > 50


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.jsonl.zst", "rows.parquet"])
def test_a_compressed_file_without_content_is_not_whole(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    if name.endswith(".zst"):
        pytest.importorskip("zstandard", reason="reads .zst files")
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow.parquet", reason="reads Parquet files")
    with pytest.raises(DataError, match=rf"cannot read .*{name}: .*Expected a whole"):
        list(read_records(tmp_path / name, ["text"]))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.csv", "rows.tsv"])
def test_a_byte_order_mark_is_no_content(tmp_path: Path, name: str) -> None:
    """As Excel's "CSV UTF-8" begins."""
    rows = '{"text": "a"}\r\n{"text": "b"}\r\n' if "jsonl" in name else "text\r\na\r\nb\r\n"
    content = rows.encode("utf-8-sig")
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert list(read_records(tmp_path / name, ["text"])) == [("a",), ("b",)]


@pytest.mark.parametrize("name", ["ROWS.CSV", "rows.Tsv", "rows.JSONL.GZ", "Rows.Parquet"])
def test_the_case_of_a_suffix_does_not_matter(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    writers = {**WRITERS, "rows.tsv": lambda path: path.write_text("text\none\ntwo\n")}
    writers[name.lower()](tmp_path / name.lower())
    (tmp_path / name.lower()).rename(path)
    assert isinstance(source_of(path), RecordCorpus)
    assert len(list(read_records(path, ["text"]))) == (2 if name == "rows.Tsv" else 50)
    assert count_records(path) == (50 if name == "Rows.Parquet" else None)


def test_tab_separated_values_have_no_quoting(tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    path.write_text('sentence\tlabel\n"half a quote\t1\nplain\t0\n')
    assert list(read_records(path, ["sentence", "label"])) == [('"half a quote', "1"), ("plain", "0")]


def test_long_fields(tmp_path: Path) -> None:
    text = "a long text " * 20_000
    (tmp_path / "rows.csv").write_text(f"text\n{text}\n")
    assert list(read_records(tmp_path / "rows.csv", ["text"])) == [(text,)]


def test_half_a_surrogate_pair_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a \\ud83d b \\ud83d\\ude42", "n": 1}\n')
    ((text, number),) = read_records(tmp_path / "rows.jsonl", ["text", "n"])
    assert text.startswith("a \ufffd") and text.endswith(" b 🙂") and number == 1
    text.encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": \n', r"line 2: not JSON"),
        ('{"text": "a"}\n["b"]\n', r"line 2: got list, expected an object"),
        ('{"text": null}\n', r"line 1: field 'text' is null"),
        ('{"text": "a", "n": ' + "1" * 5000 + "}\n", r"line 1: not JSON .*4300 digits"),
        ('{"text": "a", "n": ' + "[" * 200_000 + "\n", r"line 1: not JSON .*recursion"),
        ('{"text": "a"}\n{"txt": "b"}\n', r"line 2: no field 'text'; it has txt"),
        (b'{"text": "\xff"}\n', r"cannot read .*invalid start byte"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        list(read_records(path, ["text"]))


def source_of(path: Path | None, **options: object) -> Corpus | RecordCorpus:
    source = open_source(TextDataConfig(path=path and str(path), **options))  # type: ignore[arg-type]
    assert isinstance(source, (Corpus, RecordCorpus))
    return source


def test_the_suffix_decides(tmp_path: Path, corpus_folder: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl")
    assert isinstance(source_of(None), Corpus)
    assert isinstance(source_of(corpus_folder), Corpus)
    assert isinstance(source_of(tmp_path), RecordCorpus)
    assert isinstance(source_of(tmp_path / "a.jsonl"), RecordCorpus)
    (tmp_path / "notes.txt").write_text("one\ntwo\n" * 20)
    assert isinstance(source_of(tmp_path / "notes.txt"), Corpus)
    with pytest.raises(
        DataError, match=r"a\.jsonl, and other files, e\.g\. notes\.txt.*Set data\.suffixes .*\[\.jsonl\]"
    ):
        source_of(tmp_path)
    assert isinstance(source_of(tmp_path, suffixes=[".jsonl"]), RecordCorpus)
    with pytest.raises(DataError, match=r"does not exist"):
        source_of(tmp_path / "missing")


def test_rows_are_held_out_by_their_text(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl")
    source = source_of(tmp_path, val_fraction=0.3)
    fingerprint = source.fingerprint()
    train, validation = (list(source.texts(split)) for split in ("train", "validation"))
    assert sorted(train + validation) == sorted(str(row["text"]) for row in ROWS)
    assert 5 <= len(validation) <= 25
    # More rows, and copies of rows, in another order, move none across.
    more = [{"text": "new"}, *reversed(ROWS), *ROWS[:10]]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in more))
    later = source_of(tmp_path, val_fraction=0.3)
    assert set(validation) <= set(later.texts("validation")) and set(train) <= set(later.texts("train"))
    assert later.fingerprint() != fingerprint


def test_fingerprint_follows_what_is_read(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl")
    first = source_of(tmp_path)
    assert first.fingerprint() == source_of(tmp_path).fingerprint()
    assert first.fingerprint() != source_of(tmp_path, text_field="id").fingerprint()
    assert first.fingerprint() != source_of(tmp_path, val_fraction=0.2).fingerprint()
    write_jsonl(tmp_path / "b.jsonl")
    assert first.fingerprint() != source_of(tmp_path).fingerprint()


def test_a_link_that_leads_nowhere(tmp_path: Path) -> None:
    """As git-annex leaves for files that were not fetched."""
    write_jsonl(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match=r"data\.path: cannot read .*b\.jsonl: No such file"):
        source_of(tmp_path).fingerprint()


def test_a_name_that_is_not_utf_8(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.jsonl")
    try:
        write_jsonl(tmp_path / name)
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    assert len(source_of(tmp_path).fingerprint()) == 64


def test_a_field_that_is_not_text(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"field 'id' has a int, expected a text\. Set data\.text_field"):
        list(source_of(tmp_path, text_field="id").texts("train"))


def test_counts_are_known_for_parquet(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet")
    write_parquet(tmp_path / "b.parquet")
    source = source_of(tmp_path, val_fraction=0.1)
    assert source.num_texts("train") == 90 and source.num_texts("validation") == 10
    assert source.notes() == "2 files"


def test_broken_library_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchvision of another torch is."""
    (tmp_path / "broken_library.py").write_text('raise RuntimeError("operator does not exist")\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(
        DataError, match=r"broken_library, .*operator does not exist.*flash-attn-train\[data\]"
    ):
        require("broken_library", "data", "reads it")


def test_missing_library_names_the_extra() -> None:
    with pytest.raises(DataError, match=r"no_such_library, which reads it, .*flash-attn-train\[data\]"):
        require("no_such_library.part", "data", "reads it")

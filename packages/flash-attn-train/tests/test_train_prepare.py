"""Tokenizer and token files of a corpus, and their cache."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import multiprocessing
import os
import shutil
import socket
from collections.abc import Iterator
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import BinaryIO

import flash_attn_train.data.entry
import flash_attn_train.data.prepare
import flash_attn_train.data.tokens
import flash_attn_train.data.verified
import numpy as np
import pytest
from flash_attn_train.atomic import atomic_write
from flash_attn_train.configs.data import TokenizerConfig
from flash_attn_train.data import Corpus, PreparedData, prepare_data, read_corpus
from flash_attn_train.data.encode import encode_documents
from flash_attn_train.data.entry import read_entry, verify_entry
from flash_attn_train.data.prepare import cached_tokenizer
from flash_attn_train.data.record_corpus import RecordCorpus
from flash_attn_train.data.special_tokens import END_OF_TEXT
from flash_attn_train.data.tokenizer import train_tokenizer
from flash_attn_train.errors import ConfigError, DataError
from tokenizers import Tokenizer, models, pre_tokenizers

TOKENIZER = TokenizerConfig(vocab_size=300)
FILES = (
    "tokenizer.json",
    "train-00000.bin",
    "train.documents.bin",
    "validation-00000.bin",
    "validation.documents.bin",
)


@pytest.fixture
def corpus(corpus_folder: Path) -> Corpus:
    return read_corpus(str(corpus_folder), val_fraction=0.2)


def prepare(corpus: Corpus, cache: Path, detokenizer: str = "none", **changes: object) -> PreparedData:
    config = TokenizerConfig(**{"vocab_size": 300, **changes})  # type: ignore[arg-type]
    return prepare_data(corpus, config, seqlen=16, cache_dir=str(cache), detokenizer=detokenizer)


def entries(cache: Path) -> list[Path]:
    """What is in the cache besides locks."""
    return [path for path in cache.iterdir() if path.suffix != ".lock"]


def test_tokens_are_the_documents_each_with_an_end(corpus: Corpus, tmp_path: Path) -> None:
    data = prepare(corpus, tmp_path)
    assert 257 < data.vocab_size <= 300
    end = data.tokenizer.token_to_id(END_OF_TEXT)
    assert data.special.end_of_text == end
    for split, documents in (("train", corpus.train), ("validation", corpus.validation)):
        tokens, starts = np.asarray(data.splits[split].tokens), data.splits[split].starts
        assert data.splits[split].num_documents == len(documents) == np.count_nonzero(tokens == end)
        assert starts[0] == 0 and starts[-1] == len(tokens) and starts.dtype == np.uint64
        assert (tokens[starts[1:].astype(int) - 1] == end).all()
        parts = [tokens[int(a) : int(b) - 1] for a, b in itertools.pairwise(starts)]
        assert [data.tokenizer.decode(part.tolist()) for part in parts] == [d.text() for d in documents]
        assert data.splits[split].num_bytes == corpus.num_bytes[split]


def test_tokenizer_has_seen_the_training_split_only(corpus: Corpus, tmp_path: Path) -> None:
    swapped = Corpus(corpus.title, corpus.train, corpus.validation[:1], (), "")
    one, other = prepare(corpus, tmp_path / "a"), prepare(swapped, tmp_path / "b")
    assert one.tokenizer.to_str() == other.tokenizer.to_str()


def test_tokenizer_is_trained_on_so_many_characters(corpus: Corpus, tmp_path: Path) -> None:
    first = Corpus(corpus.title, corpus.train[:1], corpus.validation, (), "")
    limited = prepare(corpus, tmp_path, train_characters=1)
    assert limited.tokenizer.to_str() == prepare(first, tmp_path).tokenizer.to_str()


def test_building_twice_gives_the_same_bytes(corpus: Corpus, tmp_path: Path) -> None:
    one, other = (prepare(corpus, tmp_path / name) for name in "ab")
    assert one.key == other.key
    for name in (*FILES, "entry.json"):
        first, second = (data.tokenizer_file.with_name(name).read_bytes() for data in (one, other))
        assert first == second


def test_cache_is_used_again(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(corpus, tmp_path)
    assert not first.from_cache
    monkeypatch.setattr(flash_attn_train.data.prepare, "train_tokenizer", None)  # would fail if called
    second = prepare(corpus, tmp_path)
    assert second.from_cache and second.key == first.key
    np.testing.assert_array_equal(np.asarray(first.train), np.asarray(second.train))


@pytest.mark.parametrize("changes", [{"vocab_size": 280}, {"min_frequency": 50}])
def test_other_tokenizer_settings_are_another_entry(corpus: Corpus, tmp_path: Path, changes: dict) -> None:
    first, second = prepare(corpus, tmp_path), prepare(corpus, tmp_path, **changes)
    assert first.key != second.key and not second.from_cache
    assert first.vocab_size != second.vocab_size


def test_other_split_is_another_entry(corpus: Corpus, corpus_folder: Path, tmp_path: Path) -> None:
    other = read_corpus(str(corpus_folder), val_fraction=0.5)
    assert prepare(corpus, tmp_path).key != prepare(other, tmp_path).key


def test_detokenizer_is_part_of_the_key_and_acts(corpus: Corpus, tmp_path: Path) -> None:
    first, second = prepare(corpus, tmp_path), prepare(corpus, tmp_path, "lambada")
    assert first.key != second.key and not second.from_cache
    assert second.tokenizer.decode(np.asarray(second.train)[:40].tolist()).startswith("\nthe")
    assert first.splits["validation"].num_bytes == second.splits["validation"].num_bytes


def test_a_tokenizer_file_is_taken_as_it_is(corpus: Corpus, tmp_path: Path) -> None:
    trained = prepare(corpus, tmp_path)
    given = prepare(corpus, tmp_path, path=str(trained.tokenizer_file))
    folder = prepare(corpus, tmp_path, path=str(trained.tokenizer_file.parent))
    assert given.key == trained.key  # the same tokens, so the same data
    assert given.tokenizer_file != trained.tokenizer_file and folder.from_cache
    with pytest.raises(ConfigError, match=r"tokenizer\.name: got 'gpt2' together with tokenizer\.path"):
        prepare(corpus, tmp_path, path="somewhere", name="gpt2")


@pytest.mark.parametrize("name", [*FILES, "entry.json"])
def test_damaged_entry_is_an_error_that_names_the_file(corpus: Corpus, tmp_path: Path, name: str) -> None:
    file = prepare(corpus, tmp_path).tokenizer_file.with_name(name)
    os.truncate(file, file.stat().st_size - 3)
    with pytest.raises(DataError) as error:
        prepare(corpus, tmp_path)
    assert str(file) in str(error.value) and "Delete the folder" in str(error.value)


def test_no_byte_of_the_facts_can_change_unnoticed(corpus: Corpus, tmp_path: Path) -> None:
    data = prepare(corpus, tmp_path)
    entry = data.tokenizer_file.parent
    content = (entry / "entry.json").read_bytes()
    facts = read_entry(entry)
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1
        (entry / "entry.json").write_bytes(damaged)
        with contextlib.suppress(DataError):
            found = read_entry(entry)  # white space, or the name of the checksum itself
            assert {name: found[name] for name in facts} == facts


def test_an_entry_of_before_facts_had_a_checksum_is_taken(corpus: Corpus, tmp_path: Path) -> None:
    data = prepare(corpus, tmp_path)
    file = data.tokenizer_file.with_name("entry.json")
    facts = json.loads(file.read_bytes())
    del facts["facts_sha256"]
    file.write_text(json.dumps(facts))
    assert prepare(corpus, tmp_path).key == data.key
    del facts["splits"]
    file.write_text(json.dumps(facts))
    with pytest.raises(DataError, match=r"entry\.json .*'splits'.*Delete the folder"):
        prepare(corpus, tmp_path)


def test_an_entry_is_readable_by_whoever_may_read_new_folders(corpus: Corpus, tmp_path: Path) -> None:
    entry = prepare(corpus, tmp_path).tokenizer_file.parent
    (tmp_path / "new").mkdir()
    assert entry.stat().st_mode == (tmp_path / "new").stat().st_mode


def test_a_whole_file_of_another_build_is_found(corpus: Corpus, tmp_path: Path) -> None:
    one, other = prepare(corpus, tmp_path), prepare(corpus, tmp_path, vocab_size=280)
    name = "train-00000.bin"
    one.tokenizer_file.with_name(name).write_bytes(other.tokenizer_file.with_name(name).read_bytes())
    with pytest.raises(DataError, match=r"train-00000\.bin does not match its checksum in entry\.json"):
        prepare(corpus, tmp_path)


def test_large_files_are_hashed_once_and_again_when_they_change(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(flash_attn_train.data.verified, "ALWAYS_BYTES", 0)
    file = prepare(corpus, tmp_path).tokenizer_file.with_name("train-00000.bin")
    assert f"checking {file}" in capsys.readouterr().out
    prepare(corpus, tmp_path)
    assert "checking" not in capsys.readouterr().out
    status = file.stat()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match="does not match its checksum"):
        prepare(corpus, tmp_path)
    os.utime(
        file, ns=(status.st_atime_ns, status.st_mtime_ns)
    )  # as decay of the disk: nothing tells of it ...
    prepare(corpus, tmp_path)
    with pytest.raises(DataError, match="does not match its checksum"):  # ... but reading it all
        verify_entry(file.parent)


def test_files_of_limited_size(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = prepare(corpus, tmp_path / "whole")
    monkeypatch.setattr(flash_attn_train.data.tokens, "SHARD_TOKENS", 1000)
    parts = prepare(corpus, tmp_path / "parts")
    assert {len(shard) for shard in parts.train.shards[:-1]} == {1000}
    assert 0 < len(parts.train.shards[-1]) <= 1000
    np.testing.assert_array_equal(np.asarray(whole.train), np.asarray(parts.train))
    assert verify_entry(parts.tokenizer_file.parent) > 2 * len(parts.train)


def test_interrupted_build_leaves_no_entry(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(flash_attn_train.data.prepare, "write_shards", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(corpus, tmp_path)
    assert entries(tmp_path) == []
    assert not prepare(corpus, tmp_path).from_cache


def test_what_a_killed_build_left_is_removed(corpus: Corpus, tmp_path: Path) -> None:
    entry = prepare(corpus, tmp_path).tokenizer_file.parent
    left_over = tmp_path / f"{entry.name}.{socket.gethostname()}.abc.tmp"
    entry.rename(left_over)
    of_another_machine = tmp_path / f"{entry.name}.elsewhere.abc.tmp"
    of_another_machine.mkdir()
    assert not prepare(corpus, tmp_path).from_cache
    assert sorted(entries(tmp_path)) == [entry, of_another_machine]


def _prepare_with_a_pause(
    folder: str, cache: str, in_pause: Event, go_on: Event, results: multiprocessing.Queue
) -> None:
    original = flash_attn_train.data.prepare.write_shards

    def pausing(*args: object, **options: object) -> list[str]:
        in_pause.set()
        assert go_on.wait(timeout=200)
        return original(*args, **options)  # type: ignore[arg-type]

    flash_attn_train.data.prepare.write_shards = pausing
    data = prepare(read_corpus(folder, val_fraction=0.2), Path(cache))
    results.put((data.key, len(entries(Path(cache)))))


def test_one_process_builds_and_the_other_waits(
    corpus: Corpus, corpus_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = multiprocessing.get_context("fork")
    results, in_pause, go_on = context.Queue(), context.Event(), context.Event()
    arguments = (str(corpus_folder), str(tmp_path), in_pause, go_on, results)
    other = context.Process(target=_prepare_with_a_pause, args=arguments)
    other.start()
    assert in_pause.wait(timeout=200)
    said: list[str] = []

    def say(text: str) -> None:  # when this process is going to wait
        said.append(text)
        go_on.set()

    monkeypatch.setattr("flash_attn_train.data.cache_lock.say", say)
    data = prepare(corpus, tmp_path)
    assert len(said) == 1 and "another process prepares the same data" in said[0]
    assert results.get(timeout=200) == (data.key, 1)
    other.join()


def test_a_build_that_is_killed_blocks_nobody(corpus: Corpus, corpus_folder: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    in_pause = context.Event()
    arguments = (str(corpus_folder), str(tmp_path), in_pause, context.Event(), context.Queue())
    other = context.Process(target=_prepare_with_a_pause, args=arguments)
    other.start()
    assert in_pause.wait(timeout=200)
    other.kill()
    other.join()
    assert len(list(tmp_path.glob("*.tmp/tokenizer.json"))) == 1
    data = prepare(corpus, tmp_path)
    assert not data.from_cache and entries(tmp_path) == [data.tokenizer_file.parent]


def test_disk_full(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = flash_attn_train.data.prepare.write_shards

    def full(folder: Path, name: str, chunks: Iterator[np.ndarray], *args: object) -> None:
        original(folder, name, (next(chunks) for _ in range(2)), *args)  # type: ignore[arg-type]
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(flash_attn_train.data.prepare, "write_shards", full)
    monkeypatch.setattr(
        flash_attn_train.data.prepare,
        "encode_documents",
        lambda *args: encode_documents(*args, group_characters=1000),
    )
    with pytest.raises(
        DataError, match=r"is full .* after [\d,]+ bytes of tokens; expected room for about [\d,]+ bytes"
    ):
        prepare(corpus, tmp_path)
    assert entries(tmp_path) == []


def test_disk_full_at_the_tokenizer_of_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> contextlib.AbstractContextManager[BinaryIO]:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(flash_attn_train.data.prepare, "atomic_write", full)
    with pytest.raises(DataError, match=r"data\.cache_dir: the disk of .* is full"):
        cached_tokenizer(TOKENIZER, lambda: iter(["some text"]), tmp_path / "tokenizer.json")


@pytest.mark.parametrize("name", ["tokenizer.json", "entry.json"])
def test_disk_full_at_a_small_file(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def full(path: Path) -> contextlib.AbstractContextManager[BinaryIO]:
        if path.name == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return atomic_write(path)

    for module in (flash_attn_train.data.prepare, flash_attn_train.data.entry):
        monkeypatch.setattr(module, "atomic_write", full)
    with pytest.raises(DataError, match=r"data\.cache_dir: the disk of .* is full"):
        prepare(corpus, tmp_path)
    assert entries(tmp_path) == []


def test_a_source_that_grows_while_it_is_read(tmp_path: Path) -> None:
    """As a download does."""
    rows = "".join(json.dumps({"text": f"text {number}"}) + "\n" for number in range(90))
    (tmp_path / "a.jsonl").write_text(rows)

    class Growing(RecordCorpus):
        def texts(self, split: str) -> Iterator[str]:
            yield from super().texts(split)
            with open(self.files[0], "a") as file:
                file.write('{"text": "more"}\n')

    source = Growing("rows", tmp_path, (tmp_path / "a.jsonl",), val_fraction=0.3)
    with pytest.raises(DataError, match="rows has changed while it was read"):
        prepare_data(source, TOKENIZER, cache_dir=str(tmp_path / "cache"))
    assert entries(tmp_path / "cache") == []


def test_token_ids_with_gaps(corpus: Corpus, tmp_path: Path) -> None:
    """The largest id decides about bytes per token and the size of the model, not the number of tokens."""
    vocabulary = {END_OF_TEXT: 0, "[UNK]": 1, "the": 2, "cat": 70_000}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "gaps.json"))
    data = prepare(corpus, tmp_path / "cache", path=str(tmp_path / "gaps.json"))
    assert data.vocab_size == 70_001
    assert set(np.unique(np.asarray(data.train))) == {0, 1, 2, 70_000}


def test_tokens_that_do_not_fit_their_file(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(flash_attn_train.data.prepare, "token_dtype", lambda vocab_size: np.dtype("<u4"))
        prepare(corpus, tmp_path)
    monkeypatch.setattr(flash_attn_train.data.prepare, "vocab_size_of", lambda tokenizer: 70_000)
    assert len(prepare(corpus, tmp_path).train)  # wide enough
    shutil.rmtree(next(entry for entry in entries(tmp_path)))
    with monkeypatch.context() as patch:
        patch.setattr(flash_attn_train.data.prepare, "token_dtype", lambda vocab_size: np.dtype("<u2"))
        prepare(corpus, tmp_path)
    with pytest.raises(DataError, match=r"train-00000\.bin has 2 bytes per token.*vocabulary of 70,000"):
        prepare(corpus, tmp_path)


def test_verification_of_a_cache_that_cannot_be_written(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flash_attn_train.data.verified, "ALWAYS_BYTES", 0)
    entry = prepare(corpus, tmp_path).tokenizer_file.parent
    file = entry / "train-00000.bin"
    status, content = file.stat(), bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(DataError, match="does not match its checksum"):
        verify_entry(entry)
    content[-1] ^= 1
    file.write_bytes(content)
    assert verify_entry(entry) > len(content)


def test_corpus_shorter_than_a_context(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        prepare_data(corpus, TOKENIZER, seqlen=100_000, cache_dir=str(tmp_path))
    for part in ("data.path", "tokens, expected at least 100001", "model.max_seqlen=100000"):
        assert part in str(error.value)


def test_a_file_that_went_away(corpus_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(corpus_folder, copy)
    corpus = read_corpus(str(copy), val_fraction=0.2)
    corpus.train[3].path.unlink()
    with pytest.raises(DataError, match=rf"cannot read {corpus.train[3].path}"):
        prepare(corpus, tmp_path / "cache")
    assert entries(tmp_path / "cache") == []


def test_unwritable_cache(corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data\.cache_dir: cannot write to .*Set data\.cache_dir"):
        prepare(corpus, tmp_path / "file" / "cache")


def test_default_cache_follows_xdg(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data = prepare_data(corpus, TOKENIZER, seqlen=16)
    assert data.tokenizer_file.parent.parent == tmp_path / "flash-attn-train"


def test_facts_of_an_entry_can_be_read(corpus: Corpus, tmp_path: Path) -> None:
    facts = json.loads(prepare(corpus, tmp_path).tokenizer_file.with_name("entry.json").read_text())
    assert facts["settings"]["vocab_size"] == 300
    assert facts["splits"]["train"]["bytes"] == corpus.num_bytes["train"]


def test_long_documents_are_encoded_in_pieces_with_one_end(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flash_attn_train.data.tokenizer._PIECE_CHARACTERS", 100)
    data = prepare(corpus, tmp_path)
    end, tokens = data.special.end_of_text, np.asarray(data.train)
    assert np.count_nonzero(tokens == end) == data.splits["train"].num_documents == len(corpus.train)
    text = data.tokenizer.decode(tokens[tokens != end].tolist())
    assert text == "".join(document.text() for document in corpus.train)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["some text"], vocab_size=260, min_frequency=2, show_progress=False)


@pytest.mark.parametrize("group_characters", [1, 7, 1 << 20])
def test_groups_do_not_change_the_tokens(tokenizer: Tokenizer, group_characters: int) -> None:
    texts = ["", "ab", "some text some text", "x"]
    groups = list(encode_documents(tokenizer, texts, 0, group_characters=group_characters))
    tokens = np.concatenate([group.tokens for group in groups])
    assert tokens.tolist() == [token for text in texts for token in [*tokenizer.encode(text).ids, 0]]
    assert sum(len(group.ends) for group in groups) == len(texts)


def test_a_tokenizer_that_does_not_know_all_text() -> None:
    partial = Tokenizer(models.WordLevel({END_OF_TEXT: 0, "a": 1}, unk_token="[UNK]"))
    with pytest.raises(DataError, match=r"tokenizer: .*Missing \[UNK\] token.*expected one that encodes any"):
        list(encode_documents(partial, ["b"], 0))


def test_reading_stops_with_an_error_of_the_source(tokenizer: Tokenizer) -> None:
    def texts() -> Iterator[str]:
        yield "a"
        raise DataError("broken")

    with pytest.raises(DataError, match="broken"):
        list(encode_documents(tokenizer, texts(), 0))

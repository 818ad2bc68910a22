"""Tokenizer and token files of a corpus, and their cache."""

from __future__ import annotations

import os
from pathlib import Path

import flash_attn_train.data.prepare
import numpy as np
import pytest
from flash_attn_train.configs import TokenizerConfig
from flash_attn_train.data import Corpus, PreparedData, prepare_data, read_corpus
from flash_attn_train.data.tokenizer import END_OF_TEXT, pieces, train_tokenizer
from flash_attn_train.errors import DataError

TOKENIZER = TokenizerConfig(vocab_size=300)


@pytest.fixture
def corpus(corpus_folder: Path) -> Corpus:
    return read_corpus(str(corpus_folder), val_fraction=0.2)


def prepare(corpus: Corpus, cache: Path, **changes: int) -> PreparedData:
    return prepare_data(
        corpus, TokenizerConfig(**{"vocab_size": 300, **changes}), seqlen=16, cache_dir=str(cache)
    )


def test_tokens_are_the_documents_each_with_an_end(corpus: Corpus, tmp_path: Path) -> None:
    data = prepare(corpus, tmp_path)
    assert 257 < data.vocab_size <= 300
    end = data.tokenizer.token_to_id(END_OF_TEXT)
    for tokens, documents in ((data.train, corpus.train), (data.validation, corpus.validation)):
        assert np.count_nonzero(tokens == end) == len(documents)
        assert tokens[-1] == end
        parts = np.split(np.array(tokens), np.flatnonzero(tokens == end) + 1)[:-1]
        assert [data.tokenizer.decode(part[:-1].tolist()) for part in parts] == [d.text() for d in documents]


def test_tokenizer_has_seen_the_training_split_only(corpus: Corpus, tmp_path: Path) -> None:
    swapped = Corpus(corpus.title, corpus.train, corpus.validation[:1], (), "")
    assert (
        prepare(corpus, tmp_path / "a").tokenizer.to_str()
        == prepare(swapped, tmp_path / "b").tokenizer.to_str()
    )


def test_building_twice_gives_the_same_bytes(corpus: Corpus, tmp_path: Path) -> None:
    one, other = (prepare(corpus, tmp_path / name) for name in "ab")
    assert one.key == other.key
    for name in ("tokenizer.json", "train.bin", "validation.bin"):
        first, second = (data.tokenizer_file.with_name(name).read_bytes() for data in (one, other))
        assert first == second


def test_cache_is_used_again(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(corpus, tmp_path)
    assert not first.from_cache
    monkeypatch.setattr(flash_attn_train.data.prepare, "train_tokenizer", None)  # would fail if called
    second = prepare(corpus, tmp_path)
    assert second.from_cache
    np.testing.assert_array_equal(first.train, second.train)


@pytest.mark.parametrize("changes", [{"vocab_size": 280}, {"min_frequency": 50}])
def test_other_tokenizer_settings_are_another_entry(corpus: Corpus, tmp_path: Path, changes: dict) -> None:
    first, second = prepare(corpus, tmp_path), prepare(corpus, tmp_path, **changes)
    assert first.key != second.key and not second.from_cache
    assert first.vocab_size != second.vocab_size


def test_other_split_is_another_entry(corpus: Corpus, corpus_folder: Path, tmp_path: Path) -> None:
    other = read_corpus(str(corpus_folder), val_fraction=0.5)
    assert prepare(corpus, tmp_path).key != prepare(other, tmp_path).key


@pytest.mark.parametrize("name", ["tokenizer.json", "train.bin", "validation.bin"])
def test_damaged_entry_is_an_error_that_names_the_file(corpus: Corpus, tmp_path: Path, name: str) -> None:
    file = prepare(corpus, tmp_path).tokenizer_file.with_name(name)
    os.truncate(file, file.stat().st_size - 3)
    with pytest.raises(DataError) as error:
        prepare(corpus, tmp_path)
    assert str(file) in str(error.value)


def test_interrupted_build_leaves_no_entry(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(flash_attn_train.data.prepare, "write_token_file", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(corpus, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert not prepare(corpus, tmp_path).from_cache


def test_entry_that_another_process_finished_first_is_taken(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = prepare(corpus, tmp_path)
    entry = other.tokenizer_file.parent
    before = {file.name: file.stat().st_mtime_ns for file in entry.iterdir()}
    flash_attn_train.data.prepare._build(corpus, TOKENIZER, entry)
    assert {file.name: file.stat().st_mtime_ns for file in entry.iterdir()} == before
    assert list(tmp_path.iterdir()) == [entry]


def test_corpus_shorter_than_a_context(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        prepare_data(corpus, TOKENIZER, seqlen=100_000, cache_dir=str(tmp_path))
    for part in ("data.path", "tokens, expected at least 100001", "model.max_seqlen=100000"):
        assert part in str(error.value)


def test_unwritable_cache(corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data\.cache_dir: cannot write to .*Set data\.cache_dir"):
        prepare(corpus, tmp_path / "file" / "cache")


def test_default_cache_follows_xdg(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data = prepare_data(corpus, TOKENIZER, seqlen=16)
    assert data.tokenizer_file.parent.parent == tmp_path / "flash-attn-train"


@pytest.mark.parametrize("text", ["naïve café 日本 🙂\n\n\t x", "a<|endoftext|>b", "", "\r\n  \x01"])
def test_any_text_decodes_to_itself(text: str) -> None:
    tokenizer = train_tokenizer(["some text"], vocab_size=260, min_frequency=2, show_progress=False)
    ids = tokenizer.encode(text).ids
    assert tokenizer.token_to_id(END_OF_TEXT) not in ids
    assert tokenizer.decode(ids) == text


def test_pieces_are_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flash_attn_train.data.tokenizer._PIECE_CHARACTERS", 10)
    text = "abc\ndef\nghijklmnopqrstuvwxyz\n\nz"
    parts = list(pieces(text))
    assert "".join(parts) == text
    assert max(map(len, parts)) <= 10
    assert parts[0] == "abc\ndef\n"
    assert list(pieces("")) == [""]


def test_long_documents_are_encoded_in_pieces_with_one_end(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flash_attn_train.data.tokenizer._PIECE_CHARACTERS", 100)
    data = prepare(corpus, tmp_path)
    end = data.tokenizer.token_to_id(END_OF_TEXT)
    assert np.count_nonzero(data.train == end) == len(corpus.train)
    text = data.tokenizer.decode([token for token in data.train.tolist() if token != end])
    assert text == "".join(document.text() for document in corpus.train)

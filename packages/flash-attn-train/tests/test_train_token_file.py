"""The token file format."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from flash_attn_train.data.token_file import open_token_file, token_dtype, write_token_file
from flash_attn_train.errors import DataError

HEADER_BYTES = 64


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2, "<u2"), (65536, "<u2"), (65537, "<u4")])
def test_round_trip(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    ids = np.array([0, 1, vocab_size - 1, 7], np.int64)
    file = tmp_path / "tokens.bin"
    assert write_token_file(file, [ids[:3], ids[:0], ids[3:]], token_dtype(vocab_size)) == 4
    tokens = open_token_file(file)
    assert tokens.dtype == np.dtype(dtype)
    assert isinstance(tokens, np.memmap) and not tokens.flags.writeable
    np.testing.assert_array_equal(tokens, ids)
    assert file.stat().st_size == HEADER_BYTES + 4 * np.dtype(dtype).itemsize


def test_no_tokens(tmp_path: Path) -> None:
    write_token_file(tmp_path / "none.bin", [], token_dtype(10))
    assert len(open_token_file(tmp_path / "none.bin")) == 0


def flip(data: bytearray, position: int) -> bytearray:
    data[position] ^= 1
    return data


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda data: data[:-2], "bytes long, expected"),
        (lambda data: data + b"\0\0", "bytes long, expected"),
        (lambda data: data[:30], "shorter than its header"),
        (lambda data: b"", "shorter than its header"),
        (lambda data: flip(data, 0), "starts with"),
        (lambda data: flip(data, 8), "format version"),
        (lambda data: flip(data, 12), "bytes per token"),
        (lambda data: flip(data, 16), "bytes long, expected"),
        (lambda data: flip(data, 30), "does not match its checksum"),
        (lambda data: flip(data, HEADER_BYTES), "does not match its checksum"),
        (lambda data: flip(data, len(data) - 1), "does not match its checksum"),
    ],
)
def test_damage_is_found(tmp_path: Path, damage: object, what: str) -> None:
    file = tmp_path / "tokens.bin"
    write_token_file(file, [np.arange(100)], token_dtype(100))
    file.write_bytes(damage(bytearray(file.read_bytes())))  # type: ignore[operator]
    with pytest.raises(DataError, match=what) as error:
        open_token_file(file)
    assert str(file) in str(error.value) and "Delete the folder" in str(error.value)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        open_token_file(tmp_path / "missing.bin")


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "tokens.bin"
    write_token_file(file, [np.arange(5)], token_dtype(10))

    def chunks() -> object:
        yield np.arange(3)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_token_file(file, chunks(), token_dtype(10))  # type: ignore[arg-type]
    np.testing.assert_array_equal(open_token_file(file), np.arange(5))
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.bin"]

"""The command that prepares data."""

from __future__ import annotations

from pathlib import Path

import pytest
from flash_attn_train.cli_prepare import main


def arguments(folder: Path, cache: Path, *more: str) -> list[str]:
    return [
        f"data.path={folder}",
        f"data.cache_dir={cache}",
        "data.val_fraction=0.2",
        "tokenizer.vocab_size=300",
        "model.max_seqlen=16",
        *more,
    ]


def test_prepares_once_and_verifies(
    corpus_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(corpus_folder, tmp_path)) == 0
    first = capsys.readouterr().out
    assert "documents" in first and "from the cache" not in first
    assert main(arguments(corpus_folder, tmp_path, "--verify")) == 0
    again = capsys.readouterr().out
    assert "from the cache" in again and "verified" in again
    entry = Path(next(line for line in again.splitlines() if line.startswith("prepared")).split()[1])
    assert (entry / "train-00000.bin").is_file()
    (entry / "train-00000.bin").write_bytes(b"")
    assert main(arguments(corpus_folder, tmp_path, "--verify")) == 2
    error = capsys.readouterr().err
    assert error.startswith("flash-attn-prepare: error: token file ") and error.count("\n") == 1


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(tmp_path / "missing", tmp_path)) == 2
    assert "does not exist" in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0 and "--verify" in capsys.readouterr().out

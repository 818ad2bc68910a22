"""Texts with labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flash_attn_train.configs import TrainConfig, TrainerConfig
from flash_attn_train.configs.data import LabelledTextDataConfig, TokenizerConfig
from flash_attn_train.configs.model import BertModelConfig
from flash_attn_train.configs.task import SequenceClassificationConfig
from flash_attn_train.data import DataModule, build_data
from flash_attn_train.data.classification import sorted_names
from flash_attn_train.errors import ConfigError, DataError

SEQLEN = 24
ROWS: list[dict[str, Any]] = [
    {
        "text": f"text {number} " + "good fine well " * (number % 5),
        "label": ("yes", "no", "maybe")[number % 3],
    }
    for number in range(120)
]


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    if path.suffix == ".tsv":
        lines = ["text\tlabel", *(f"{row['text']}\t{row['label']}" for row in rows)]
    else:
        lines = [json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def build(path: Path | None, **options: Any) -> DataModule:
    return build_data(
        TrainConfig(
            task=SequenceClassificationConfig(),
            data=LabelledTextDataConfig(path=str(path or ""), **{"val_fraction": 0.2, **options}),
            tokenizer=TokenizerConfig(vocab_size=300),
            model=BertModelConfig(max_seqlen=SEQLEN),
            trainer=TrainerConfig(batch_size=8, val_sequences=None),
        )
    )


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.tsv"])
def test_samples_are_the_rows(tmp_path: Path, name: str) -> None:
    module = build(write(tmp_path / name))
    assert module.label_names == ["maybe", "no", "yes"] and module.num_classes == 3
    assert module.tokenizer is not None
    train, validation = module.train_samples, module.validation_samples
    assert len(train) + len(validation) == 120 and len(validation) > 5  # type: ignore[arg-type]
    seen = []
    for samples in (train, validation):
        batch = samples.batch(np.arange(len(samples)))  # type: ignore[arg-type,union-attr]
        assert batch["input_ids"].shape == (len(samples), SEQLEN)  # type: ignore[arg-type]
        for ids, attended, label in zip(
            batch["input_ids"].numpy(), batch["attention_mask"].numpy(), batch["labels"].tolist(), strict=True
        ):
            length = int(attended.sum())
            assert ids[0] == 2 and ids[length - 1] == 3 and (ids[length:] == 1).all()
            seen.append((module.tokenizer.decode(ids[1 : length - 1].tolist()), module.label_names[label]))
    rows = [(row["text"], row["label"]) for row in ROWS]
    for text, label in seen:
        assert sum(full.startswith(text) and name == label for full, name in rows) >= 1
    assert len({text for text, _ in seen}) == 120
    assert "120" not in module.describe()["labels"] and module.describe()["labels"].startswith("3: maybe")


def test_key_follows_content(tmp_path: Path) -> None:
    first = build(write(tmp_path / "a.jsonl"))
    assert build(write(tmp_path / "b.tsv")).key == first.key
    other = [{**row, "label": "no"} if row["label"] == "yes" else row for row in ROWS]
    assert build(write(tmp_path / "c.jsonl", other)).key != first.key


def test_a_file_to_validate_on(tmp_path: Path) -> None:
    path, val = write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl", ROWS[:7])
    module = build(path, val_path=str(val))
    assert (len(module.train_samples), len(module.validation_samples)) == (120, 7)  # type: ignore[arg-type]
    write(val, [{"text": "a", "label": "never"}])
    with pytest.raises(DataError, match=r"label 'never' is not among those trained on \(maybe, no, yes\)"):
        build(path, val_path=str(val))


def test_label_order() -> None:
    assert sorted_names(["10", "9", "-1"]) == ["-1", "9", "10"]
    assert sorted_names(["10", "9", "b"]) == ["10", "9", "b"]
    assert sorted_names(["--1", "2"]) == ["--1", "2"]
    # Equal numbers: the order must not be that of a set, which differs between processes.
    assert sorted_names(["1", "02", "01", "2", "0001", "001"]) == ["0001", "001", "01", "1", "02", "2"]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (ROWS, {"label_field": "class"}, r"no field 'class'; it has text, label.*data\.label_field"),
        ([{"text": "a", "label": 1.5}], {}, r"label=1\.5; expected a text, and a text or whole number"),
        (ROWS[:1], {}, r"1 rows, of which .* expected some of both"),
    ],
)
def test_bad_rows(tmp_path: Path, rows: list[dict[str, Any]], options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        build(write(tmp_path / "a.jsonl", rows), **options)


def test_path_is_needed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.path: got ''"):
        build(None)
    with pytest.raises(DataError, match=r"data\.path: got .*expected a file whose name ends in \.jsonl"):
        build(tmp_path / "missing.jsonl")

"""Streamed datasets: windows as a pure function of the rank and their number, with or without marks."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flash_attn_train.configs import TrainConfig, TrainerConfig
from flash_attn_train.configs.data import HubTextDataConfig, TokenizerConfig
from flash_attn_train.configs.model import GPTModelConfig
from flash_attn_train.data import DataModule, build_data
from flash_attn_train.data.hub import load_split
from flash_attn_train.data.prefetch import prefetch
from flash_attn_train.data.stream_marks import Mark, StreamMarks
from flash_attn_train.data.streaming import StreamWindows
from flash_attn_train.data.tokenizer import train_tokenizer
from flash_attn_train.errors import CheckpointError, ConfigError, DataError

pytest.importorskip("datasets", reason="the datasets library reads Hugging Face datasets")

SEQLEN = 12


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files of 40 documents, of 3 to 90 characters."""
    folder = tmp_path_factory.mktemp("dataset")
    rng = np.random.default_rng(0)
    for part in range(3):
        rows = [{"text": f"{part}/{n}: " + "ab cd " * int(rng.integers(0, 15))} for n in range(40)]
        (folder / f"train-{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def stream(folder: Path, *, rank: int = 0, world_size: int = 1, **options: Any) -> StreamWindows:
    config = HubTextDataConfig(name=str(folder))
    settings: dict[str, Any] = {
        "text_field": "text",
        "is_training": lambda text: "7" not in text,
        "detokenize": lambda text: text,
        "tokenizer": train_tokenizer(["ab"], vocab_size=257, min_frequency=2, show_progress=False),
        "end_of_text": 0,
        "seqlen": SEQLEN,
        "rank": rank,
        "world_size": world_size,
        "group_characters": 200,
        **options,
    }
    return StreamWindows(lambda: load_split(config, "train", streaming=True), **settings)


def take(source: StreamWindows, first: int, count: int) -> np.ndarray:
    return np.stack(list(itertools.islice(source.start_at(first), count)))


@pytest.mark.parametrize("world_size", [1, 3])
def test_each_rank_sees_every_nth_document(folder: Path, world_size: int) -> None:
    texts = [
        json.loads(line)["text"]
        for part in range(3)
        for line in (folder / f"train-{part}.jsonl").read_text().splitlines()
    ]
    training = [text for text in texts if "7" not in text]
    for rank in range(world_size):
        source = stream(folder, rank=rank, world_size=world_size)
        # Three epochs: the numbers of the documents go on from one to the next.
        own = itertools.islice(itertools.cycle(training), rank, 3 * len(training), world_size)
        ids = [token for text in own for token in [*source.tokenizer.encode(text).ids, 0]]
        count = (len(ids) - 1) // SEQLEN
        windows = take(source, 0, count)
        assert windows[:, :-1].flatten().tolist() == ids[: count * SEQLEN]
        assert np.array_equal(windows[1:, 0], windows[:-1, -1])


@pytest.mark.parametrize("group_characters", [1, 200, 10**6])
def test_any_start_gives_the_same_windows(folder: Path, tmp_path: Path, group_characters: int) -> None:
    every = take(stream(folder, rank=1, world_size=2), 0, 300)  # more than two epochs
    options: dict[str, Any] = {"rank": 1, "world_size": 2, "group_characters": group_characters}
    marks = tmp_path / "marks.jsonl"
    # The first pass writes the marks, the later ones start from them.
    written = stream(folder, marks=StreamMarks(marks, windows_between=1), **options)
    assert np.array_equal(take(written, 0, 300), every)
    for first in (0, 1, 37, 100, 150, 222, 290):
        plain = stream(folder, **options)
        marked = stream(folder, marks=StreamMarks(marks, windows_between=1), **options)
        assert np.array_equal(take(plain, first, 10), every[first : first + 10])
        assert np.array_equal(take(marked, first, 10), every[first : first + 10])


def test_marks_save_reading(folder: Path, tmp_path: Path) -> None:
    marks = tmp_path / "marks.jsonl"
    take(stream(folder, marks=StreamMarks(marks, windows_between=5)), 0, 100)
    lines = len(marks.read_text().splitlines())
    with open(marks, "ab") as file:  # a torn line
        file.write(b'{"windows": 99999, "docu')
    found = StreamMarks(marks, windows_between=5).before(90)
    assert found is not None and 70 < found.windows <= 90
    read: list[str] = []
    counting = stream(
        folder,
        marks=StreamMarks(marks, windows_between=5),
        is_training=lambda text: bool(read.append(text)) or "7" not in text,
    )
    take(counting, 90, 1)
    assert 0 < len(read) < 40
    take(
        stream(folder, marks=StreamMarks(marks, windows_between=5)), 0, 80
    )  # what is known is not written again
    assert len(marks.read_text().splitlines()) <= lines + 1


def test_marks_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    marks = StreamMarks(tmp_path / "file" / "marks.jsonl", windows_between=1)
    marks.add(Mark(5, 1, None, []))
    assert marks.before(10) is None


def test_more_ranks_than_documents(folder: Path) -> None:
    with pytest.raises(DataError, match=r"1 documents to train on for 2 data-parallel ranks"):
        take(stream(folder, rank=1, world_size=2, is_training=lambda text: text.startswith("0/0:")), 0, 1)


def config_of(folder: Path, cache: Path, **changes: Any) -> TrainConfig:
    data = HubTextDataConfig(name=str(folder), streaming=True, val_fraction=0.3, cache_dir=str(cache))
    return dataclasses.replace(
        TrainConfig(
            data=dataclasses.replace(data, **changes),
            tokenizer=TokenizerConfig(vocab_size=280),
            model=GPTModelConfig(max_seqlen=SEQLEN),
            trainer=TrainerConfig(batch_size=3, val_sequences=7),
        )
    )


class FakeTrainer:
    def __init__(self, step: int, rank: int = 0, world_size: int = 1) -> None:
        self.global_step, self.accumulate_grad_batches = step, 2
        self.strategy = type("Strategy", (), {})()
        self.strategy.distributed_sampler_kwargs = {"rank": rank, "num_replicas": world_size}


def batches(module: DataModule, trainer: FakeTrainer, count: int) -> list[dict[str, torch.Tensor]]:
    module.trainer = trainer  # type: ignore[assignment]
    return list(itertools.islice(iter(module.train_dataloader()), count))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_data_module(folder: Path, tmp_path: Path, num_workers: int) -> None:
    module = build_data(config_of(folder, tmp_path / "cache", num_workers=num_workers))
    first = batches(module, FakeTrainer(0), 12)
    assert {name: tuple(value.shape) for name, value in first[0].items()} == {
        "input_ids": (3, SEQLEN),
        "labels": (3, SEQLEN),
    }
    resumed = build_data(config_of(folder, tmp_path / "elsewhere", num_workers=num_workers))
    resumed.load_state_dict(module.state_dict())
    later = batches(resumed, FakeTrainer(4), 4)  # step 4 of two forward passes each
    for one, other in zip(first[8:], later, strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])
    validation = list(module.val_dataloader())
    assert sum(int((batch["labels"][:, 0] != -100).sum()) for batch in validation) == 7
    assert module.key == resumed.key and module.vocab_size <= 280
    assert module.val_bytes_per_token is not None and 0.5 < module.val_bytes_per_token < 6


def test_a_tokenizer_is_trained_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build_data(config_of(folder, tmp_path))
    monkeypatch.setattr("flash_attn_train.data.prepare.train_tokenizer", None)  # would fail if called
    assert build_data(config_of(folder, tmp_path)).key == first.key


def test_another_number_of_ranks_is_refused(folder: Path, tmp_path: Path) -> None:
    module = build_data(config_of(folder, tmp_path))
    two = [batches(module, FakeTrainer(0, rank, 2), 2) for rank in range(2)]
    assert not torch.equal(two[0][0]["input_ids"], two[1][0]["input_ids"])
    state = module.state_dict()
    resumed = build_data(config_of(folder, tmp_path))
    resumed.load_state_dict({**state, "global_batch_size": 6})
    with pytest.raises(CheckpointError, match=r"world size 2, now it is 1"):
        batches(resumed, FakeTrainer(1), 1)


def test_options_that_do_not_go_together(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder, tmp_path)
    with pytest.raises(ConfigError, match=r"trainer\.val_sequences: got null with data\.streaming=true"):
        build_data(dataclasses.replace(config, trainer=TrainerConfig(val_sequences=None)))
    with pytest.raises(ConfigError, match=r"data\.rows: got lines with data\.streaming=true"):
        build_data(config_of(folder, tmp_path, rows="lines"))


def test_a_source_that_breaks_off_is_named_at_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def __iter__(self) -> Any:
            yield {"text": "a document"}
            raise ConnectionError("reset by peer")

    monkeypatch.setattr("flash_attn_train.data.streaming.load_split", lambda *args, **options: Broken())
    for config in (config_of(folder, tmp_path), config_of(folder, tmp_path, val_split="validation")):
        with pytest.raises(DataError, match=r"data\.name: cannot read on \(ConnectionError: reset by peer\)"):
            build_data(config)


def test_prefetch_passes_items_errors_and_the_end() -> None:
    assert list(prefetch(iter(range(100)), 3)) == list(range(100))

    def failing() -> Any:
        yield 1
        raise DataError("lost")

    source = prefetch(failing(), 3)
    assert next(source) == 1
    with pytest.raises(DataError, match="lost"):
        next(source)
    endless = prefetch(itertools.count(), 2)
    assert next(endless) == 0
    endless.close()  # type: ignore[attr-defined]  # ends the thread

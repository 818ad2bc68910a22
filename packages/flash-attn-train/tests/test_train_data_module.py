"""Config -> data module, and what it gives to a trainer."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from flash_attn_train.configs import TrainConfig, TrainerConfig
from flash_attn_train.configs.data import (
    DATA,
    DataConfig,
    HubTextDataConfig,
    LabelledTextDataConfig,
    TextDataConfig,
    TokenizerConfig,
)
from flash_attn_train.configs.model import BertModelConfig, GPTModelConfig
from flash_attn_train.configs.task import (
    LanguageModelConfig,
    MaskedLMConfig,
    SequenceClassificationConfig,
    TaskConfig,
)
from flash_attn_train.data import DataModule, build_data, build_data_module
from flash_attn_train.errors import CheckpointError, ConfigError, DataError

Batch = dict[str, Any]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def config_of(folder: Path, cache: Path, task: TaskConfig | None = None, **trainer: Any) -> TrainConfig:
    task = task or LanguageModelConfig()
    decoder = isinstance(task, LanguageModelConfig)
    return TrainConfig(
        task=task,
        data=TextDataConfig(path=str(folder), val_fraction=0.2, cache_dir=str(cache)),
        tokenizer=TokenizerConfig(vocab_size=300),
        model=GPTModelConfig(max_seqlen=16) if decoder else BertModelConfig(max_seqlen=16),
        trainer=TrainerConfig(**{"batch_size": 3, "val_sequences": 20, **trainer}),
    )


class FakeTrainer:
    """What the module asks of a trainer."""

    def __init__(self, step: int = 0, accumulate: int = 1, rank: int = 0, world_size: int = 1) -> None:
        self.global_step, self.accumulate_grad_batches = step, accumulate
        self.strategy: Any = type("Strategy", (), {})()
        if world_size > 1:
            self.strategy.distributed_sampler_kwargs = {"rank": rank, "num_replicas": world_size}


def attach(module: DataModule, trainer: FakeTrainer) -> DataModule:
    module.trainer = trainer  # type: ignore[assignment]
    return module


def train_batches(config: TrainConfig, trainer: FakeTrainer, count: int) -> list[Batch]:
    loader = attach(build_data(config), trainer).train_dataloader()
    return list(itertools.islice(iter(loader), count))


def equal(one: Batch, other: Batch) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name], other[name])
        if isinstance(one[name], torch.Tensor)
        else one[name] == other[name]
        for name in one
    )


TASKS = [LanguageModelConfig(), LanguageModelConfig(documents="within"), MaskedLMConfig()]


@pytest.mark.parametrize("task", TASKS, ids=["across", "within", "masked"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_resumes_in_the_middle_of_an_epoch_also_with_workers(
    corpus_folder: Path, cache: Path, task: TaskConfig, num_workers: int
) -> None:
    config = config_of(corpus_folder, cache, task)
    whole = train_batches(config, FakeTrainer(accumulate=2), 16)
    config.data.num_workers = num_workers
    torch.manual_seed(0)
    before = torch.get_rng_state()
    later = train_batches(config, FakeTrainer(step=5, accumulate=2), 6)
    assert all(equal(one, other) for one, other in zip(whole[10:], later, strict=True))
    assert torch.equal(torch.get_rng_state(), before)  # loaders draw nothing from the global generator


@pytest.mark.parametrize("task", TASKS[::2], ids=["across", "masked"])
def test_a_run_continues_with_another_number_of_ranks(
    corpus_folder: Path, cache: Path, task: TaskConfig
) -> None:
    config = config_of(corpus_folder, cache, task)
    one = train_batches(config, FakeTrainer(step=3, accumulate=4), 8)
    two = [train_batches(config, FakeTrainer(3, 2, rank, 2), 4) for rank in range(2)]
    # Micro batch a of rank r is micro batch 2 a + r of the single process.
    for number, batch in enumerate(one):
        assert equal(batch, two[number % 2][number // 2])


@pytest.mark.parametrize("task", TASKS, ids=["across", "within", "masked"])
@pytest.mark.parametrize("world_size", [1, 3])
def test_validation_has_every_sample_once(
    corpus_folder: Path, cache: Path, task: TaskConfig, world_size: int
) -> None:
    config = config_of(corpus_folder, cache, task)
    rows: list[str] = []
    for rank in range(world_size):
        loader = attach(build_data(config), FakeTrainer(rank=rank, world_size=world_size)).val_dataloader()
        assert len(loader) == -(-20 // (3 * world_size))
        for batch in loader:
            assert batch["input_ids"].shape == (3, 16)
            counts = (batch["labels"] != -100).any(1)
            rows += [str(row) for row in batch["input_ids"][counts].tolist()]
    assert len(rows) == len(set(rows)) == 20


def test_facts_of_a_corpus(corpus_folder: Path, cache: Path) -> None:
    module = build_data(config_of(corpus_folder, cache))
    assert module.tokenizer is not None and module.vocab_size == module.tokenizer.get_vocab_size()
    assert module.end_of_text_id == 0 and module.num_classes == 0 and module.label_names == []
    text = module.describe()
    assert (
        "documents" in text["corpus"]
        and "held out" in text["corpus"]
        and str(corpus_folder) in text["corpus"]
    )
    assert f"vocabulary of {module.vocab_size}" in text["tokens"]
    assert module.val_bytes_per_token is not None and 1 < module.val_bytes_per_token < 10
    assert build_data(config_of(corpus_folder, cache)).key == module.key
    assert "from the cache" in build_data(config_of(corpus_folder, cache)).describe()["tokens"]


def test_a_tokenizer_for_masked_lm_has_its_special_tokens(corpus_folder: Path, cache: Path) -> None:
    module = build_data(config_of(corpus_folder, cache, MaskedLMConfig()))
    assert module.tokenizer is not None and module.tokenizer.token_to_id("[MASK]") == 4
    assert module.key != build_data(config_of(corpus_folder, cache)).key


def test_within_documents_of_real_text(corpus_folder: Path, cache: Path) -> None:
    (batch,) = train_batches(config_of(corpus_folder, cache, TASKS[1]), FakeTrainer(), 1)
    assert batch["cu_seqlens"][-1] == 48 and batch["max_seqlen"] <= 16
    assert not (batch["labels"] == -100).any()


def test_another_global_batch_is_refused(corpus_folder: Path, cache: Path) -> None:
    config = config_of(corpus_folder, cache)
    module = attach(build_data(config), FakeTrainer(accumulate=4))
    state = module.state_dict()
    attach(module, FakeTrainer(2, 2, 0, 2)).load_state_dict(state)
    module.train_dataloader()  # as many samples per step
    with pytest.raises(CheckpointError, match=r"global batch size 12, now it is 6"):
        attach(module, FakeTrainer(2, 2)).train_dataloader()
    config = config_of(corpus_folder, cache, global_batch_size=7)
    with pytest.raises(ConfigError, match=r"trainer\.global_batch_size: got 7, expected a multiple"):
        train_batches(config, FakeTrainer(accumulate=2), 1)


def test_more_ranks_than_data(corpus_folder: Path, cache: Path) -> None:
    module = build_data(config_of(corpus_folder, cache, val_sequences=2))
    with pytest.raises(DataError, match=r"2 samples to validate on for 3 data-parallel ranks"):
        attach(module, FakeTrainer(rank=1, world_size=3)).val_dataloader()
    with pytest.raises(DataError, match=r"samples to train on for 100000 data-parallel ranks"):
        attach(module, FakeTrainer(rank=1, world_size=100_000)).train_dataloader()


def test_lightning_must_not_add_samplers(corpus_folder: Path, cache: Path) -> None:
    trainer: Any = FakeTrainer(rank=1, world_size=2)
    trainer._accelerator_connector = type("Connector", (), {"use_distributed_sampler": True})()
    with pytest.raises(TypeError, match="use_distributed_sampler=False"):
        attach(build_data(config_of(corpus_folder, cache)), trainer).train_dataloader()


def test_records_are_documents(tmp_path: Path, cache: Path) -> None:
    rows = [{"body": f"number {number} is a text of its own"} for number in range(200)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_of(tmp_path, cache)
    assert isinstance(config.data, TextDataConfig)
    config.data.text_field = "body"
    module = build_data(config)
    assert len(train_batches(config, FakeTrainer(), 1)[0]["input_ids"]) == 3
    assert "rows.jsonl" in module.describe()["corpus"] or str(tmp_path) in module.describe()["corpus"]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"task": SequenceClassificationConfig()}, ConfigError, "TextDataConfig for the task SequenceClass"),
        ({"data": LabelledTextDataConfig(path="x.tsv")}, ConfigError, "are for sequence_classification"),
        (
            {"data": HubTextDataConfig(name="x", streaming=True), "task": MaskedLMConfig()},
            ConfigError,
            r"data\.streaming: got true with the task MaskedLMConfig",
        ),
        ({"tokenizer": TokenizerConfig(path="/nowhere.json")}, DataError, "not a readable tokenizer file"),
        ({"model": GPTModelConfig(max_seqlen=100_000)}, DataError, "expected at least 100001"),
    ],
)
def test_what_does_not_fit(
    corpus_folder: Path, cache: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        build_data(dataclasses.replace(config_of(corpus_folder, cache), **changes))


def test_masked_lm_needs_a_mask_token(corpus_folder: Path, cache: Path) -> None:
    tokenizer = build_data(config_of(corpus_folder, cache)).tokenizer
    assert tokenizer is not None
    tokenizer.save(str(cache / "plain.json"))
    config = config_of(corpus_folder, cache, MaskedLMConfig())
    config.tokenizer = TokenizerConfig(path=str(cache / "plain.json"))
    with pytest.raises(DataError, match=r"no token \[PAD\]"):
        build_data(config)


def test_other_kinds_of_data_register() -> None:
    class Unknown(DataConfig):
        pass

    with pytest.raises(TypeError, match="got Unknown, expected a config of the data group"):
        build_data_module(Unknown(), TrainConfig())
    for schema in ("text", "hub_text", "labelled_text"):
        assert build_data_module.dispatch(DATA[schema]) is not build_data_module.dispatch(object)

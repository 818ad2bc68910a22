"""Every task, with each way to divide it: a step is the same, whatever passes and ranks its samples are spread over."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from flash_attn_train.cli import compose_config
from flash_attn_train.loggers import read_metrics
from flash_attn_train.run import train

_EPS = torch.finfo(torch.float32).eps
STEPS = 4
COMMON = [
    *("trainer.accelerator=cpu", f"trainer.max_steps={STEPS}", f"trainer.val_every_n_steps={STEPS}"),
    *("optimizer.lr=1e-2", "scheduler.warmup_steps=0", "checkpoint.every_n_steps=100"),
    *("logger.every_n_steps=1", "logger.tensorboard=false", "model.n_layer=2", "model.n_head=2"),
    "model.d_model=16",
]
BERT = ["model=bert", "model.max_seqlen=32", "model.dropout=0", "model.attn_dropout=0"]
TASKS = {
    # Documents of one and of many words, in which 1 and up to 5 tokens are hidden.
    "masked_lm": ["task=masked_lm", *BERT, "tokenizer.vocab_size=300", "trainer.val_sequences=8"],
    "sequence_classification": [
        *("task=sequence_classification", "data=labelled_text", *BERT),
        *("tokenizer.vocab_size=300", "data.val_fraction=0.2"),
    ],
    "image_classification": ["experiment=digits", "model.drop_path=0"],
    "packed_documents": [
        *("task=language_model", "model=llama", "model.max_seqlen=32", "task.documents=within"),
        *("tokenizer.vocab_size=300", "trainer.val_sequences=8"),
    ],
}
# On two ranks. The batch is that of a data-parallel rank.
STRATEGIES = {
    "ddp": ["trainer.batch_size=2"],
    "zero3": ["trainer.batch_size=4", "trainer.activation_checkpointing=layers"],
    "tensor_parallel": ["trainer.batch_size=8"],
}
RUNS = [(task, strategy) for task in TASKS for strategy in STRATEGIES]
MIXED = ["trainer.batch_size=4", "strategy=zero3", "trainer.precision=bf16-mixed"]

WORKER = """
import json
import sys

import torch
from flash_attn_train.cli import compose_config
from flash_attn_train.distributed import ending_process_group
from flash_attn_train.run import train

torch.set_num_threads(1)
with ending_process_group():
    for arguments in json.load(open(sys.argv[1])):
        train(compose_config(arguments))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Task -> where its data are."""
    folder = tmp_path_factory.mktemp("data")
    corpus = folder / "corpus"
    corpus.mkdir()
    for number in range(60):
        text = f"word {number}" if number % 2 else f"the dog {number} sees it " * 5
        (corpus / f"{number}.txt").write_text(text)
    rng = random.Random(0)
    words = ["good", "bad", "a", "film", "of", "some"]
    texts = [" ".join(rng.choices(words, k=rng.randint(2, 9))) for _ in range(80)]
    rows = [json.dumps({"text": text, "label": "good" if "good" in text else "bad"}) for text in texts]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    text_data = [f"data.path={corpus}", f"data.cache_dir={folder / 'cache'}", "data.val_fraction=0.2"]
    return {
        "masked_lm": text_data,
        "packed_documents": text_data,
        "sequence_classification": [f"data.path={folder / 'rows.jsonl'}"],
        "image_classification": [],
    }


def record(folder: Path) -> torch.Tensor:
    """Losses and gradient norms, (2, steps)."""
    rows = [row for row in read_metrics(folder / "metrics.csv") if "train/loss" in row]
    return torch.tensor([[row["train/loss"] for row in rows], [row["grad_norm"] for row in rows]])


@pytest.fixture(scope="module")
def whole(data: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The record of each task on one process, in one pass."""
    folder = tmp_path_factory.mktemp("whole")
    for task, arguments in TASKS.items():
        output = ["trainer.batch_size=8", f"output_dir={folder / task}"]
        train(compose_config([*arguments, *data[task], *COMMON, *output]))
    return {task: record(folder / task) for task in TASKS}


@pytest.fixture(scope="module")
def two_ranks(
    data: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory, launch: Callable[..., str]
) -> Path:
    """The folder of all runs of two ranks, under one torchrun."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "worker.py").write_text(WORKER)
    common = [*COMMON, "trainer.devices=2", "trainer.global_batch_size=8"]
    plan = [
        [
            *(*TASKS[task], *data[task], *common, *STRATEGIES[strategy]),
            *(f"strategy={strategy}", f"output_dir={folder / task / strategy}"),
        ]
        for task, strategy in RUNS
    ]
    plan += [
        [*TASKS[task], *data[task], *common, *MIXED, f"output_dir={folder / task / 'mixed'}"]
        for task in TASKS
    ]
    (folder / "plan.json").write_text(json.dumps(plan))
    launch(str(folder / "worker.py"), str(folder / "plan.json"), ranks=2)
    return folder


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Up to sums of few numbers in another order, whose rounding grows over the steps."""
    assert got.shape == expected.shape == (2, STEPS)
    difference = (got - expected).abs().amax(1)
    assert (difference <= 32 * STEPS * _EPS * expected.amax(1)).all(), difference


@pytest.mark.parametrize("task", TASKS)
def test_passes_are_one_batch(
    data: dict[str, list[str]], whole: dict[str, torch.Tensor], task: str, tmp_path: Path
) -> None:
    passes = ["trainer.batch_size=2", "trainer.global_batch_size=8", f"output_dir={tmp_path}/run"]
    train(compose_config([*TASKS[task], *data[task], *COMMON, *passes]))
    assert_same(record(tmp_path / "run"), whole[task])


@pytest.mark.parametrize(("task", "strategy"), RUNS)
def test_ranks_are_one_batch(
    two_ranks: Path, whole: dict[str, torch.Tensor], task: str, strategy: str
) -> None:
    assert_same(record(two_ranks / task / strategy), whole[task])


@pytest.mark.parametrize("task", TASKS)
def test_mixed_precision_of_ranks(two_ranks: Path, whole: dict[str, torch.Tensor], task: str) -> None:
    """Copies of the weights in bf16 travel; what is written at the end of a run is computed with them too."""
    got, expected = record(two_ranks / task / "mixed"), whole[task]
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 2 * torch.finfo(torch.bfloat16).eps * expected.max()
    assert (two_ranks / task / "mixed" / "sample.txt").exists() == (task == "packed_documents")

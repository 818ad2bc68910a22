"""What each task learns, in whole runs, and with each way of computing."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flash_attn_train.checkpoints import read_checkpoint
from flash_attn_train.configs import (
    AdamWConfig,
    BertModelConfig,
    CallbacksConfig,
    GPTModelConfig,
    HuggingFaceModelConfig,
    ImageClassificationConfig,
    LanguageModelConfig,
    MaskedLMConfig,
    SequenceClassificationConfig,
    TextDataConfig,
    TokenizerConfig,
    TrainConfig,
    ViTModelConfig,
)
from flash_attn_train.configs.callbacks import EMAConfig
from flash_attn_train.configs.data import LabelledTextDataConfig
from flash_attn_train.data import build_data
from flash_attn_train.models import DataSizes
from flash_attn_train.run import train
from flash_attn_train.tasks import (
    ImageClassification,
    LanguageModel,
    MaskedLM,
    SequenceClassification,
    Task,
    build_task,
)

BERT = BertModelConfig(max_seqlen=32, n_layer=2, n_head=2, d_model=32, dropout=0.0, attn_dropout=0.0)
VIT = ViTModelConfig(image_size=8, patch_size=4, channels=1, n_layer=1, n_head=2, d_model=16)


def make_task(task: Any, model: Any) -> Task:
    classes = 0 if isinstance(task, (LanguageModelConfig, MaskedLMConfig)) else 3
    module = build_task(TrainConfig(task=task, model=model), DataSizes(vocab_size=40, num_classes=classes))
    module.configure_model()
    return module


def test_the_config_chooses_the_task() -> None:
    assert type(make_task(LanguageModelConfig(), GPTModelConfig(n_layer=1))) is LanguageModel
    assert type(make_task(MaskedLMConfig(), BERT)) is MaskedLM
    assert type(make_task(SequenceClassificationConfig(), BERT)) is SequenceClassification
    assert type(make_task(ImageClassificationConfig(), VIT)) is ImageClassification


def test_masked_lm_in_training_and_validation_is_the_same_loss() -> None:
    """Of the masked tokens alone, whatever is under the padding."""
    task = make_task(MaskedLMConfig(), BERT)
    ids = torch.randint(0, 40, (3, 32))
    mask = torch.arange(32) < torch.tensor([[32], [20], [9]])
    labels = ids.where((torch.rand(3, 32) < 0.3) & mask, -100)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    in_training = task.step(batch)
    task.eval()
    output = task.step(batch)
    counted = labels != -100
    logits = task.model(ids, mask).logits
    expected = torch.nn.functional.cross_entropy(logits[counted].double(), labels[counted])
    for got in (in_training, output):
        torch.testing.assert_close(got.loss.double(), expected, rtol=1e-5, atol=1e-6)
        assert got.num_targets == counted.sum()
    assert output.logits is not None and output.logits.shape[0] == output.labels.shape[0] == counted.sum()

    batch["input_ids"] = ids.where(mask, 7)
    torch.testing.assert_close(task.step(batch).loss, output.loss)


def test_a_pass_without_hidden_tokens_adds_nothing() -> None:
    task = make_task(MaskedLMConfig(), BERT)
    ids = torch.randint(0, 40, (2, 32))
    batch = {"input_ids": ids, "attention_mask": ids >= 0, "labels": torch.full_like(ids, -100)}
    loss = task.training_step(batch, 0)
    loss.backward()
    assert loss == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in task.parameters())


@pytest.mark.parametrize(
    ("task", "model"),
    [
        (SequenceClassificationConfig(label_smoothing=0.5), BERT),
        (ImageClassificationConfig(label_smoothing=0.5), VIT),
    ],
)
def test_label_smoothing_is_for_training_only(task: Any, model: Any) -> None:
    module = make_task(task, model)
    labels = torch.tensor([0, 2, 1, -100])
    text = {"input_ids": torch.randint(0, 40, (4, 8)), "attention_mask": torch.ones(4, 8, dtype=torch.bool)}
    inputs = text if model is BERT else {"images": torch.randn(4, 1, 8, 8)}
    module.eval()
    output = module.step({**inputs, "labels": labels})
    assert output.logits is not None and output.num_targets == 3
    expected = torch.nn.functional.cross_entropy(output.logits, labels)
    torch.testing.assert_close(output.loss, expected)
    module.train()
    smoothed = torch.nn.functional.cross_entropy(output.logits, labels, label_smoothing=0.5)
    torch.testing.assert_close(module.step({**inputs, "labels": labels}).loss, smoothed)


def test_mixed_images_have_soft_labels() -> None:
    module = make_task(ImageClassificationConfig(), VIT)
    batch = {"images": torch.randn(4, 1, 8, 8), "labels": torch.rand(4, 3).softmax(-1)}
    output = module.step(batch)
    assert output.logits is not None and output.num_targets == 4
    expected = -(output.logits.log_softmax(-1) * batch["labels"]).sum(-1).mean()
    torch.testing.assert_close(output.loss, expected)


def test_masked_lm_learns_the_standard_library(
    small_config: Callable[..., TrainConfig], standard_library_cache: Path
) -> None:
    config = small_config(
        task=MaskedLMConfig(),
        model=BERT,
        data=TextDataConfig(cache_dir=str(standard_library_cache / "flash-attn-train")),
        tokenizer=TokenizerConfig(vocab_size=512),
        optimizer={"lr": 3e-3},
        trainer={"max_steps": 60, "batch_size": 16, "val_every_n_steps": 60, "val_sequences": 64},
        logger={"every_n_steps": 20},
        checkpoint={"every_n_steps": 60},
    )
    result = train(config)
    assert result.last_val_loss < result.first_val_loss - 0.8
    assert (
        result.sample == ""
        and "val/accuracy" in result.last_val
        and "val/bits_per_byte" not in result.last_val
    )


def test_sequence_classification_learns(small_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    """Which of two words is in the text."""
    rng = random.Random(0)
    rows = []
    for _ in range(600):
        label = rng.choice(["good", "bad"])
        words = [label, *(rng.choice(["a", "film", "of", "some", "kind"]) for _ in range(6))]
        rng.shuffle(words)
        rows.append({"text": " ".join(words), "label": label})
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    config = small_config(
        task=SequenceClassificationConfig(),
        model=dataclasses.replace(BERT, max_seqlen=16, n_layer=1),
        data=LabelledTextDataConfig(path=str(file), val_fraction=0.2),
        optimizer={"lr": 1e-2},
        trainer={"max_steps": 60, "batch_size": 16, "val_every_n_steps": 60, "val_sequences": None},
        logger={"every_n_steps": 20},
    )
    result = train(config)
    assert abs(result.first_val_loss - np.log(2)) < 0.2
    assert result.last_val["val/accuracy"] > 0.95


def test_documents_within_go_through_a_whole_run(
    small_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    """Of short documents; the loss is another than across them, and that of each document by itself."""
    file = tmp_path / "short.jsonl"
    texts = [f"{'abc' * (number % 3)} text {number}" for number in range(400)]
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    losses = {}
    for documents in ("across", "within"):
        config = small_config(
            output_dir=str(tmp_path / documents),
            data=TextDataConfig(path=str(file), val_fraction=0.2, cache_dir=str(tmp_path / "cache")),
            task=LanguageModelConfig(documents=documents),
            model={"initializer_range": 0.2},
            trainer={"val_sequences": 16},
        )
        result = train(config)
        losses[documents] = result.last_val_loss
        assert result.last_val_loss < result.first_val_loss
    assert abs(losses["across"] - losses["within"]) > 1e-4

    # The last validation once more, document by document.
    data = build_data(config)
    task = build_task(config, DataSizes(vocab_size=data.vocab_size))
    task.configure_model()
    task.load_state_dict(read_checkpoint(result.last_checkpoint)["state_dict"])
    batch = data.validation_samples.batch(np.arange(16))
    inputs, labels = batch["input_ids"].flatten(), batch["labels"].flatten()
    bounds = batch["cu_seqlens"].tolist()
    assert len(bounds) > 20
    total = 0.0
    with torch.no_grad():
        for start, stop in itertools.pairwise(bounds):
            alone = {"input_ids": inputs[None, start:stop], "labels": labels[None, start:stop]}
            total += (stop - start) * task.step(alone).loss.item()
    assert losses["within"] == pytest.approx(total / len(labels), rel=1e-5)


def test_model_of_transformers_learns_as_ours_does(
    small_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    """From the same weights, with the same data and optimizer, to the same loss."""
    transformers = pytest.importorskip("transformers", reason="a model of transformers")
    shape = {
        "n_layer": 1,
        "n_head": 2,
        "n_embd": 16,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }
    vocab_size = build_data(small_config()).vocab_size
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=vocab_size, n_positions=16, **shape, bos_token_id=0, eos_token_id=0
        )
    )
    theirs.save_pretrained(tmp_path / "weights")
    # No weight decay, which names of parameters decide on, and a second output in each of the folders.
    common = {"optimizer": AdamWConfig(lr=1e-2, weight_decay=0.0), "trainer": {"max_steps": 12}}
    ours = train(
        small_config(
            output_dir=str(tmp_path / "ours"), model={"warm_start": str(tmp_path / "weights")}, **common
        )
    )
    model = HuggingFaceModelConfig(config=shape, max_seqlen=16, warm_start=str(tmp_path / "weights"))
    other = train(small_config(output_dir=str(tmp_path / "theirs"), model=model, **common))
    assert ours.first_val_loss == pytest.approx(other.first_val_loss, rel=1e-5)
    assert ours.last_val_loss == pytest.approx(other.last_val_loss, rel=1e-3)
    assert ours.last_val_loss < ours.first_val_loss - 0.3


@pytest.mark.parametrize("averaged", [False, True])
def test_warm_start_from_a_run(
    small_config: Callable[..., TrainConfig], tmp_path: Path, averaged: bool
) -> None:
    """With the weights that its last validation had."""
    watching = CallbacksConfig(ema=EMAConfig(enabled=averaged, decay=0.5))
    first = train(small_config(optimizer={"lr": 1e-2}, trainer={"max_steps": 12}, callbacks=watching))
    weights = {"warm_start": str(first.folder)}
    second = train(small_config(output_dir=str(tmp_path / "second"), model=weights))
    assert second.first_val_loss == pytest.approx(first.last_val_loss, rel=1e-6)
    assert second.last_val_loss < first.first_val_loss

    shutil.rmtree(first.folder)  # what is continued no longer needs its first weights
    again = train(
        small_config(output_dir=str(second.folder), model=weights, resume=str(second.best_checkpoint))
    )
    assert again.last_val_loss == second.last_val_loss


def test_bf16_true(small_config: Callable[..., TrainConfig]) -> None:
    result = train(small_config(trainer={"precision": "bf16-true"}, optimizer={"lr": 1e-2}))
    weights = read_checkpoint(result.last_checkpoint)["state_dict"]
    assert {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()} == {torch.bfloat16}
    assert result.last_val_loss < result.first_val_loss


@pytest.mark.parametrize(
    ("task", "model"),
    [
        (LanguageModelConfig(), {"n_layer": 2, "dropout": 0.1}),
        (LanguageModelConfig(documents="within"), {"n_layer": 2}),
        (MaskedLMConfig(), BERT),
    ],
)
def test_activation_checkpointing_changes_no_bit(
    small_config: Callable[..., TrainConfig], tmp_path: Path, task: Any, model: Any
) -> None:
    states = []
    for checkpointing in ("none", "layers"):
        config = small_config(
            output_dir=str(tmp_path / checkpointing),
            task=task,
            model=model,
            trainer={"max_steps": 3, "activation_checkpointing": checkpointing},
        )
        states.append(read_checkpoint(train(config).last_checkpoint)["state_dict"])
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


@pytest.mark.slow
@pytest.mark.parametrize("documents", ["across", "within"])
def test_compiled_layers_train_to_the_same_loss(
    small_config: Callable[..., TrainConfig], tmp_path: Path, documents: str
) -> None:
    losses, names = [], []
    for compiled in (False, True):
        config = small_config(
            output_dir=str(tmp_path / str(compiled)),
            task=LanguageModelConfig(documents=documents),
            trainer={"max_steps": 3, "compile": compiled},
        )
        result = train(config)
        losses.append(result.last_val_loss)
        names.append(list(read_checkpoint(result.last_checkpoint)["state_dict"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert names[0] == names[1]

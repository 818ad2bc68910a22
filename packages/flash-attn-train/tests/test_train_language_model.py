"""The language-model task, from a config, on batches of the data module."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from flash_attn_models.gpt import GPTLMHeadModel
from flash_attn_train.configs import (
    AdamWConfig,
    CosineConfig,
    GPTModelConfig,
    HuggingFaceModelConfig,
    LanguageModelConfig,
    TrainConfig,
    TrainerConfig,
)
from flash_attn_train.data import DataFacts, DataModule
from flash_attn_train.data.language_model import LanguageModelSamples
from flash_attn_train.data.tokens import Tokens
from flash_attn_train.data.windows import TrainWindows, ValidationWindows
from flash_attn_train.models import DataSizes
from flash_attn_train.tasks import LanguageModel, build_task

VOCAB, SEQLEN, END = 50, 8, 0
MODEL = GPTModelConfig(max_seqlen=SEQLEN, n_layer=2, n_head=2, d_model=32)
# The same in transformers' words.
GPT2 = {"n_layer": 2, "n_head": 2, "n_embd": 32, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def make_config(**trainer: Any) -> TrainConfig:
    return TrainConfig(
        model=MODEL,
        optimizer=AdamWConfig(lr=1e-2),
        scheduler=CosineConfig(warmup_steps=2, decay_steps=60, min_lr_ratio=0.1),
        trainer=TrainerConfig(**{"batch_size": 2, "val_sequences": None, **trainer}),
    )


def make_task(config: TrainConfig | None = None) -> LanguageModel:
    task = build_task(config or make_config(), DataSizes(vocab_size=VOCAB))
    assert isinstance(task, LanguageModel)
    task.configure_model()
    return task


def make_data(tokens: np.ndarray, config: TrainConfig) -> DataModule:
    """Trains and validates on the same tokens."""
    stream = Tokens([tokens.astype(np.uint16)])
    train = LanguageModelSamples(TrainWindows(stream, seqlen=SEQLEN, seed=0))
    validation = LanguageModelSamples(ValidationWindows(stream, seqlen=SEQLEN))
    return DataModule(train, validation, DataFacts(key="", lines={}, vocab_size=VOCAB), config)


def make_trainer(config: TrainConfig, **options: Any) -> pl.Trainer:
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": -1,
        "max_steps": config.trainer.max_steps,
        "accumulate_grad_batches": config.trainer.accumulate_grad_batches,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "inference_mode": False,
    }
    return pl.Trainer(**{**defaults, **options})


def random_tokens(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB, count)


def make_batch(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]}


def negative_log_probability(task: LanguageModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of every target, (B,S) float64; nan where one does not count."""
    log_probabilities = task.model(batch["input_ids"])
    log_probabilities = getattr(log_probabilities, "logits", log_probabilities).double().log_softmax(-1)
    counts = batch["labels"] != -100
    picked = log_probabilities.gather(-1, batch["labels"].where(counts, 0)[..., None])[..., 0]
    return -picked.where(counts, math.nan)


@pytest.mark.parametrize("kind", ["ours", "transformers"])
def test_loss_is_the_mean_negative_log_probability_of_the_next_token(kind: str) -> None:
    config = make_config()
    if kind == "transformers":
        pytest.importorskip("transformers")
        config.model = HuggingFaceModelConfig(model_type="gpt2", config=GPT2, max_seqlen=SEQLEN)
    task = make_task(config)
    batch = make_batch(torch.randint(0, VOCAB, (3, SEQLEN + 1)))
    batch["labels"] = batch["labels"].clone()
    batch["labels"][1, 2:5] = -100
    output = task.step(batch)
    expected = negative_log_probability(task, batch).nanmean()
    torch.testing.assert_close(output.loss.double(), expected, rtol=1e-6, atol=1e-6)
    assert output.num_targets == 3 * SEQLEN - 3


def test_untrained_loss_is_near_uniform() -> None:
    loss = make_task().step(make_batch(torch.randint(0, VOCAB, (16, SEQLEN + 1)))).loss.item()
    assert abs(loss - math.log(VOCAB)) < 0.2


def test_weights_depend_on_the_seed_alone() -> None:
    weights = []
    for seed, drawn in ((0, 0), (0, 5), (1, 0)):
        torch.rand(drawn)
        task = make_task(dataclasses.replace(make_config(), seed=seed))
        weights.append(torch.cat([p.detach().flatten() for p in task.parameters()]))
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_documents_within_are_as_separate_texts() -> None:
    """Attention and positions inside documents: loss and gradients are those of each document alone."""
    rng = np.random.default_rng(0)
    rows = rng.integers(1, VOCAB, (2, SEQLEN + 1))
    rows[0, 3] = rows[1, 0] = rows[1, 6] = END
    config = make_config()
    config.task = LanguageModelConfig(documents="within")
    task = make_task(config)
    stream = Tokens([np.append(rows[0, :-1], rows[1]).astype(np.uint16)])
    batch = LanguageModelSamples(ValidationWindows(stream, seqlen=SEQLEN), end_of_text=END).batch(
        np.arange(2)
    )
    output = task.step(batch)
    output.loss.backward()
    packed = [p.grad.clone() for p in task.parameters() if p.grad is not None]

    task.zero_grad()
    inputs, labels = batch["input_ids"].flatten(), batch["labels"].flatten()
    bounds = batch["cu_seqlens"].tolist()
    assert len(bounds) == 2 + 2 + 1  # a document in each row more than rows
    losses = []
    for start, stop in itertools.pairwise(bounds):
        alone = {"input_ids": inputs[None, start:stop], "labels": labels[None, start:stop]}
        losses.append(negative_log_probability(task, alone).sum())
    loss = torch.stack(losses).sum() / labels.numel()
    loss.backward()
    torch.testing.assert_close(output.loss.double(), loss, rtol=1e-6, atol=1e-6)
    for got, parameter in zip(packed, task.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad, rtol=1e-4, atol=1e-6)
    across = task.step({name: batch[name] for name in ("input_ids", "labels")}).loss
    assert abs(across - output.loss) > 1e-4


def test_overfits_one_batch() -> None:
    tokens = random_tokens(SEQLEN + 1)  # as many tokens as one window: every batch holds this one window
    config = make_config(max_steps=60)
    task = make_task(config)
    make_trainer(config, gradient_clip_val=1.0).fit(task, make_data(tokens, config))
    assert task.step(make_batch(torch.from_numpy(tokens)[None])).loss.item() < 0.05


def test_validation_loss_is_weighted_by_tokens() -> None:
    config = make_config(batch_size=6)
    config.model = dataclasses.replace(MODEL, initializer_range=0.5)  # losses that differ
    data = make_data(random_tokens(SEQLEN * 7 + 1), config)
    task, trainer = make_task(config), make_trainer(config, limit_val_batches=1.0)
    trainer.validate(task, data, verbose=False)
    logged = trainer.callback_metrics["val/loss"].item()
    with torch.no_grad():
        outputs = [task.step(batch) for batch in data.val_dataloader()]
        windows = data.validation_samples.batch(np.arange(7))
        of_all_tokens = negative_log_probability(task, windows).mean().item()
    assert [int(output.num_targets) for output in outputs] == [3 * SEQLEN, 4 * SEQLEN]
    assert logged == pytest.approx(of_all_tokens, rel=1e-6)
    of_batches = sum(output.loss.item() for output in outputs) / 2
    assert abs(of_batches - of_all_tokens) > 1e-3
    assert trainer.callback_metrics["val/perplexity"].item() == pytest.approx(math.exp(logged), rel=1e-6)


def test_gradients_are_clipped_and_their_norm_is_kept() -> None:
    norms = []

    class AfterClipping(pl.Callback):
        def on_before_zero_grad(
            self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: object
        ) -> None:
            gradients = [p.grad for p in module.parameters() if p.grad is not None]
            if gradients:
                norms.append(torch.nn.utils.get_total_norm(gradients).item())

    config = make_config(max_steps=3)
    task = make_task(config)
    trainer = make_trainer(config, gradient_clip_val=0.01, callbacks=[AfterClipping()])
    trainer.fit(task, make_data(random_tokens(500), config))
    assert norms and max(norms) <= 0.01 * (1 + 1e-4)
    assert task.grad_norm is not None and task.grad_norm.item() > 0.01


def test_learning_rate_follows_the_schedule() -> None:
    rates = []

    class Rates(pl.Callback):
        def on_before_optimizer_step(self, trainer: pl.Trainer, module: object, optimizer: object) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    config = make_config(max_steps=4, accumulate_grad_batches=2)
    config.optimizer.lr = 0.5
    make_trainer(config, callbacks=[Rates()]).fit(make_task(config), make_data(random_tokens(500), config))
    assert rates[:3] == pytest.approx([0.25, 0.5, 0.5])
    assert len(rates) == 4 and rates[3] < 0.5


def test_accumulated_batches_are_one_large_batch() -> None:
    weights = []
    for batch_size, accumulate in ((8, 1), (2, 4)):
        config = make_config(max_steps=3, batch_size=batch_size, accumulate_grad_batches=accumulate)
        task = make_task(config)
        make_trainer(config).fit(task, make_data(random_tokens(500), config))
        weights.append(torch.cat([p.detach().flatten() for p in task.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-4)


def test_same_weights_in_transformers_have_the_same_loss(tmp_path: Path) -> None:
    """What runs are compared with computes what our model computes, and its weights are a start for ours."""
    pytest.importorskip("transformers")
    config = make_config()
    config.model = HuggingFaceModelConfig(model_type="gpt2", config=GPT2, max_seqlen=SEQLEN)
    theirs = make_task(config)
    theirs.model.save_pretrained(tmp_path)
    config.model = dataclasses.replace(MODEL, warm_start=str(tmp_path))
    ours = make_task(config)
    assert isinstance(ours.model, GPTLMHeadModel)
    batch = make_batch(torch.randint(0, VOCAB, (4, SEQLEN + 1)))
    torch.testing.assert_close(theirs.step(batch).loss, ours.step(batch).loss, rtol=1e-5, atol=1e-6)
    assert abs(ours.step(batch).loss - make_task().step(batch).loss) > 1e-4

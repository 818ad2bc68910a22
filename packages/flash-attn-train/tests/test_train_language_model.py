"""The Lightning task."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from flash_attn_models.gpt import GPTConfig
from flash_attn_train.configs import OptimizerConfig
from flash_attn_train.data import TokenDataModule
from flash_attn_train.optim import warmup_cosine
from flash_attn_train.tasks import LanguageModel

SHAPE = GPTConfig(vocab_size=50, max_seqlen=8, n_layer=2, n_head=2, d_model=32)
SCHEDULE = functools.partial(warmup_cosine, warmup_steps=2, decay_steps=60, min_lr_ratio=0.1)


def task(lr: float = 1e-2, shape: GPTConfig = SHAPE) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(shape, OptimizerConfig(lr=lr), SCHEDULE)


def quiet_trainer(**options: object) -> pl.Trainer:
    defaults = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": -1,
        "num_sanity_val_steps": 0,
        "inference_mode": False,
    }
    return pl.Trainer(**{**defaults, **options})  # type: ignore[arg-type]


def test_loss_is_the_mean_negative_log_probability_of_the_next_token() -> None:
    module = task()
    batch = torch.randint(0, 50, (3, 9))
    log_probabilities = module(batch[:, :-1]).double().log_softmax(-1)
    expected = -log_probabilities.gather(-1, batch[:, 1:, None]).mean()
    torch.testing.assert_close(module.loss(batch).double(), expected, rtol=1e-6, atol=1e-6)


def test_untrained_loss_is_near_uniform() -> None:
    loss = task().loss(torch.randint(0, 50, (16, 9))).item()
    assert abs(loss - math.log(50)) < 0.2


def test_overfits_one_batch() -> None:
    tokens = np.random.default_rng(0).integers(0, 50, 9 * 4).astype(np.uint16)
    # As many tokens as one window: every batch holds this one window.
    data = TokenDataModule(tokens[:9], tokens[:9], seqlen=8, batch_size=2)
    module = task()
    trainer = quiet_trainer(max_steps=60, gradient_clip_val=1.0)
    trainer.fit(module, data)
    assert module.loss(torch.from_numpy(tokens[:9].astype(np.int64))[None]).item() < 0.05


def test_validation_loss_is_weighted_by_tokens() -> None:
    tokens = np.random.default_rng(0).integers(0, 50, 8 * 7 + 1).astype(np.uint16)
    data = TokenDataModule(tokens, tokens, seqlen=8, batch_size=6)
    batches = [data.validation_batches[0], data.validation_batches[1]]
    assert [len(batch) for batch in batches] == [6, 1]
    module, trainer = task(), quiet_trainer()
    trainer.validate(module, data, verbose=False)
    logged = trainer.callback_metrics["val/loss"].item()
    with torch.no_grad():
        of_all_tokens = module.loss(torch.cat(batches)).item()
        of_batches = sum(module.loss(batch).item() for batch in batches) / 2
    assert logged == pytest.approx(of_all_tokens, rel=1e-6)
    assert abs(of_batches - of_all_tokens) > 1e-3


def test_gradients_are_clipped_and_their_norm_is_kept() -> None:
    tokens = np.random.default_rng(0).integers(0, 50, 500).astype(np.uint16)
    norms = []

    class AfterClipping(pl.Callback):
        def on_before_zero_grad(
            self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: object
        ) -> None:
            gradients = [p.grad for p in module.parameters() if p.grad is not None]
            if gradients:
                norms.append(torch.nn.utils.get_total_norm(gradients).item())

    module = task()
    trainer = quiet_trainer(max_steps=3, gradient_clip_val=0.01, callbacks=[AfterClipping()])
    trainer.fit(module, TokenDataModule(tokens, tokens, seqlen=8, batch_size=4))
    assert norms and max(norms) <= 0.01 * (1 + 1e-4)
    assert module.grad_norm is not None and module.grad_norm.item() > 0.01


def test_learning_rate_follows_the_schedule() -> None:
    tokens = np.random.default_rng(0).integers(0, 50, 500).astype(np.uint16)
    rates = []

    class Rates(pl.Callback):
        def on_before_optimizer_step(self, trainer: pl.Trainer, module: object, optimizer: object) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    module = task(lr=0.5)
    quiet_trainer(max_steps=4, accumulate_grad_batches=2, callbacks=[Rates()]).fit(
        module, TokenDataModule(tokens, tokens, seqlen=8, batch_size=2)
    )
    assert rates[:3] == pytest.approx([0.25, 0.5, 0.5])
    assert len(rates) == 4 and rates[3] < 0.5


def test_accumulated_batches_are_one_large_batch() -> None:
    tokens = np.random.default_rng(0).integers(0, 50, 500).astype(np.uint16)
    weights = []
    for batch_size, accumulate in ((8, 1), (2, 4)):
        module = task()
        trainer = quiet_trainer(max_steps=3, accumulate_grad_batches=accumulate)
        trainer.fit(module, TokenDataModule(tokens, tokens, seqlen=8, batch_size=batch_size))
        weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-4)

"""Next-token prediction with a GPT."""

from __future__ import annotations

import functools
from typing import Any

import pytorch_lightning as pl
import torch
from flash_attn_models.gpt import GPTConfig, GPTLMHeadModel
from flash_attn_models.loss import cross_entropy

from flash_attn_train.configs import OptimizerConfig, SchedulerConfig
from flash_attn_train.optim import param_groups, warmup_cosine


class LanguageModel(pl.LightningModule):
    """GPT with cross-entropy on the next token, AdamW, warmup and cosine.

    Batches are (B, S + 1) int64: the first S tokens are inputs, the last S are targets. The losses are means
    over tokens, in nats.

    Args:
        model_config: shape of the GPT.
        optimizer, scheduler: see the config classes; the scheduler's ``warmup_steps`` and ``decay_steps``
            must be set.
    """

    def __init__(
        self, model_config: GPTConfig, optimizer: OptimizerConfig, scheduler: SchedulerConfig
    ) -> None:
        super().__init__()
        if scheduler.warmup_steps is None or scheduler.decay_steps is None:
            raise ValueError(
                f"scheduler: got {scheduler}, expected warmup_steps and decay_steps to be numbers."
            )
        self.model = GPTLMHeadModel(model_config)
        self.optimizer_config, self.scheduler_config = optimizer, scheduler
        self.grad_norm: torch.Tensor | None = None  # of the last optimizer step, before clipping

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token ids (B, S) -> logits (B, S, V)."""
        return self.model(input_ids)

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        logits = self(batch[:, :-1])
        return cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.loss(batch)

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        # Lightning's mean over the epoch is weighted with batch_size: tokens, so that a smaller last batch
        # counts less.
        self.log("val/loss", self.loss(batch), on_epoch=True, logger=False, batch_size=batch[:, 1:].numel())

    def configure_optimizers(self) -> dict[str, Any]:
        config, schedule = self.optimizer_config, self.scheduler_config
        # The fused step un-scales fp16 gradients itself, after the clipping; only there the plain one must be
        # used.
        fused = self.trainer.precision != "16-mixed"
        optimizer = torch.optim.AdamW(
            param_groups(self.model, config.weight_decay),
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=fused,
        )
        factor = functools.partial(
            warmup_cosine,
            warmup_steps=schedule.warmup_steps,
            decay_steps=schedule.decay_steps,
            min_lr_ratio=schedule.min_lr_ratio,
        )
        lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": lr_scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        # Lightning's own clipping neither returns the norm nor accepts a fused optimizer under autocast.
        self.grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val or float("inf"))

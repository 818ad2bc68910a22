"""Next-token prediction with a GPT."""

from __future__ import annotations

from collections.abc import Callable

import pytorch_lightning as pl
import torch
from flash_attn_models.gpt import GPTConfig, GPTLMHeadModel
from flash_attn_models.loss import cross_entropy
from pytorch_lightning.utilities.types import OptimizerLRScheduler

from flash_attn_train.configs import OptimizerConfig
from flash_attn_train.optim import param_groups


class LanguageModel(pl.LightningModule):
    """GPT with cross-entropy on the next token, and AdamW.

    Batches are (B, S + 1) int64: the first S tokens are inputs, the last S are targets. The losses are means
    over tokens, in nats.

    Args:
        model_config: shape of the GPT.
        optimizer: peak learning rate and the other settings of AdamW.
        schedule: factor on the learning rate as a function of the number of the optimizer step, from 0.
    """

    def __init__(
        self, model_config: GPTConfig, optimizer: OptimizerConfig, schedule: Callable[[int], float]
    ) -> None:
        super().__init__()
        self.model = GPTLMHeadModel(model_config)
        self.optimizer_config, self.schedule = optimizer, schedule
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

    def configure_optimizers(self) -> OptimizerLRScheduler:
        config = self.optimizer_config
        optimizer = torch.optim.AdamW(
            param_groups(self.model, config.weight_decay),
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            # The fused step un-scales fp16 gradients itself, which is after clipping: too late.
            fused=self.trainer.precision != "16-mixed",
        )
        lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": lr_scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        # Lightning's own clipping neither returns the norm nor accepts a fused optimizer under autocast.
        self.grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val or float("inf"))

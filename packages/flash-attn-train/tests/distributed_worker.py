"""What the tests of distributed training run on every rank: ``distributed_worker.py PLAN.json``.

The plan is a list of runs. Each trains the same tiny GPT on the same samples; rank 0 writes the losses of its steps
and what else the run found out to the file that it names.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from flash_attn_models.gpt import GPTConfig, GPTLMHeadModel
from flash_attn_train.callbacks.checkpoint import RunCheckpoint
from flash_attn_train.checkpoints import AtomicCheckpointIO
from flash_attn_train.configs.model import GPTModelConfig
from flash_attn_train.configs.schema import TrainConfig, TrainerConfig
from flash_attn_train.configs.strategy import STRATEGIES
from flash_attn_train.distributed import (
    build_strategy,
    clip_gradients,
    data_parallel_rank,
    distribute_optimizer,
    ending_process_group,
    from_all_ranks,
    model_options,
    on_rank_zero,
    parallelize,
)
from flash_attn_train.models import DataSizes
from flash_attn_train.tasks.initial_model import initial_model
from torch.distributed.tensor import DTensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, IterableDataset

GLOBAL_BATCH, SEQLEN, VOCAB = 4, 8, 50
SHAPE: dict[str, Any] = {
    "max_seqlen": SEQLEN,
    "n_layer": 2,
    "n_head": 4,
    "n_head_kv": 2,
    "d_model": 32,
    "position": "rotary",
}
MODEL = GPTConfig(vocab_size=VOCAB, **SHAPE)


class Samples(IterableDataset):
    """Sample n depends on n alone."""

    def __init__(self, first_step: int, micro_batch: int, rank: int, ranks: int) -> None:
        self.first_step, self.micro_batch, self.rank, self.ranks = first_step, micro_batch, rank, ranks

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        ordinal = self.first_step * GLOBAL_BATCH + self.rank * self.micro_batch
        while True:
            rows = [self.sample(ordinal + i) for i in range(self.micro_batch)]
            tokens = torch.stack(rows)
            yield {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]}
            ordinal += self.ranks * self.micro_batch

    def sample(self, ordinal: int) -> torch.Tensor:
        return torch.randint(VOCAB, (SEQLEN + 1,), generator=torch.Generator().manual_seed(ordinal))


class TinyTask(pl.LightningModule):
    def __init__(self, config: TrainConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.config, self.dropout = config, dropout
        self.losses: list[torch.Tensor] = []
        self.norms: list[float] = []
        self.copies: dict[str, torch.Tensor] = {}

    def configure_model(self) -> None:
        if hasattr(self, "model"):
            return
        if self.config.model.warm_start is not None:
            self.model = initial_model(self.config, DataSizes(VOCAB), self.device_mesh)
            return
        torch.manual_seed(0)
        shape = dataclasses.replace(MODEL, dropout=self.dropout)
        model = GPTLMHeadModel(shape, **model_options(self.config.strategy, self.device_mesh))
        self.model = parallelize(model, self.config, self.device_mesh)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # As a callback that averages weights does.
        checkpoint["copies"] = {name: _gathered(p) for name, p in self.named_parameters()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.copies = checkpoint["copies"]

    def on_train_start(self) -> None:
        for name, parameter in self.named_parameters():
            if self.copies:
                torch.testing.assert_close(self.copies[name], _gathered(parameter), rtol=0, atol=0)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        here = (self.config.output_dir, self.trainer.global_step, self.trainer.global_rank)
        if here == ("stop", 2, 1):
            os.kill(os.getpid(), signal.SIGTERM)  # one rank alone learns of it
        if here[0].startswith("SIG") and here[1] == 2:
            signal.raise_signal(signal.Signals[here[0]])
        if self.config.output_dir == "error" and self.trainer.global_step == 3 and batch_idx % 2:
            raise RuntimeError("planned")
        loss = self.model.loss(batch["input_ids"], batch["labels"])
        self.losses.append(loss.detach().clone())
        return loss

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.model.loss(batch["input_ids"], batch["labels"]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        optimizer = distribute_optimizer(AdamW(groups, lr=1e-2), self.trainer.strategy)
        schedule = LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        self.norms.append(float(clip_gradients(self.model, 0.5, self.device_mesh)))

    def train_dataloader(self) -> DataLoader:
        rank, ranks = data_parallel_rank(self.trainer)
        settings = self.config.trainer
        return DataLoader(
            Samples(self.trainer.global_step, settings.batch_size, rank, ranks), batch_size=None
        )

    def val_dataloader(self) -> DataLoader:
        return DataLoader([next(iter(Samples(100, 2, 0, 1)))], batch_size=None)


def _gathered(parameter: torch.Tensor) -> torch.Tensor:
    """Whole, where FSDP2 has cut it."""
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().clone()


def run(
    *,
    strategy: str,
    folder: str,
    devices: int = 1,
    steps: int = 3,
    options: dict[str, Any] | None = None,
    trainer_options: dict[str, Any] | None = None,
    resume: str | None = None,
    mode: str = "",
    dropout: float = 0.0,
    every_n_steps: int = 100,
    save: dict[str, Any] | None = None,
    precision: str = "32-true",
    warm_start: str | None = None,
) -> dict[str, Any]:
    """One run; returns losses, means over the data-parallel ranks, and gradient norms of its steps."""
    chosen = STRATEGIES[strategy](**(options or {}))
    shared = getattr(chosen, "tensor_parallel_size", 1)
    settings = {"batch_size": GLOBAL_BATCH // (devices // shared), "accumulate_grad_batches": 1}
    settings.update(trainer_options or {})
    config = TrainConfig(
        output_dir=mode,
        strategy=chosen,
        model=GPTModelConfig(**SHAPE, warm_start=warm_start),
        trainer=TrainerConfig(
            devices=devices, accelerator="cpu", precision="32-true", max_steps=steps, **settings
        ),
    )
    task = TinyTask(config, dropout)
    checkpoints = Path(folder)
    saving = RunCheckpoint(
        checkpoints / "last.ckpt",
        checkpoints / "best.ckpt",
        every_n_steps=every_n_steps,
        val_every_n_steps=100,
        config={"seed": 0},
        data_key="",
        **(save or {}),
    )
    accumulate = config.trainer.accumulate_grad_batches
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=build_strategy(config.strategy, config),
        precision=precision,
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        val_check_interval=steps * accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        inference_mode=False,
        logger=False,
        callbacks=[saving],
        plugins=[AtomicCheckpointIO()],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        use_distributed_sampler=False,
    )
    outcome: dict[str, Any] = {"exit": None, "error": None}
    try:
        trainer.fit(task, ckpt_path=resume, weights_only=True)
    except SystemExit as stop:
        outcome["exit"] = stop.code
    except RuntimeError as error:
        outcome["error"] = str(error)
    losses = torch.stack(task.losses) if task.losses else torch.zeros(0)
    if dist.is_initialized():
        dist.all_reduce(losses)  # tensor-parallel ranks have the same ones
        losses /= dist.get_world_size()
    losses = losses.view(-1, accumulate).mean(1) if outcome["error"] is None else losses
    names = [name for name, _ in task.state_dict().items()]
    return {
        **outcome,
        "losses": losses.tolist(),
        "norms": task.norms,
        "names": names,
        "step": trainer.global_step,
        "local": sum(
            p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in task.parameters()
        ),
    }


def decisions() -> dict[str, Any]:
    """What ranks see of a function that runs on rank 0."""
    calls: list[int] = []

    def decide() -> str:
        calls.append(1)
        return "decided"

    def fail() -> None:
        raise FileNotFoundError("only rank 0 looked")

    seen: dict[str, Any] = {"value": on_rank_zero(decide), "calls": len(calls)}
    try:
        on_rank_zero(fail)
    except FileNotFoundError as error:
        seen["error"] = str(error)
    return seen


def main(plan: Path) -> None:
    # Before Lightning has made a process group, which under torchrun is then the one made here.
    seen = decisions()
    for number, entry in enumerate(json.loads(plan.read_text())):
        outcome = {**run(**entry), "decided": from_all_ranks(seen)}
        outcome["local"] = from_all_ranks(outcome["local"])
        if dist.get_rank() == 0:
            (plan.parent / f"{plan.stem}-{number}.json").write_text(json.dumps(outcome))


if __name__ == "__main__":
    torch.set_num_threads(1)
    with ending_process_group():
        main(Path(sys.argv[1]))

"""One training run, from config to result."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from flash_attn_models.gpt import GPTLMHeadModel
from torch import nn

from flash_attn_train.atomic import atomic_write
from flash_attn_train.callbacks import Metrics, WatchedRun, build_callbacks
from flash_attn_train.checkpoints import check_has_config, check_same_config, check_same_data, read_header
from flash_attn_train.configs import TrainConfig, check_config, check_read
from flash_attn_train.configs.store import describe_entries
from flash_attn_train.console import duration, say
from flash_attn_train.data import DataModule, build_data
from flash_attn_train.data.module import StreamSource
from flash_attn_train.device import resolve, resolve_epochs
from flash_attn_train.distributed import build_strategy, data_parallel_size, is_rank_zero, on_rank_zero
from flash_attn_train.errors import OutputError
from flash_attn_train.folder_lock import FolderLock
from flash_attn_train.label_names import LabelNames, write_label_names
from flash_attn_train.models import DataSizes, build_model
from flash_attn_train.preflight import check_machine, check_run
from flash_attn_train.report import write_report
from flash_attn_train.run_folder import (
    RunFolder,
    choose_run_folder,
    write_config,
    write_manifest,
    writing_into,
)
from flash_attn_train.sample import write_sample
from flash_attn_train.summary import RunResult, describe_run, result_of
from flash_attn_train.tasks import Task, build_task
from flash_attn_train.trainer import build_trainer, quiet_lightning


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        folder: of the run.
        checkpoint: that it continues; None for a new run.
        header: of the checkpoint, what tells whether it can be continued: "config", "data_key" and "global_step".
    """

    folder: Path
    checkpoint: Path | None = None
    header: Mapping[str, Any] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """Optimizer steps that are done already."""
        return self.header.get("global_step", 0)


def train(config: TrainConfig) -> RunResult:
    """Trains, or continues training, as the config says, and prints what it does as it goes.

    Whatever can be found wrong before training is found before anything is written to the run folder. With several
    processes all of them call this; the first one prints and writes, and its result is complete.

    Raises:
        UserError: see :mod:`flash_attn_train.errors`.
    """
    started = time.perf_counter()
    check_config(config)
    check_read(config)
    config = resolve(config)
    start = on_rank_zero(lambda: _find_start(config), accelerator=config.trainer.accelerator)
    folder = RunFolder(start.folder)
    check_machine(config)
    strategy = build_strategy(config.strategy, config)
    data = build_data(config)
    if config.trainer.max_epochs is not None:
        assert not isinstance(data.train_samples, StreamSource)  # check_config refuses it
        config = resolve_epochs(config, len(data.train_samples))
        if start.checkpoint is not None:
            check_same_config(start.checkpoint, start.header, config)
    if start.checkpoint is not None:
        check_same_data(start.checkpoint, start.header, config, data.key)

    pl.seed_everything(config.seed, workers=True, verbose=False)
    sizes = DataSizes(vocab_size=data.vocab_size, num_classes=data.num_classes)
    from_here = config if start.checkpoint is None else _without_warm_start(config)
    task = build_task(from_here, sizes)
    with torch.device("meta"):
        model = build_model(config.model, sizes)
    check_run(from_here, model, data)
    metrics, callbacks = build_callbacks(config.callbacks, _watched(config, folder, data))
    if data.label_names:
        callbacks.append(LabelNames(data.label_names))
    facts = _describe(config, task, data, model)
    if is_rank_zero():
        for name, value in facts.items():
            say(f"{name:<10} {value}")
    lock = FolderLock(folder)
    with lock, quiet_lightning():
        on_rank_zero(
            lambda: _start_folder(lock, start, config, data, {"first_step": start.step, **facts}),
            accelerator=config.trainer.accelerator,
        )
        trainer = build_trainer(config, folder, callbacks, strategy, data_key=data.key, first_step=start.step)
        if start.checkpoint is None:
            trainer.validate(task, data, verbose=False)
        trainer.fit(task, data, ckpt_path=start.checkpoint, weights_only=True)
        return _finish(config, task, data, folder, metrics, trainer, started)


def _find_start(config: TrainConfig) -> Start:
    folder, checkpoint = choose_run_folder(config)
    say(f"run folder {folder.path}")
    if checkpoint is None:
        return Start(folder.path)
    header = read_header(checkpoint)
    check_has_config(checkpoint, header)
    if config.trainer.max_epochs is None:  # else it waits for the data, which say how many steps that is
        check_same_config(checkpoint, header, config)
    say(f"continuing from step {header['global_step']} of {checkpoint}")
    # The rest of the header, such as averaged weights, may be large, and all ranks get this.
    return Start(
        folder.path, checkpoint, {name: header[name] for name in ("config", "data_key", "global_step")}
    )


def _without_warm_start(config: TrainConfig) -> TrainConfig:
    """For a run that is continued: its weights are in the checkpoint, and the first ones may be gone."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, warm_start=None))


def _describe(config: TrainConfig, task: Task, data: DataModule, model: nn.Module) -> dict[str, str]:
    trainer = config.trainer
    return describe_run(
        config,
        model,
        data.describe(),
        tokens_per_sample=task.tokens_per_sample,
        global_batch_size=trainer.batch_size * trainer.accumulate_grad_batches * data_parallel_size(config),
    )


def _start_folder(
    lock: FolderLock, start: Start, config: TrainConfig, data: DataModule, session: dict[str, Any]
) -> None:
    folder = lock.folder
    with writing_into(folder):
        folder.last_checkpoint.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        if start.checkpoint is None and folder.config.exists():
            raise OutputError(
                f"output_dir: another run has begun in {folder.path} since this one looked. Start again, for a folder "
                "beside it."
            )
        if data.tokenizer is not None:
            with atomic_write(folder.tokenizer) as file:
                file.write(data.tokenizer.to_str(pretty=True).encode())
        if data.label_names:
            write_label_names(folder, data.label_names)
        started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        facts = {"started": started, "data_key": data.key, "groups": describe_entries(config), **session}
        write_manifest(folder, facts)
        write_config(folder, config)


def _watched(config: TrainConfig, folder: RunFolder, data: DataModule) -> WatchedRun:
    return WatchedRun(
        folder=folder.path,
        task=config.task,
        every_n_steps=config.logger.every_n_steps,
        nan=config.trainer.nan,
        val_bytes_per_token=data.val_bytes_per_token if config.metrics.bits_per_byte else None,
    )


def _finish(
    config: TrainConfig,
    task: Task,
    data: DataModule,
    folder: RunFolder,
    metrics: Metrics,
    trainer: pl.Trainer,
    started: float,
) -> RunResult:
    """Sample, report and closing lines."""
    # As in training: with FSDP2 and bf16-mixed, layers have weights in bf16 and rely on autocast.
    mixed = config.trainer.precision == "bf16-mixed"
    with torch.autocast(trainer.strategy.root_device.type, torch.bfloat16, enabled=mixed):
        sample = _sample(config, task, data)  # by all processes: they may share the model
    if not trainer.is_global_zero:
        return result_of(folder, metrics)
    with writing_into(folder):
        if sample:
            with atomic_write(folder.sample) as file:
                file.write(sample.encode())
        result = result_of(folder, metrics, sample=sample)
        write_report(folder.path)
    say(f"\n{result}\n\n{duration(time.perf_counter() - started)} in all")
    return result


def _sample(config: TrainConfig, task: Task, data: DataModule) -> str:
    if (
        config.generation.max_new_tokens == 0
        or data.tokenizer is None
        or not isinstance(task.model, GPTLMHeadModel)
    ):
        return ""
    prompt = data.prompt if config.generation.prompt is None else config.generation.prompt
    assert data.end_of_text_id is not None
    return write_sample(
        task.model, data.tokenizer, data.end_of_text_id, config.generation, prompt=prompt, seed=config.seed
    )

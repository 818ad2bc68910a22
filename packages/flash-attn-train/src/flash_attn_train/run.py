"""One training run, from config to result."""

from __future__ import annotations

import dataclasses
import functools
import logging
import shutil
import time
import warnings
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
from flash_attn_models.attention import attention_path
from flash_attn_models.gpt import GPTConfig
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.loggers.logger import Logger

from flash_attn_train import __version__
from flash_attn_train.atomic import atomic_write
from flash_attn_train.callbacks import METRICS, FinalValidation, Metrics, Progress, RunCheckpoint
from flash_attn_train.checkpoints import (
    AtomicCheckpointIO,
    check_same_config,
    check_same_data,
    read_checkpoint,
)
from flash_attn_train.configs import TrainConfig, check_config
from flash_attn_train.configs.checks import flatten
from flash_attn_train.console import duration, say
from flash_attn_train.data import Corpus, PreparedData, TokenDataModule, prepare_data, read_corpus
from flash_attn_train.device import compute_dtype, describe_device, resolve
from flash_attn_train.errors import ConfigError
from flash_attn_train.loggers import MetricsCSV, read_metrics
from flash_attn_train.optim import warmup_cosine
from flash_attn_train.report import RunResult, draw_loss_curve
from flash_attn_train.run_folder import RunFolder, choose_run_folder, write_config, write_manifest
from flash_attn_train.sample import write_sample
from flash_attn_train.tasks import LanguageModel


def train(config: TrainConfig) -> RunResult:
    """Trains, or continues training, as the config says, and prints what it does as it goes.

    Whatever can be found wrong before training is found before anything is written to the run folder.

    Raises:
        UserError: see :mod:`flash_attn_train.errors`.
    """
    started = time.perf_counter()
    check_config(config)
    config = resolve(config)
    folder, checkpoint = choose_run_folder(config)
    say(f"flash-attn-train {__version__}, run folder {folder.path}")
    first_step = 0
    if checkpoint is not None:
        saved = read_checkpoint(checkpoint)
        check_same_config(checkpoint, saved, config)
        first_step = saved["global_step"]
        say(f"continuing from step {first_step} of {checkpoint}")

    corpus = read_corpus(
        config.data.path, suffixes=config.data.suffixes, val_fraction=config.data.val_fraction
    )
    data = prepare_data(
        corpus, config.tokenizer, seqlen=config.model.max_seqlen, cache_dir=config.data.cache_dir
    )
    if checkpoint is not None:
        check_same_data(checkpoint, saved, config, data.key)
        del saved  # it is as large as the training state

    pl.seed_everything(config.seed, workers=True, verbose=False)
    module = LanguageModel(_model_config(config, data.vocab_size), config.optimizer, _schedule(config))
    facts = _facts(config, corpus, data, module)
    for name, value in facts.items():
        say(f"{name:<10} {value}")
    _start_folder(folder, config, data, {"first_step": first_step, **facts})

    metrics = _fit(config, corpus, data, module, folder, checkpoint, first_step)

    draw_loss_curve(folder.metrics, folder.picture, title=f"{folder.path.name}: {facts['model']}")
    result = _result(config, corpus, data, module, folder, metrics)
    say(f"\n{result}")
    say(f"\n{duration(time.perf_counter() - started)} in all")
    return result


def _model_config(config: TrainConfig, vocab_size: int) -> GPTConfig:
    try:
        return GPTConfig(vocab_size=vocab_size, **dataclasses.asdict(config.model))
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error


def _schedule(config: TrainConfig) -> Callable[[int], float]:
    schedule = config.scheduler
    assert schedule.warmup_steps is not None and schedule.decay_steps is not None  # resolved
    return functools.partial(
        warmup_cosine,
        warmup_steps=schedule.warmup_steps,
        decay_steps=schedule.decay_steps,
        min_lr_ratio=schedule.min_lr_ratio,
    )


def _facts(config: TrainConfig, corpus: Corpus, data: PreparedData, module: LanguageModel) -> dict[str, str]:
    """What a user wants to know before the wait; also goes into the manifest."""
    shape = config.model
    sizes = corpus.num_bytes
    path = attention_path(
        module.model.config,
        seqlen=shape.max_seqlen,
        device=_torch_device(config),
        dtype=compute_dtype(config),
    )
    skipped = ""
    if corpus.skipped:
        skipped = f"; skipped {len(corpus.skipped)} files that are not UTF-8 text, e.g. {corpus.skipped[0]}"
    return {
        "device": f"{describe_device(config)}, precision {config.trainer.precision}",
        "attention": str(path).removeprefix("attention path: "),
        "corpus": f"{corpus.title}; training: {len(corpus.train)} documents, {sizes['train'] / 1e6:.1f} MB; "
        f"held out: {len(corpus.validation)} documents, {sizes['validation'] / 1e6:.1f} MB{skipped}",
        "tokens": f"{len(data.train):,} to train on, {len(data.validation):,} held out; vocabulary of "
        f"{data.vocab_size:,}{' (from the cache)' if data.from_cache else ''}",
        "model": f"{sum(p.numel() for p in module.parameters()):,} parameters, {shape.n_layer} layers, width "
        f"{shape.d_model}, {shape.n_head} heads, context {shape.max_seqlen}",
        "training": f"{config.trainer.max_steps:,} steps of {_tokens_per_step(config):,} tokens",
    }


def _torch_device(config: TrainConfig) -> str:
    return config.trainer.accelerator


def _tokens_per_step(config: TrainConfig) -> int:
    return config.trainer.batch_size * config.trainer.accumulate_grad_batches * config.model.max_seqlen


def _start_folder(
    folder: RunFolder, config: TrainConfig, data: PreparedData, session: dict[str, Any]
) -> None:
    folder.last_checkpoint.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(data.tokenizer_file, folder.tokenizer)
    write_manifest(
        folder,
        {
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "data_key": data.key,
            **session,
        },
    )
    write_config(folder, config)


def _fit(
    config: TrainConfig,
    corpus: Corpus,
    data: PreparedData,
    module: LanguageModel,
    folder: RunFolder,
    checkpoint: Path | None,
    first_step: int,
) -> Metrics:
    metrics = Metrics(
        every_n_steps=config.logging.every_n_steps,
        tokens_per_step=_tokens_per_step(config),
        val_bytes_per_token=corpus.num_bytes["validation"] / len(data.validation),
    )
    saving = RunCheckpoint(
        folder.last_checkpoint,
        folder.best_checkpoint,
        every_n_steps=config.checkpoint.every_n_steps,
        val_every_n_steps=config.trainer.val_every_n_steps,
        config=flatten(config),
        data_key=data.key,
    )
    datamodule = TokenDataModule(
        data.train,
        data.validation,
        seqlen=config.model.max_seqlen,
        batch_size=config.trainer.batch_size,
        seed=config.seed,
        val_sequences=config.trainer.val_sequences,
        num_workers=config.data.num_workers,
    )
    with _quiet_lightning():
        trainer = pl.Trainer(
            accelerator=config.trainer.accelerator,
            devices=1,
            precision=cast(Any, config.trainer.precision),  # checked by check_config
            max_steps=config.trainer.max_steps,
            max_epochs=-1,
            accumulate_grad_batches=config.trainer.accumulate_grad_batches,
            gradient_clip_val=config.trainer.gradient_clip_val or None,
            val_check_interval=config.trainer.val_every_n_steps * config.trainer.accumulate_grad_batches,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            # Tensors that a model caches during the first validation (rotary tables) are used in training,
            # which inference tensors cannot be.
            inference_mode=False,
            callbacks=[metrics, Progress(metrics), FinalValidation(), saving],
            logger=_loggers(config, folder, first_step),
            plugins=[AtomicCheckpointIO()],
            enable_model_summary=False,
            enable_autolog_hparams=False,
            default_root_dir=folder.path,
        )
        if checkpoint is None:
            trainer.validate(module, datamodule, verbose=False)
        trainer.fit(module, datamodule, ckpt_path=checkpoint, weights_only=True)
    return metrics


def _loggers(config: TrainConfig, folder: RunFolder, first_step: int) -> list[Logger]:
    loggers: list[Logger] = [MetricsCSV(folder.metrics, METRICS, resume_step=first_step)]
    if config.logging.tensorboard:
        loggers.append(
            TensorBoardLogger(folder.path, name="", version="tensorboard", purge_step=first_step + 1)
        )
    return loggers


class _quiet_lightning(warnings.catch_warnings):
    """Silences what Lightning says about itself and about choices that are made on purpose here."""

    def __enter__(self) -> None:
        super().__enter__()
        for name in ("pytorch_lightning", "lightning_fabric"):
            logging.getLogger(name).setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")


def _result(
    config: TrainConfig,
    corpus: Corpus,
    data: PreparedData,
    module: LanguageModel,
    folder: RunFolder,
    metrics: Metrics,
) -> RunResult:
    sample = ""
    if config.generation.max_new_tokens > 0:
        prompt = corpus.prompt if config.generation.prompt is None else config.generation.prompt
        sample = write_sample(
            module.model, data.tokenizer, config.generation, prompt=prompt, seed=config.seed
        )
        with atomic_write(folder.sample) as file:
            file.write(sample.encode())
    validations = [row for row in read_metrics(folder.metrics) if "val/loss" in row]
    return RunResult(
        folder=folder.path,
        first_val_loss=validations[0]["val/loss"],
        last_val_loss=validations[-1]["val/loss"],
        last_val_perplexity=validations[-1]["val/perplexity"],
        last_val_bits_per_byte=validations[-1]["val/bits_per_byte"],
        tokens=metrics.tokens,
        seconds=metrics.seconds,
        last_checkpoint=folder.last_checkpoint,
        best_checkpoint=folder.best_checkpoint,
        picture=folder.picture,
        sample=sample,
    )

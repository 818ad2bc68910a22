"""One training run, from config to result."""

from __future__ import annotations

import dataclasses
import functools
import shutil
import time
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import pytorch_lightning as pl
from flash_attn_models.gpt import GPTConfig

from flash_attn_train.atomic import atomic_write
from flash_attn_train.callbacks import Metrics
from flash_attn_train.checkpoints import check_same_config, check_same_data, read_checkpoint
from flash_attn_train.configs import TrainConfig, check_config
from flash_attn_train.console import duration, say
from flash_attn_train.data import Corpus, PreparedData, TokenDataModule, prepare_data, read_corpus
from flash_attn_train.device import resolve
from flash_attn_train.errors import ConfigError
from flash_attn_train.loggers import read_metrics
from flash_attn_train.optim import warmup_cosine
from flash_attn_train.report import RunResult, describe_run, draw_loss_curve
from flash_attn_train.run_folder import RunFolder, choose_run_folder, write_config, write_manifest
from flash_attn_train.sample import write_sample
from flash_attn_train.tasks import LanguageModel
from flash_attn_train.trainer import build_trainer, quiet_lightning


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
    say(f"run folder {folder.path}")
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
    facts = describe_run(config, corpus, data, module.model)
    for name, value in facts.items():
        say(f"{name:<10} {value}")
    _start_folder(folder, config, data, {"first_step": first_step, **facts})

    tokens_per_forward = config.trainer.batch_size * config.model.max_seqlen
    metrics = Metrics(
        every_n_steps=config.logging.every_n_steps,
        tokens_per_step=tokens_per_forward * config.trainer.accumulate_grad_batches,
        val_bytes_per_token=corpus.num_bytes["validation"] / len(data.validation),
    )
    with quiet_lightning():
        trainer = build_trainer(config, folder, metrics, data_key=data.key, first_step=first_step)
        batches = _batches(config, data)
        if checkpoint is None:
            trainer.validate(module, batches, verbose=False)
        trainer.fit(module, batches, ckpt_path=checkpoint, weights_only=True)

    draw_loss_curve(folder.metrics, folder.picture, title=f"{folder.path.name}: {facts['model']}")
    result = _result(folder, metrics, sample=_sample(config, corpus, data, module, folder))
    say(f"\n{result}\n\n{duration(time.perf_counter() - started)} in all")
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


def _start_folder(
    folder: RunFolder, config: TrainConfig, data: PreparedData, session: dict[str, Any]
) -> None:
    folder.last_checkpoint.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(data.tokenizer_file, folder.tokenizer)
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    write_manifest(folder, {"started": started, "data_key": data.key, **session})
    write_config(folder, config)


def _batches(config: TrainConfig, data: PreparedData) -> TokenDataModule:
    return TokenDataModule(
        data.train,
        data.validation,
        seqlen=config.model.max_seqlen,
        batch_size=config.trainer.batch_size,
        seed=config.seed,
        val_sequences=config.trainer.val_sequences,
        num_workers=config.data.num_workers,
    )


def _sample(
    config: TrainConfig, corpus: Corpus, data: PreparedData, module: LanguageModel, folder: RunFolder
) -> str:
    if config.generation.max_new_tokens == 0:
        return ""
    prompt = corpus.prompt if config.generation.prompt is None else config.generation.prompt
    sample = write_sample(module.model, data.tokenizer, config.generation, prompt=prompt, seed=config.seed)
    with atomic_write(folder.sample) as file:
        file.write(sample.encode())
    return sample


def _result(folder: RunFolder, metrics: Metrics, *, sample: str) -> RunResult:
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

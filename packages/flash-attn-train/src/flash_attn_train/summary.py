"""What a run tells its user in words: the opening lines and the closing lines."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flash_attn_models.attention import attention_path
from flash_attn_models.gpt import GPTLMHeadModel
from torch import nn

from flash_attn_train.callbacks.metrics import Metrics
from flash_attn_train.callbacks.progress import describe_validation
from flash_attn_train.configs import TrainConfig
from flash_attn_train.console import duration
from flash_attn_train.device import compute_dtype, describe_device
from flash_attn_train.flops import count_parameters
from flash_attn_train.loggers import read_metrics
from flash_attn_train.run_folder import RunFolder


def describe_run(
    config: TrainConfig,
    model: nn.Module,
    data: Mapping[str, str],
    *,
    tokens_per_sample: int,
    global_batch_size: int,
) -> dict[str, str]:
    """What a user wants to know before the wait, of a (resolved) config: name -> text.

    Args:
        model: the whole model; on device "meta" will do.
        data: what the data say of themselves, such as "corpus" and "tokens".
        tokens_per_sample: positions that the model computes for a sample.
        global_batch_size: samples of an optimizer step, on all devices together.
    """
    facts = {"device": f"{describe_device(config)}, precision {config.trainer.precision}"}
    if isinstance(model, GPTLMHeadModel):
        path = attention_path(
            model.config,
            seqlen=tokens_per_sample,
            device=config.trainer.accelerator,
            dtype=compute_dtype(config),
        )
        facts["attention"] = str(path).removeprefix("attention path: ")
    facts |= data
    facts["model"] = ", ".join(
        [f"{count_parameters(model).total:,} parameters", *_shape(model, tokens_per_sample)]
    )
    facts["training"] = (
        f"{config.trainer.max_steps:,} steps of {global_batch_size:,} samples, "
        f"{global_batch_size * tokens_per_sample:,} tokens"
    )
    return facts


def _shape(model: nn.Module, tokens_per_sample: int) -> list[str]:
    shape = getattr(model, "config", None)
    names = {"n_layer": "{} layers", "d_model": "width {}", "n_head": "{} heads"}
    known = [text.format(getattr(shape, name)) for name, text in names.items() if hasattr(shape, name)]
    return [*known, f"context {tokens_per_sample}"]


@dataclass(frozen=True)
class RunResult:
    """What came out of a run.

    Attributes:
        folder: of the run.
        first_val, last_val: validation records, such as {"val/loss": 1.5, "val/perplexity": 4.48}; losses in nats.
            Empty where the folder has none: nothing was left to train, and the records are elsewhere.
        tokens, samples, seconds: of this session: what all processes together trained on (tokens 0 for images), and how
            long that took, without validation.
        last_checkpoint, best_checkpoint, picture, report: files.
        sample: text that the model wrote; "" if none.
    """

    folder: Path
    first_val: Mapping[str, float]
    last_val: Mapping[str, float]
    tokens: int
    samples: int
    seconds: float
    last_checkpoint: Path
    best_checkpoint: Path
    picture: Path
    report: Path
    sample: str = ""

    @property
    def first_val_loss(self) -> float:
        return self.first_val.get("val/loss", math.nan)

    @property
    def last_val_loss(self) -> float:
        return self.last_val.get("val/loss", math.nan)

    def __str__(self) -> str:
        unit, amount = ("tokens", self.tokens) if self.tokens else ("samples", self.samples)
        speed = "nothing left to train"
        if amount:
            speed = f"{amount / self.seconds:,.0f} {unit}/s in training ({amount:,} {unit} in {duration(self.seconds)})"
        loss = "not measured here"
        if self.last_val:
            more = ", ".join(describe_validation(self.last_val)[1:])
            loss = f"{self.first_val_loss:.3f} -> {self.last_val_loss:.3f} nats per target" + (
                f" ({more})" if more else ""
            )
        lines = [
            f"validation loss  {loss}",
            f"speed            {speed}",
            f"checkpoints      {self.last_checkpoint}, {self.best_checkpoint.name} beside it",
            f"report           {self.report}, {self.picture.name} beside it",
        ]
        if self.sample:
            lines += ["sample", *(f"    {line}".rstrip() for line in self.sample.splitlines())]
        return "\n".join(lines)


def result_of(folder: RunFolder, metrics: Metrics, *, sample: str = "") -> RunResult:
    """What a finished run came to, from its metrics.csv, where this machine has it, and the callback that measured."""
    rows = read_metrics(folder.metrics) if folder.metrics.is_file() else []
    validations = [
        {name: value for name, value in row.items() if name.startswith("val/")}
        for row in rows
        if "val/loss" in row
    ] or [{}]
    return RunResult(
        folder=folder.path,
        first_val=validations[0],
        last_val=validations[-1],
        tokens=metrics.tokens,
        samples=metrics.samples,
        seconds=metrics.seconds,
        last_checkpoint=folder.last_checkpoint,
        best_checkpoint=folder.best_checkpoint,
        picture=folder.picture,
        report=folder.path / "report.md",
        sample=sample,
    )

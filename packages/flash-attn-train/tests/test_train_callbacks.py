"""Callbacks in small runs of Lightning's trainer."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from flash_attn_models.gpt import GPTConfig, GPTLMHeadModel
from flash_attn_train.callbacks import LossScaleMonitor, WatchedRun, build_callbacks
from flash_attn_train.callbacks.causality import largest_leak
from flash_attn_train.callbacks.gpu_affinity import cores_near_gpu, cores_of_mask
from flash_attn_train.callbacks.measurement import Window
from flash_attn_train.callbacks.norms import layers_of
from flash_attn_train.callbacks.speed import SpeedMonitor
from flash_attn_train.configs.callbacks import (
    CallbacksConfig,
    CausalityConfig,
    EarlyStoppingConfig,
    NormsConfig,
)
from flash_attn_train.configs.metrics import MetricsConfig
from flash_attn_train.configs.task import ImageClassificationConfig, LanguageModelConfig
from flash_attn_train.errors import ConfigError, TrainingError
from flash_attn_train.loggers import MetricsCSV, read_metrics
from flash_attn_train.metrics import build_metrics
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

VOCAB, SEQLEN, BATCH = 17, 8, 4


class Batches(IterableDataset):
    """Batch i depends on i alone."""

    def __init__(self, first: int, count: int) -> None:
        self.numbers = range(first, first + count)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for number in self.numbers:
            generator = torch.Generator().manual_seed(number)
            ids = torch.randint(VOCAB, (BATCH, SEQLEN + 1), generator=generator)
            yield {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}


class TinyTask(pl.LightningModule):
    """What callbacks need of a task."""

    tokens_per_sample = SEQLEN

    def __init__(self, bad_steps: tuple[int, ...] = ()) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = GPTLMHeadModel(
            GPTConfig(vocab_size=VOCAB, max_seqlen=SEQLEN, n_layer=2, n_head=2, d_model=16)
        )
        self.val_metrics = build_metrics(MetricsConfig(), LanguageModelConfig())
        self.bad_steps = bad_steps
        self.grad_norm: torch.Tensor | None = None

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(self.model(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = self.loss(batch)
        return loss * float("nan") if self.global_step + 1 in self.bad_steps else loss

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        count = torch.tensor(batch["labels"].numel())
        self.val_metrics.update(
            SimpleNamespace(loss=self.loss(batch), num_targets=count, logits=None, labels=batch["labels"])
        )

    def on_validation_epoch_end(self) -> None:
        self.log_dict({f"val/{k}": v for k, v in self.val_metrics.compute().items()}, logger=False)
        self.val_metrics.reset()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any
    ) -> None:
        self.grad_norm = nn.utils.clip_grad_norm_(self.parameters(), 1.0)


def fit(
    folder: Path,
    config: CallbacksConfig | None = None,
    *,
    task: TinyTask | None = None,
    steps: int = 6,
    accumulate: int = 1,
    every_n_steps: int = 1,
    nan: str = "stop",
    checkpoint: Path | None = None,
    first_step: int = 0,
    **options: Any,
) -> tuple[pl.Trainer, list[dict[str, float]]]:
    """Trains, and returns the trainer and the metrics."""
    run = WatchedRun(folder, LanguageModelConfig(), every_n_steps, nan=nan, val_bytes_per_token=2.0)
    _, callbacks = build_callbacks(config or CallbacksConfig(), run)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        val_check_interval=3 * accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=[MetricsCSV(folder / "metrics.csv", resume_step=first_step)],
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )
    batches = DataLoader(Batches(first_step * accumulate, 10_000), batch_size=None)
    trainer.fit(
        task or TinyTask(), batches, DataLoader(Batches(20_000, 2), batch_size=None), ckpt_path=checkpoint
    )
    return trainer, read_metrics(folder / "metrics.csv")


def test_rates_of_named_groups(tmp_path: Path) -> None:
    class TwoRates(TinyTask):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            first, *others = self.parameters()
            groups = [{"params": [first], "lr": 0.005, "name": "x0.5"}, {"params": others}]
            return torch.optim.SGD(groups, lr=0.01)

    _, rows = fit(tmp_path, CallbacksConfig(), every_n_steps=2, steps=2, task=TwoRates())
    (row,) = [row for row in rows if "train/loss" in row]
    assert (row["lr"], row["lr/x0.5"]) == (0.01, 0.005)


def test_record_has_what_the_default_callbacks_measure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = CallbacksConfig()
    config.speed.peak_tflops = 1e-3
    config.norms = NormsConfig(enabled=True, per_layer=True)
    trainer, rows = fit(tmp_path, config, accumulate=2, every_n_steps=2, steps=6)
    training = [row for row in rows if "train/loss" in row]
    assert [row["step"] for row in training] == [2, 4, 6]
    for row in training:
        assert row["tokens"] == row["step"] * 2 * BATCH * SEQLEN
        assert row["lr"] == 1e-2
        assert row["tokens_per_s"] == pytest.approx(row["tokens_per_s_per_device"])
        assert row["step_time_s"] * row["tokens_per_s"] == pytest.approx(2 * BATCH * SEQLEN)
        assert 0 < row["data_wait"] < 1
        layers = [value for name, value in row.items() if name.startswith("grad_norm/")]
        assert len(layers) == 5 and sum(v**2 for v in layers) == pytest.approx(
            row["grad_norm"] ** 2, rel=1e-4
        )
    facts = json.loads((tmp_path / "model.json").read_text())
    assert facts["parameters"]["total"] == sum(p.numel() for p in trainer.lightning_module.parameters())
    flops_per_s = training[-1]["tokens_per_s"] / SEQLEN * facts["flops_per_sample"]
    assert training[-1]["mfu"] == pytest.approx(flops_per_s / 1e9)
    total = torch.nn.utils.get_total_norm(list(trainer.lightning_module.parameters()))
    assert training[-1]["weight_norm"] == pytest.approx(float(total), rel=1e-5)
    validations = [row for row in rows if "val/loss" in row]
    assert [row["step"] for row in validations] == [3, 6]
    for row in validations:
        assert torch.tensor(row["val/loss"]).exp() == pytest.approx(row["val/perplexity"], rel=1e-6)
        assert row["val/bits_per_byte"] == pytest.approx(row["val/loss"] / 0.6931471805599453 / 2.0)
    printed = capsys.readouterr().out
    assert "step 2/6  loss" in printed and "tokens/s  MFU" in printed and "ETA" in printed
    assert "step 3/6  validation loss" in printed and "bits/byte" in printed


def test_speed_is_of_all_devices_or_of_each() -> None:
    facts: Any = SimpleNamespace(flops_per_sample=10**9)
    trainer: Any = SimpleNamespace(world_size=4, strategy=SimpleNamespace(root_device=torch.device("cpu")))
    monitor, task = SpeedMonitor(facts, peak_tflops=2.0), TinyTask()
    assert monitor.measure(trainer, task, Window(seconds=2.0, steps=4, samples=1000, tokens=8000)) == {
        "step_time_s": 0.5,
        "tokens_per_s_per_device": 1000.0,
        "mfu": pytest.approx(1000 * 1e9 / 2.0 / (4 * 2e12)),
    }
    images = monitor.measure(trainer, task, Window(seconds=2.0, steps=4, samples=1000, tokens=0))
    assert images["samples_per_s_per_device"] == 125.0


def test_loss_of_a_step_is_the_mean_over_its_forward_passes(tmp_path: Path) -> None:
    _, rows = fit(tmp_path, accumulate=3, steps=1)
    task = TinyTask().eval()
    expected = torch.stack([task.loss(batch) for batch in Batches(0, 3)]).mean()
    assert rows[0]["train/loss"] == pytest.approx(float(expected), rel=1e-5)


def test_resumed_run_records_the_same(tmp_path: Path) -> None:
    class SaveAt4(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            if trainer.global_step == 4 and not (tmp_path / "4.ckpt").exists():
                trainer.save_checkpoint(tmp_path / "4.ckpt")

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run = WatchedRun(whole, LanguageModelConfig(), 1)
    whole.mkdir()
    parts.mkdir()
    _, callbacks = build_callbacks(CallbacksConfig(), run)
    options: dict[str, Any] = {"accelerator": "cpu", "max_epochs": -1, "enable_checkpointing": False}
    options |= {"enable_model_summary": False, "limit_val_batches": 0}
    trainer = pl.Trainer(
        max_steps=7, logger=[MetricsCSV(whole / "metrics.csv")], callbacks=[*callbacks, SaveAt4()], **options
    )
    trainer.fit(TinyTask(), DataLoader(Batches(0, 10_000), batch_size=None))
    (parts / "metrics.csv").write_bytes((whole / "metrics.csv").read_bytes())
    _, callbacks = build_callbacks(CallbacksConfig(), WatchedRun(parts, LanguageModelConfig(), 1))
    metrics = [MetricsCSV(parts / "metrics.csv", resume_step=4)]
    trainer = pl.Trainer(max_steps=7, logger=metrics, callbacks=callbacks, **options)
    trainer.fit(
        TinyTask(),
        DataLoader(Batches(4, 10_000), batch_size=None),
        ckpt_path=tmp_path / "4.ckpt",
        weights_only=True,
    )

    def computed(folder: Path) -> list[tuple[str, ...]]:
        with open(folder / "metrics.csv") as file:
            return [(r["step"], r["tokens"], r["train/loss"], r["grad_norm"]) for r in csv.DictReader(file)]

    assert len(computed(whole)) == 7
    assert computed(parts) == computed(whole)


def test_bad_step_stops_before_the_next_checkpoint_and_keeps_the_batch(tmp_path: Path) -> None:
    class Save(pl.callbacks.Checkpoint):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    run = WatchedRun(tmp_path, LanguageModelConfig(), every_n_steps=100)
    _, callbacks = build_callbacks(CallbacksConfig(), run)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=9,
        logger=False,
        callbacks=[*callbacks, Save()],
        enable_model_summary=False,
    )
    with pytest.raises(TrainingError, match=r"step 4 is not finite; its batch is in .*nan_batch\.pt"):
        trainer.fit(TinyTask(bad_steps=(4,)), DataLoader(Batches(0, 100), batch_size=None))
    assert sorted(file.name for file in tmp_path.glob("*.ckpt")) == ["1.ckpt", "2.ckpt", "3.ckpt"]
    saved = torch.load(tmp_path / "nan_batch.pt", weights_only=True)
    assert saved["step"] == 4
    expected = next(iter(Batches(3, 1)))
    assert torch.equal(saved["batches"][0]["input_ids"], expected["input_ids"])
    with pytest.raises(TrainingError):  # also later, whoever asks
        trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert not (tmp_path / "after.ckpt").exists()


def test_bad_step_is_found_with_the_record_and_at_the_validation(tmp_path: Path) -> None:
    for every, folder in ((2, tmp_path / "record"), (100, tmp_path / "validation")):
        folder.mkdir()
        with pytest.raises(TrainingError, match="step 2 is not finite"):
            fit(folder, task=TinyTask(bad_steps=(2,)), accumulate=2, every_n_steps=every)
        assert len(torch.load(folder / "nan_batch.pt")["batches"]) == 2  # both forward passes
    rows = read_metrics(tmp_path / "record/metrics.csv")
    assert [row["step"] for row in rows] == [2] and rows[0]["train/loss"] != rows[0]["train/loss"]


def test_kept_losses_are_those_of_the_forward_passes(tmp_path: Path) -> None:
    class SecondIsBad(TinyTask):
        def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
            return self.loss(batch) * (float("nan") if batch_idx == 1 else 1.0)

    with pytest.raises(TrainingError, match="step 1 is not finite"):
        fit(tmp_path, task=SecondIsBad(), accumulate=2)
    good, bad = torch.load(tmp_path / "nan_batch.pt")["losses"]
    assert good == pytest.approx(float(TinyTask().loss(next(iter(Batches(0, 1))))), rel=1e-5)
    assert bad != bad


def test_batches_that_wait_for_their_check_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flash_attn_train.callbacks.nan_guard._KEPT_BYTES", 2 * 2 * BATCH * SEQLEN * 8 + 10)
    with pytest.raises(TrainingError, match="step 3 is not finite"):
        fit(tmp_path, task=TinyTask(bad_steps=(3,)), every_n_steps=100, steps=100, limit_val_batches=0)
    assert torch.load(tmp_path / "nan_batch.pt")["step"] == 3


def test_skipped_step_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    states = {}

    class Watch(TinyTask):
        def on_train_batch_end(self, *args: Any) -> None:
            optimizer = self.optimizers().optimizer.state_dict()["state"]  # type: ignore[union-attr]
            tensors = [
                *self.state_dict().values(),
                *(t for state in optimizer.values() for t in state.values()),
            ]
            states[self.global_step] = [tensor.clone() for tensor in tensors]

    _, rows = fit(tmp_path, task=Watch(bad_steps=(3, 4)), steps=6, nan="skip", limit_val_batches=0)
    for step, same in ((2, False), (3, True), (4, True), (5, False)):
        before = states[step - 1]
        assert all(map(torch.equal, states[step], before)) == same, step
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 2, 2, 2]
    assert "step 4/6  skipped" in capsys.readouterr().out
    assert torch.load(tmp_path / "nan_batch.pt")["step"] == 3


def test_too_many_skipped_steps(tmp_path: Path) -> None:
    config = CallbacksConfig()
    config.nan_guard.max_skipped_in_a_row = 2
    with pytest.raises(TrainingError, match="steps 3 to 5 had a loss or gradient that is not finite"):
        fit(tmp_path, config, task=TinyTask(bad_steps=(1, 3, 4, 5)), nan="skip")


def test_early_stopping(tmp_path: Path) -> None:
    early = EarlyStoppingConfig(enabled=True, monitor="val/loss", mode="max", patience=1)
    trainer, rows = fit(tmp_path, CallbacksConfig(early_stopping=early), steps=30)
    assert trainer.global_step < 30
    assert rows[-1]["step"] == trainer.global_step


def test_causality_of_ours_is_checked_and_logged(tmp_path: Path) -> None:
    _, rows = fit(tmp_path, CallbacksConfig(causality=CausalityConfig(enabled=True)), steps=3)
    assert rows[-1]["val/causality_leak"] == 0.0


class Leaky(nn.Module):
    """Each output sees the whole sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 4)
        self.head = nn.Linear(4, VOCAB)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        return self.head(x + x.mean(dim=1, keepdim=True))


def test_leak_is_found_and_leaves_no_trace() -> None:
    model = Leaky().train()
    before = torch.get_rng_state()
    assert largest_leak(model, SEQLEN) > 0
    assert torch.equal(torch.get_rng_state(), before)
    assert (
        model.training
        and all(p.grad is None for p in model.parameters())
        and not model.embedding._forward_hooks
    )

    transformers = pytest.importorskip("transformers", reason="needs a model that is not ours")
    shape = transformers.GPT2Config(vocab_size=VOCAB, n_positions=SEQLEN, n_layer=2, n_head=2, n_embd=8)
    assert largest_leak(transformers.AutoModelForCausalLM.from_config(shape), SEQLEN) == 0.0


@pytest.mark.parametrize("seqlen", [1, 2, 3])
def test_leak_in_short_sequences(seqlen: int) -> None:
    assert largest_leak(TinyTask().model, seqlen) == 0.0
    assert (largest_leak(Leaky(), seqlen) > 0) == (seqlen > 1)


@pytest.mark.parametrize("on_leak", ["raise", "log"])
def test_leak_stops_the_run_if_wanted(tmp_path: Path, on_leak: str) -> None:
    task = TinyTask()
    task.model = Leaky()  # type: ignore[assignment]
    config = CallbacksConfig(causality=CausalityConfig(enabled=True, on_leak=on_leak))
    if on_leak == "raise":
        with pytest.raises(TrainingError, match="not causal"):
            fit(tmp_path, config, task=task, steps=3)
    else:
        assert fit(tmp_path, config, task=task, steps=3)[1][-1]["val/causality_leak"] > 0


def test_causality_has_no_meaning_for_images(tmp_path: Path) -> None:
    config = CallbacksConfig(causality=CausalityConfig(enabled=True))
    with pytest.raises(ConfigError, match=r"callbacks\.causality\.enabled"):
        build_callbacks(config, WatchedRun(tmp_path, ImageClassificationConfig(), 1))


def test_everything_on_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = CallbacksConfig(gpu_affinity=True, model_summary=True)
    config.ema.enabled = config.causality.enabled = config.norms.enabled = True
    _, rows = fit(tmp_path, config, steps=3)
    assert {"val/loss", "val/causality_leak"} <= rows[-1].keys()
    printed = capsys.readouterr().out
    assert "GPU affinity: device is cpu, CPU cores are left as they are" in printed


def test_cores_of_mask() -> None:
    assert cores_of_mask([0b1011, 1 << 63, 0]) == [0, 1, 3, 127]


def test_loss_scale_is_that_of_the_scaler() -> None:
    from pytorch_lightning.plugins import MixedPrecision

    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    window = Window(1.0, 1, 1, 1)
    for precision, expected in ((plugin, {"loss_scale": 1024.0}), (MixedPrecision("bf16-mixed", "cpu"), {})):
        trainer: Any = SimpleNamespace(precision_plugin=precision)
        assert LossScaleMonitor().measure(trainer, TinyTask(), window) == expected


class ImageTask(pl.LightningModule):
    tokens_per_sample = 5

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(4, 3)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return F.cross_entropy(self.model(batch["images"].flatten(1)), batch["labels"])

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.training_step(batch, batch_idx), logger=False)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_images_are_counted_in_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = WatchedRun(tmp_path, ImageClassificationConfig(), every_n_steps=1)
    metrics, callbacks = build_callbacks(CallbacksConfig(), run)
    log = MetricsCSV(tmp_path / "metrics.csv")
    options: dict[str, Any] = {"enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(accelerator="cpu", max_steps=2, logger=[log], callbacks=callbacks, **options)
    batches = DataLoader(
        [{"images": torch.rand(6, 1, 2, 2), "labels": torch.arange(6) % 3}] * 2, batch_size=None
    )
    task = ImageTask()
    trainer.validate(task, batches, verbose=False)
    trainer.fit(task, batches, batches)
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [row["samples"] for row in rows] == [0, 6, 12, 12]
    assert rows[1]["samples_per_s"] > 0 and "tokens" not in rows[1] and "val/bits_per_byte" not in rows[0]
    assert (metrics.tokens, metrics.samples) == (0, 12)
    assert "samples/s" in capsys.readouterr().out


def test_cores_near_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 1)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"u{device.index}")
    )
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(ConfigError, match=r"pip install flash-attn-train\[nvml\]"):
        cores_near_gpu(device)
    library = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: {"GPU-u1": 5}[uuid],
        nvmlDeviceGetCpuAffinity=lambda handle, words: [handle] + [0] * (words - 1),
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)
    assert cores_near_gpu(device) == [0, 2]


def test_layers_of_a_model() -> None:
    layers = layers_of(TinyTask().model)
    assert [name for name in layers if name.startswith("transformer.layers")] == [
        "transformer.layers.0",
        "transformer.layers.1",
    ]
    assert sum(len(parameters) for parameters in layers.values()) == len(list(TinyTask().model.parameters()))

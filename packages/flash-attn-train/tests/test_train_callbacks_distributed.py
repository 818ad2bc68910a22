"""Callbacks on two processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from flash_attn_train.loggers import read_metrics

WORKER = """
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
from flash_attn_train.callbacks import EMA, EMA_KEY, NormMonitor, WatchedRun, build_callbacks
from flash_attn_train.configs.callbacks import CallbacksConfig
from flash_attn_train.configs.task import LanguageModelConfig
from flash_attn_train.distributed import ending_process_group
from flash_attn_train.errors import TrainingError
from flash_attn_train.loggers import MetricsCSV
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

folder = Path(sys.argv[1])


class Task(pl.LightningModule):
    tokens_per_sample = 4
    grad_norm = None

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Embedding(8, 1)

    def training_step(self, batch, batch_idx):
        ids = batch["input_ids"]
        loss = self.model(ids).square().mean() + self.global_rank
        bad = self.global_step + 1 == 4 and self.global_rank == 1
        return loss * float("nan") if bad else loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train():
    _, callbacks = build_callbacks(CallbacksConfig(), WatchedRun(folder, LanguageModelConfig(), 2))
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_steps=6, callbacks=callbacks,
        use_distributed_sampler=False, logger=[MetricsCSV(folder / "metrics.csv")],
        enable_model_summary=False, enable_checkpointing=False,
    )
    rank = trainer.global_rank
    batches = [{"input_ids": torch.full((2 + rank, 4), i % 8)} for i in range(10)]
    try:
        trainer.fit(Task(), DataLoader(batches, batch_size=None))
    except TrainingError as error:
        (folder / f"error{rank}").write_text(str(error))


class Holder(pl.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model


# With FSDP2: norms and averages of what is spread over processes are those of the whole.
def measure_sharded():
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    sharded = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    sharded.load_state_dict(whole.state_dict())
    for layer in sharded:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)

    class FakeTrainer:
        global_step, max_steps, is_global_zero, strategy = 0, 1, torch.distributed.get_rank() == 0, None

    results = {}
    for name, model in (("whole", whole), ("sharded", sharded)):
        holder, trainer = Holder(model), FakeTrainer()
        ema, norms = EMA(0.5, warmup=False), NormMonitor(every_n_steps=1, per_layer=True)
        ema.on_train_start(trainer, holder)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        model(torch.ones(4, 3)).square().mean().backward()
        norms.on_before_optimizer_step(trainer, holder, optimizer)
        optimizer.step()
        trainer.global_step = 1
        ema.on_train_batch_end(trainer)
        checkpoint = {}
        ema.on_save_checkpoint(trainer, holder, checkpoint)
        again = EMA(0.5)
        again.on_load_checkpoint(trainer, holder, {EMA_KEY: checkpoint[EMA_KEY]})
        if trainer.is_global_zero:
            shared = [checkpoint[EMA_KEY]]
        else:
            shared = [None]
        torch.distributed.broadcast_object_list(shared)
        again.on_load_checkpoint(trainer, holder, {EMA_KEY: shared[0]})
        again.on_train_start(trainer, holder)
        assert all(map(torch.equal, again._averages, ema._averages))
        results[name] = (shared[0], norms.measure(trainer, holder, None))
    if FakeTrainer.is_global_zero:
        torch.save(results, folder / "sharded.pt")


with ending_process_group():
    train()
    measure_sharded()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, launch: Callable[..., str]) -> Path:
    """What two processes leave."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "worker.py").write_text(WORKER)
    launch(str(folder / "worker.py"), str(folder), ranks=2)
    return folder


def test_records_are_of_all_processes(folder: Path) -> None:
    rows = read_metrics(folder / "metrics.csv")
    assert [row["step"] for row in rows] == [2, 4]
    assert rows[0]["tokens"] == 2 * (2 + 3) * 4  # ranks have batches of 2 and 3 sequences of 4 tokens
    assert rows[0]["tokens_per_s_per_device"] == pytest.approx(rows[0]["tokens_per_s"] / 2)
    weights = torch.nn.Embedding(8, 1)
    torch.manual_seed(0)
    weights.reset_parameters()
    # Only row 1 is used in step 2, for the first time; the loss of rank r is higher by r.
    assert rows[0]["train/loss"] == pytest.approx(weights.weight[1].item() ** 2 + 0.5, rel=1e-6)


def test_bad_loss_of_one_process_stops_all(folder: Path) -> None:
    assert "in another process, a loss is not finite" in (folder / "error0").read_text()
    assert "step 4 is not finite; its batch is in" in (folder / "error1").read_text()
    saved = torch.load(folder / "nan_batch_rank1.pt", weights_only=True)
    assert saved["batches"][0]["input_ids"].tolist() == [[3] * 4] * 3
    assert not (folder / "nan_batch.pt").exists()


def test_averages_and_norms_of_sharded_weights(folder: Path) -> None:
    results = torch.load(folder / "sharded.pt", weights_only=True)
    (averages, norms), (sharded_averages, sharded_norms) = results["whole"], results["sharded"]
    assert averages.keys() == sharded_averages.keys() and norms.keys() == sharded_norms.keys()
    assert {"weight_norm", "weight_norm/model.0", "grad_norm/model.0"} - norms.keys() == {
        "weight_norm/model.0",
        "grad_norm/model.0",
    }
    for name, average in averages.items():
        torch.testing.assert_close(sharded_averages[name], average, rtol=1e-6, atol=1e-7)
    for name, value in norms.items():
        assert sharded_norms[name] == pytest.approx(value, rel=1e-5), name

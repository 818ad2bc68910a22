"""The report of a run, made from its files."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.image
import pytest
from flash_attn_train.config_changes import config_changes
from flash_attn_train.configs import TrainConfig
from flash_attn_train.report import main, write_report
from flash_attn_train.run_folder import RunFolder
from flash_attn_train.summary import RunResult, result_of
from omegaconf import OmegaConf

MODEL = {
    "parameters": {"total": 124_439_808, "trainable": 124_439_808, "embeddings": 39_383_808},
    "tokens_per_sample": 1024,
    "flops_per_sample": 875_000_000_000,
    "devices": 2,
    "precision": "bf16-mixed",
}


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "gpt2s"
    folder.mkdir()
    config = TrainConfig(seed=7)
    config.optimizer.lr = 0.0123
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    session = {
        "started": "2026-01-02T03:04:05+00:00",
        "first_step": 0,
        "data_key": "abc123",
        "device": "A device",
        "command": ["flash-attn-train", "seed=7"],
        "versions": {"torch": "2.13.0"},
    }
    (folder / "manifest.json").write_text(json.dumps({"sessions": [session, {**session, "first_step": 2}]}))
    (folder / "model.json").write_text(json.dumps(MODEL))
    (folder / "metrics.csv").write_text(
        "step,tokens,train/loss,lr,grad_norm,tokens_per_s,val/loss,val/perplexity,mfu,peak_memory_gib,data_wait\n"
        "0,0,,,,,4.0,54.6,,,\n"
        "1,100,3.9,0.01,2.0,1000,,,0.41,11.5,0.001\n"
        "2,200,3.0,0.02,1.0,1100,,,0.43,12.25,0.001\n"
        "2,200,,,,,2.5,12.18,,,\n"
        "3,300,2.9,0.01,0.5,1200,,,0.42,12.25,0.002\n"
        "3,300,,,,,2.75,15.6,,,\n"
        "4,400,2."
    )
    return folder


def test_report_says_everything(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run_folder)]) == 0
    assert capsys.readouterr().out.strip() == str(run_folder / "report.md")
    report = (run_folder / "report.md").read_text()
    for part in (
        "# Run gpt2s",
        "| first validation | step 0: loss 4, perplexity 54.6 |",
        "| best validation | step 2: loss 2.5, perplexity 12.18 |",
        "| last validation | step 3: loss 2.75, perplexity 15.6 |",
        "| tokens trained on | 300 |",
        "| tokens per second, all devices (median) | 1,100 |",
        "| MFU (median) | 42.0% |",
        "| peak memory per device | 12.25 GiB |",
        "| parameters | 124,439,808 |",
        "6 N + 12 L H Q T",
        "| data_key | abc123 |",
        "| 2026-01-02T03:04:05+00:00 | 2 | flash-attn-train seed=7 |",
        "| `seed` | `7` | `0` |",
        "| `optimizer.lr` | `0.0123` | `0.001` |",
        "| torch | 2.13.0 |",
        "(loss.png)",
        "(report/mfu.png)",
        "(report/memory.png)",
        "(report/learning_rate.png)",
    ):
        assert part in report, part
    pictures = [run_folder / "loss.png", *(run_folder / "report").glob("*.png")]
    assert len(pictures) == 7
    for picture in pictures:
        image = matplotlib.image.imread(picture)
        assert image.shape[0] >= 400 and image[..., :3].std() > 0.05, picture
    assert not list(run_folder.rglob("*.tmp"))


def test_report_of_a_run_that_has_just_begun(run_folder: Path) -> None:
    (run_folder / "metrics.csv").write_text("step,train/loss\n")
    (run_folder / "model.json").unlink()
    report = write_report(run_folder).read_text()
    assert "Nothing was recorded yet." in report and "## Curves" not in report


def test_report_of_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "expected the folder of a run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "content"), [("config.yaml", "a: ["), ("config.yaml", "[]"), ("manifest.json", "{")]
)
def test_report_of_damaged_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, content: str
) -> None:
    for name, text in (
        ("config.yaml", "seed: 0"),
        ("manifest.json", '{"sessions": []}'),
        ("metrics.csv", "step\n"),
    ):
        (tmp_path / name).write_text(text)
    (tmp_path / file).write_text(content)
    assert main([str(tmp_path)]) == 2
    assert f"{tmp_path / file}" in capsys.readouterr().err


def test_changes_are_against_the_chosen_variant() -> None:
    from flash_attn_train.configs.model import BertModelConfig

    saved = dataclasses.asdict(TrainConfig(model=BertModelConfig(d_model=64)))
    assert config_changes(saved) == {"model.d_model": (64, 768)}
    saved["model"]["gone"] = 1
    assert config_changes(saved)["model.gone"] == (1, None)


def test_result_on_a_machine_without_the_folder(tmp_path: Path) -> None:
    """As ranks of other machines have it."""
    metrics: Any = SimpleNamespace(tokens=5, samples=1, seconds=2.0)
    result = result_of(RunFolder(tmp_path / "run"), metrics)
    assert result.tokens == 5 and result.last_val == {} and math.isnan(result.last_val_loss)
    assert "validation loss  not measured here" in str(result)


def test_closing_lines() -> None:
    result = RunResult(
        folder=Path("run"),
        first_val={"val/loss": 2.3, "val/accuracy": 0.1},
        last_val={"val/loss": 0.25, "val/accuracy": 0.975},
        tokens=0,
        samples=6000,
        seconds=60.0,
        last_checkpoint=Path("run/checkpoints/last.ckpt"),
        best_checkpoint=Path("run/checkpoints/best.ckpt"),
        picture=Path("run/loss.png"),
        report=Path("run/report.md"),
        sample="one\ntwo",
    )
    assert str(result).splitlines() == [
        "validation loss  2.300 -> 0.250 nats per target (accuracy 97.50%)",
        "speed            100 samples/s in training (6,000 samples in 1:00)",
        "checkpoints      run/checkpoints/last.ckpt, best.ckpt beside it",
        "report           run/report.md, loss.png beside it",
        "sample",
        "    one",
        "    two",
    ]

"""Whole runs: what is written, printed and refused."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import pytorch_lightning as pl
import torch
from flash_attn_models import save_pretrained
from flash_attn_models.gpt import GPTConfig, GPTLMHeadModel
from flash_attn_train.callbacks import Metrics, build_callbacks
from flash_attn_train.checkpoints import read_checkpoint
from flash_attn_train.cli import compose_config
from flash_attn_train.configs import BertModelConfig, MaskedLMConfig, TrainConfig
from flash_attn_train.configs.callbacks import CausalityConfig
from flash_attn_train.configs.logger import WandbConfig
from flash_attn_train.configs.optimizer import ParameterOverride, SGDConfig
from flash_attn_train.configs.scheduler import MultiStepConfig, WSDConfig
from flash_attn_train.data import build_data
from flash_attn_train.errors import CheckpointError, ConfigError, DataError, OutputError, TrainingError
from flash_attn_train.loggers import read_metrics
from flash_attn_train.preflight import check_run
from flash_attn_train.run import train
from flash_attn_train.tasks import Task
from omegaconf import OmegaConf


def watch(monkeypatch: pytest.MonkeyPatch, callback: pl.Callback) -> None:
    """Adds a callback to the runs that follow."""

    def build(*arguments: Any) -> tuple[Metrics, list[pl.Callback]]:
        metrics, callbacks = build_callbacks(*arguments)
        return metrics, [*callbacks, callback]

    monkeypatch.setattr("flash_attn_train.run.build_callbacks", build)


def test_run_writes_everything_and_says_so(
    small_config: Callable[..., TrainConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config(logger={"tensorboard": True, "every_n_steps": 2}, trainer={"max_steps": 8})
    result = train(config)
    printed = capsys.readouterr().out

    for part in (
        "device     CPU",
        "attention  portable (not sm90 or sm80:",
        "documents",
        "to train on",
        "parameters, 1 layers",
        "step 0/8  validation loss",
        "step 2/8  loss",
        "tokens/s  ETA",
        f"validation loss  {result.first_val_loss:.3f} -> {result.last_val_loss:.3f}",
        str(result.last_checkpoint),
        str(result.report),
        "loss.png beside it",
        *result.sample.splitlines(),
    ):
        assert part in printed, part

    rows = read_metrics(result.folder / "metrics.csv")
    assert [row["step"] for row in rows if "train/loss" in row] == [2, 4, 6, 8]
    assert [row["step"] for row in rows if "val/loss" in row] == [0, 3, 6, 8]
    assert all(row["tokens"] == row["step"] * 4 * 16 for row in rows)
    assert all(row["tokens_per_s"] > 0 and row["grad_norm"] > 0 for row in rows if "train/loss" in row)
    assert result.tokens == 8 * 4 * 16

    picture = matplotlib.image.imread(result.picture)
    assert picture.shape[0] >= 400 and picture.shape[1] >= 600
    assert picture[..., :3].std() > 0.05  # something is drawn
    assert list((result.folder / "tensorboard").glob("events.out.tfevents.*"))
    assert (result.folder / "sample.txt").read_text() == result.sample
    saved = OmegaConf.load(result.folder / "config.yaml")
    assert saved.trainer.precision == "32-true" and saved.scheduler.decay_steps == 8  # resolved
    session = json.loads((result.folder / "manifest.json").read_text())["sessions"][0]
    assert session["first_step"] == 0
    # The keys of a schedule do not say which one it is.
    groups = "task=language_model model=gpt data=text optimizer=adamw scheduler=cosine strategy=single"
    assert session["groups"] == groups and groups in result.report.read_text()
    assert (result.folder / "config.yaml").read_text().startswith(f"# {groups}\n")
    assert read_checkpoint(result.best_checkpoint)["global_step"] in (3, 6, 8)


def test_learns(small_config: Callable[..., TrainConfig]) -> None:
    config = small_config(
        model={"d_model": 32},
        optimizer={"lr": 1e-2},
        trainer={"max_steps": 60, "batch_size": 8, "val_every_n_steps": 60},
        logger={"every_n_steps": 20},
    )
    result = train(config)
    assert result.last_val_loss < result.first_val_loss - 2.0


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_same_seed_same_run_and_other_seed_another(
    small_config: Callable[..., TrainConfig], model: str, tmp_path: Path
) -> None:
    shape = dataclasses.asdict(compose_config([f"model={model}"]).model)
    shape |= {"max_seqlen": 16, "n_layer": 1, "n_head": 2, "d_model": 16, "dropout": 0.1}
    states = []
    for number, seed in enumerate((0, 0, 1)):
        config = small_config(model=shape, seed=seed, output_dir=str(tmp_path / f"run{number}"))
        states.append(read_checkpoint(train(config).last_checkpoint)["state_dict"])
    for name in states[0]:
        assert torch.equal(states[0][name], states[1][name])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_bf16_runs_on_the_cpu(small_config: Callable[..., TrainConfig]) -> None:
    result = train(small_config(trainer={"precision": "bf16-mixed"}))
    assert 0 < result.last_val_loss < 7


def test_continuing_from_best_drops_what_came_after(small_config: Callable[..., TrainConfig]) -> None:
    config = small_config(trainer={"max_steps": 6, "val_every_n_steps": 2}, checkpoint={"every_n_steps": 3})
    first = train(config)
    expected = read_metrics(first.folder / "metrics.csv")
    config.resume = str(first.best_checkpoint)
    second = train(config)
    assert second.folder == first.folder
    again = read_metrics(first.folder / "metrics.csv")
    assert [row["step"] for row in again] == [row["step"] for row in expected]
    assert second.last_val_loss == first.last_val_loss


def test_longer_run_with_the_schedule_kept(small_config: Callable[..., TrainConfig]) -> None:
    config = small_config(scheduler={"decay_steps": 6, "warmup_steps": 2})
    train(config)
    longer = small_config(
        scheduler={"decay_steps": 6, "warmup_steps": 2}, trainer={"max_steps": 9}, resume="true"
    )
    result = train(longer)
    steps = [row["step"] for row in read_metrics(result.folder / "metrics.csv") if "train/loss" in row]
    assert steps == list(range(1, 10))


def test_epochs(small_config: Callable[..., TrainConfig]) -> None:
    config = small_config(trainer={"max_steps": -1, "max_epochs": 0.05})
    result = train(config)
    header = read_checkpoint(result.last_checkpoint)
    steps = header["global_step"]
    samples = len(build_data(config).train_samples)  # type: ignore[arg-type]
    assert steps == math.ceil(0.05 * samples / 4) > 1
    assert (header["config"]["trainer.max_steps"], header["config"]["trainer.max_epochs"]) == (steps, None)
    assert header["config"]["scheduler.decay_steps"] == steps
    # It resumes as it was given, and what differs is still found.
    config.resume = "true"
    assert train(config).last_val == result.last_val
    with pytest.raises(CheckpointError, match=r"scheduler\.decay_steps \(checkpoint"):
        train(small_config(trainer={"max_steps": -1, "max_epochs": 0.1}, resume="true"))


@pytest.mark.parametrize(
    ("profiler", "files", "part"),
    [
        ("simple", "fit-profile.txt", "training_step"),
        ("advanced", "fit-profile.txt", "training_step"),
        ("pytorch", "fit-*training_step*.json", "aten::"),
    ],
)
def test_profiler(small_config: Callable[..., TrainConfig], profiler: str, files: str, part: str) -> None:
    trainer = {"profiler": profiler, "max_steps": 16, "val_every_n_steps": 8}
    folder = train(small_config(trainer=trainer)).folder / "profiler"
    found = list(folder.glob(files))
    assert 1 <= len(found) <= 2 and part in found[0].read_text()  # not one for every few steps


def test_second_run_goes_to_its_own_folder(small_config: Callable[..., TrainConfig]) -> None:
    first, second = train(small_config()), train(small_config())
    assert second.folder == first.folder.with_name("run-2")


@pytest.mark.parametrize(
    ("changes", "error", "part"),
    [
        ({"data": {"path": "/nowhere"}}, DataError, "does not exist"),
        ({"model": {"max_seqlen": 9999}}, DataError, "expected at least 10000"),
        ({"model": {"n_layer": 0}}, ConfigError, "model.n_layer: got 0"),
        ({"model": {"position": "rotary", "n_head": 16}}, ConfigError, "model: GPTConfig.rotary_dim"),
        ({"output_dir": "/dev/null/run"}, OutputError, "output_dir: cannot write"),
        ({"resume": "true"}, CheckpointError, "no checkpoint of an earlier run"),
    ],
)
def test_bad_input_is_found_before_anything_is_written(
    small_config: Callable[..., TrainConfig], tmp_path: Path, changes: dict, error: type[Exception], part: str
) -> None:
    with pytest.raises(error) as caught:
        train(small_config(**changes))
    assert part in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize(("key", "value"), [("accelerator", "cuda"), ("precision", "16-mixed")])
def test_what_needs_a_gpu_says_so(small_config: Callable[..., TrainConfig], key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"trainer\.{key}: got '{value}'"):
        train(small_config(trainer={key: value}))


def test_failed_resume_changes_nothing(small_config: Callable[..., TrainConfig]) -> None:
    folder = train(small_config()).folder
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    with pytest.raises(CheckpointError, match=r"model\.n_layer \(checkpoint: 1, now: 2\)"):
        train(small_config(resume="true", model={"n_layer": 2}))
    with pytest.raises(CheckpointError, match="other training data"):
        train(small_config(resume="true", data={"val_fraction": 0.5}))
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainer": {"devices": 2}}, r"strategy: got single, but"),
        ({"logger": {"wandb": WandbConfig(enabled=True)}}, r"logger\.wandb\.enabled: .*not installed"),
        ({"callbacks": {"causality": CausalityConfig(enabled=True)}, "task": MaskedLMConfig(),
          "model": BertModelConfig(max_seqlen=16, n_layer=1, n_head=2, d_model=16)},
         r"callbacks\.causality\.enabled: got true"),
        ({"optimizer": {"overrides": [ParameterOverride("nothing.*", lr_multiplier=0.5)]}},
         r"optimizer\.overrides\[0\]\.pattern"),
        ({"optimizer": SGDConfig(momentum=0.0, nesterov=True)}, r"optimizer\.nesterov"),
        ({"scheduler": MultiStepConfig(milestones=[3, 2])}, r"scheduler\.milestones"),
        ({"scheduler": WSDConfig(warmup_steps=3, cooldown_steps=4)}, r"scheduler\.cooldown_steps"),
    ],
)  # fmt: skip
def test_what_cannot_work_leaves_no_folder(
    small_config: Callable[..., TrainConfig],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setattr("flash_attn_train.loggers.build.find_spec", lambda name: None)
    config = small_config(**changes)
    with pytest.raises(ConfigError, match=message):
        train(config)
    assert not Path(config.output_dir).exists()


@pytest.mark.parametrize("kind", ["run", "hub layout"])
def test_weights_that_do_not_fit_leave_no_folder(
    small_config: Callable[..., TrainConfig], tmp_path: Path, kind: str
) -> None:
    source = tmp_path / "wide"
    if kind == "run":
        train(small_config(model={"d_model": 32}, output_dir=str(source), trainer={"max_steps": 1}))
    else:
        shape = GPTConfig(vocab_size=300, max_seqlen=16, n_layer=1, n_head=2, d_model=32)
        save_pretrained(GPTLMHeadModel(shape), source)
    config = small_config(model={"warm_start": str(source)})
    with pytest.raises(
        CheckpointError, match=r"warm_start=.*\(300, 32\) instead of \(300, 16\)|another architecture"
    ):
        train(config)
    assert not Path(config.output_dir).exists()
    config.model = dataclasses.replace(config.model, d_model=32)
    assert train(config).last_checkpoint.exists()


def test_nothing_left_to_train_and_no_records(
    small_config: Callable[..., TrainConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint of the last step, brought from elsewhere."""
    first = train(small_config(output_dir=str(tmp_path / "first")))
    loose = first.last_checkpoint.rename(tmp_path / "loose.ckpt")
    result = train(small_config(resume=str(loose)))
    assert math.isnan(result.first_val_loss) and math.isnan(result.last_val_loss) and result.tokens == 0
    assert "validation loss  not measured here" in capsys.readouterr().out and result.report.exists()


def test_a_folder_is_for_one_run_at_a_time(
    small_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flash_attn_train.folder_lock._PATIENCE_S", 0.0)
    caught = []

    def start_another(task: Task) -> None:
        with pytest.raises(OutputError, match=r"another run is writing into .*set output_dir") as error:
            train(small_config(resume=str(folder / "checkpoints/last.ckpt")))
        caught.append(error)

    watch(monkeypatch, AtStep(4, start_another))
    config = small_config()
    folder = Path(config.output_dir)
    result = train(config)
    assert len(caught) == 1
    steps = [row["step"] for row in read_metrics(folder / "metrics.csv") if "train/loss" in row]
    assert steps == list(range(1, 7))
    # The lock is gone with the run.
    assert train(small_config(resume="true")).folder == result.folder


def test_two_runs_that_begin_at_once(
    small_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both saw that the folder was free: the second one writes nothing into the first one's."""
    config = small_config()

    def be_second(*arguments: Any) -> None:
        monkeypatch.undo()
        train(config)
        check_run(*arguments)

    monkeypatch.setattr("flash_attn_train.run.check_run", be_second)
    with pytest.raises(OutputError, match="another run has begun in"):
        train(config)
    assert len(json.loads((Path(config.output_dir) / "manifest.json").read_text())["sessions"]) == 1


def test_full_disk_at_the_start(
    small_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("flash_attn_train.run.write_manifest", full)
    with pytest.raises(OutputError, match=r"output_dir: cannot write .*No space left on device"):
        train(small_config())


def test_truncated_checkpoint_is_not_resumed_from(small_config: Callable[..., TrainConfig]) -> None:
    result = train(small_config())
    result.last_checkpoint.write_bytes(result.last_checkpoint.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"last\.ckpt .*truncated or damaged"):
        train(small_config(resume="true"))
    with pytest.raises(CheckpointError, match=r"last\.ckpt .*truncated or damaged"):
        train(small_config(resume="auto"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_says_how_to_continue(
    small_config: Callable[..., TrainConfig],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    class Interrupting(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *args: object) -> None:
            if trainer.global_step == 3:
                signal.raise_signal(number)

    watch(monkeypatch, Interrupting())
    config = small_config()
    with pytest.raises(SystemExit):
        train(config)
    printed = capsys.readouterr().out
    # Both leave the last complete step, although no checkpoint was due: SIGINT stops before the next, SIGTERM after.
    step = 3 if number == signal.SIGINT else 4
    last = Path(config.output_dir) / "checkpoints/last.ckpt"
    assert f"interrupted at step {step}; resume=true continues from {last}" in printed
    assert read_checkpoint(last)["global_step"] == step
    assert "step 6/6" not in printed


class AtStep(pl.Callback):
    """Calls a function with the task before the batch that follows this optimizer step."""

    def __init__(self, step: int, function: Callable[[Task], None]) -> None:
        self.step, self.function = step, function

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.global_step == self.step:
            assert isinstance(pl_module, Task)
            self.function(pl_module)


def poison(task: Task) -> None:
    """Makes the next loss NaN, once."""

    def no_number(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        handle.remove()
        return output * float("nan")

    handle = next(m for m in task.modules() if isinstance(m, torch.nn.Embedding)).register_forward_hook(
        no_number
    )


def test_nan_stops_the_run(small_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    watch(monkeypatch, AtStep(3, poison))
    config = small_config()
    with pytest.raises(TrainingError, match="step 4"):
        train(config)
    folder = Path(config.output_dir)
    assert torch.load(folder / "nan_batch.pt", weights_only=True)["step"] == 4
    assert read_checkpoint(folder / "checkpoints/last.ckpt")["global_step"] == 2  # the last good one


def test_nan_is_skipped_if_wanted(
    small_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    watch(monkeypatch, AtStep(3, poison))
    result = train(small_config(trainer={"nan": "skip"}))
    rows = read_metrics(result.folder / "metrics.csv")
    assert [row["skipped_steps"] for row in rows if "skipped_steps" in row][-1] == 1
    assert result.last_val_loss < result.first_val_loss


@pytest.mark.parametrize("save", [True, False])
def test_error_leaves_a_checkpoint_that_continues(
    small_config: Callable[..., TrainConfig],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    save: bool,
) -> None:
    def fail(task: Task) -> None:
        raise RuntimeError("out of luck")

    expected = train(small_config(output_dir=str(tmp_path / "whole"))).last_val_loss
    watch(monkeypatch, AtStep(3, fail))
    config = small_config(checkpoint={"save_on_error": save})
    with pytest.raises(RuntimeError, match="out of luck"):
        train(config)
    monkeypatch.undo()
    interrupted = Path(config.output_dir) / "checkpoints/interrupted.ckpt"
    assert interrupted.exists() == save
    if save:
        assert f"resume={interrupted} continues" in capsys.readouterr().out
        assert read_checkpoint(interrupted)["global_step"] == 3
        assert train(small_config(resume=str(interrupted))).last_val_loss == expected


def test_progress_bar_on_a_terminal(
    small_config: Callable[..., TrainConfig],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("flash_attn_train.callbacks.progress.is_terminal", lambda: True)
    train(small_config())
    printed = capsys.readouterr().out
    bars = [line for line in printed.replace("\n", "\r").split("\r") if line.startswith("training:")]
    assert any("/6 [" in bar and "loss 5." in bar and "tokens/s" in bar for bar in bars)
    assert "  ETA " not in printed  # the plain lines' words
    assert "step 6/6  validation loss" in printed


@pytest.mark.parametrize("prompt", ["the cat ", ""])
def test_sample_continues_the_prompt(small_config: Callable[..., TrainConfig], prompt: str) -> None:
    result = train(small_config(generation={"prompt": prompt}))
    assert result.sample.startswith(prompt) and len(result.sample) > len(prompt)
    assert (result.folder / "sample.txt").read_text() == result.sample


def test_table_of_the_model(
    small_config: Callable[..., TrainConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    train(small_config(callbacks={"model_summary": True}))
    printed = capsys.readouterr().out
    row = next(
        line for line in printed.splitlines() if line.startswith("model  ") and "GPTLMHeadModel" in line
    )
    assert row.split()[-1] in printed.split(" parameters, ")[0]  # the same count as in the opening lines


def test_no_sample_when_none_is_wanted(small_config: Callable[..., TrainConfig]) -> None:
    result = train(small_config(generation={"max_new_tokens": 0}))
    assert result.sample == "" and "\nsample" not in str(result)


def test_self_test_passes() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flash_attn_train"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("self-test passed")


def test_short_quickstart(tmp_path: Path, standard_library_cache: Path) -> None:
    """The quickstart command as a user runs it, but smaller and shorter."""
    smaller = ["tokenizer.vocab_size=512", "model.max_seqlen=64", "model.n_layer=2", "trainer.max_steps=6"]
    command = [sys.executable, "-m", "flash_attn_train.cli", "preset=quickstart", *smaller]
    command += ["trainer.val_sequences=16"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(standard_library_cache)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    for part in (
        "Python standard library",
        "validation loss",
        "tokens/s",
        "checkpoints",
        "loss.png",
        "\n    def __init__(self",
    ):
        assert part in done.stdout
    assert (tmp_path / "runs/quickstart/loss.png").exists()
    assert done.stderr == ""

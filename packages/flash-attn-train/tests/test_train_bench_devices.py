"""The benchmark of several devices: two processes on a CPU, with a model at which it measures nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from flash_attn_train.cli import compose_config
from flash_attn_train.distributed import data_parallel_size

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import bench_devices
from bench_devices import GROUPS, Contestant, Group, options_of, parameters_of, row_of


@pytest.mark.slow
def test_two_processes_and_back_to_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "devices.json"
    monkeypatch.setattr(sys, "argv", ["bench_devices.py", "--smoke", "--json", str(path)])
    assert bench_devices.main() == 0, path.read_text()
    result = json.loads(path.read_text())
    one, two, resumed = result["rows"]
    assert [row["devices"] for row in result["rows"]] == [1, 2, 1]
    assert {row["samples_per_step"] for row in result["rows"]} == {4}
    assert (one["times_of_first"], one["loss_gap"]) == (None, None)
    for row in (two, resumed):
        assert row["tokens_per_s"] > 0
        assert row["times_of_first"] == pytest.approx(row["tokens_per_s"] / one["tokens_per_s"], abs=2e-3)
        assert row["loss_gap"] < 1e-5  # the same samples in the same steps, in float32
        assert 0.0 <= row["data_wait"] <= 1.0
    assert resumed["loss"] == pytest.approx(one["loss"], rel=1e-5)  # after the same number of steps
    assert two["loss"] != resumed["loss"]


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.model)
def test_options_are_those_of_the_command_line(group: Group, tmp_path: Path) -> None:
    for contestant in group.contestants:
        config = compose_config(options_of(group, contestant, tmp_path, ()))
        trainer = config.trainer
        samples = trainer.batch_size * trainer.accumulate_grad_batches * data_parallel_size(config)
        assert samples == contestant.samples_per_step
        assert config.scheduler.decay_steps == group.steps >= trainer.max_steps
        assert trainer.max_steps % config.logger.every_n_steps == 0


def test_what_is_continued_ends_earlier_and_is_in_the_same_folder(tmp_path: Path) -> None:
    group = GROUPS[1]
    source, resumed = group.contestants[1:]
    assert resumed.continues == source.name
    assert (group.steps_of(source), group.steps_of(resumed)) == (20, 30)
    first, second = (options_of(group, contestant, tmp_path, ()) for contestant in (source, resumed))
    folder = next(option for option in first if option.startswith("output_dir="))
    assert folder in second
    assert folder.replace("output_dir=", "resume=") in second


def write_records(folder: Path, losses: list[float], speed: float, peak: float) -> None:
    folder.mkdir(parents=True)
    lines = ["step,train/loss,tokens_per_s,data_wait,peak_memory_gib,val/loss", "0,,,,,9.0"]
    lines += [
        f"{5 * number},{loss},{speed * (number > 3)},0.001,{peak}," for number, loss in enumerate(losses, 1)
    ]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")


def test_figures_of_a_row(tmp_path: Path) -> None:
    group = Group("gpt2-large", (Contestant("alone", 1, "single", 8), Contestant("two", 2, "fsdp2", 4)), 25)
    write_records(tmp_path / "alone", [4.0, 3.0, 2.0, 2.0, 1.0], 100.0, 16.0)
    write_records(tmp_path / "two", [4.0, 3.03, 2.0, 1.99, 1.0], 190.0, 9.0)
    alone, two = group.contestants
    parameters = 2**30
    first: dict[str, Any] = row_of(group, alone, tmp_path, parameters, None, 3.21)
    row = row_of(group, two, tmp_path, parameters, first, 4.0)
    assert first["tokens_per_s"] == 100  # the first three records do not count
    assert (first["state_gib"], row["state_gib"]) == (16.0, 8.0)
    assert (first["peak_memory_gib"], row["peak_memory_gib"]) == (16.0, 9.0)
    assert (row["times_of_first"], row["loss_gap"], row["seconds"]) == (1.9, 0.01, 4.0)


def test_losses_of_other_samples_are_not_compared(tmp_path: Path) -> None:
    group = Group("gpt2-large", (Contestant("alone", 1, "single", 8), Contestant("two", 2, "ddp", 8)), 25)
    for contestant in group.contestants:
        write_records(tmp_path / contestant.folder, [4.0] * 5, 100.0, 16.0)
    first = row_of(group, group.contestants[0], tmp_path, 1, None, 1.0)
    assert row_of(group, group.contestants[1], tmp_path, 1, first, 1.0)["loss_gap"] is None


def test_parameters_are_those_of_the_model() -> None:
    # GPT-2 large as published has 774,030,080, of which 50,257 tokens of 1,280 numbers each.
    assert parameters_of(GROUPS[1], ()) == 774_030_080 - (50257 - 8192) * 1280


def test_a_run_that_takes_too_long_is_ended_with_all_that_it_started(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def sleeper(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        """A process that starts another one, which would outlive it."""
        started.append(popen(["sh", "-c", "sleep 100 & echo started; wait"], **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", sleeper)
    monkeypatch.setattr(bench_devices, "TIMEOUT_S", 0.3)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"took more than 0\.3 s: started"):
        bench_devices.run(["model=gpt2-small"])
    assert time.monotonic() - began < 20
    left = popen(["ps", "-o", "stat=", "-g", str(started[0].pid)], stdout=subprocess.PIPE)
    assert all(state.startswith(b"Z") for state in left.communicate()[0].split())


def test_a_failed_run_says_what_it_printed() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)nonsense.*ended with 2: .*nonsense"):
        bench_devices.run(["nonsense=1"])

"""Checkpoint folders, links to checkpoints, and what a stopped run leaves."""

from __future__ import annotations

import importlib.util
import os
import pickle
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from flash_attn_train.atomic import link_path, new_folder_for, publish_folder
from flash_attn_train.checkpoints import AtomicCheckpointIO, consolidate, read_checkpoint, read_header
from flash_attn_train.distributed.checkpoint_folder import write_checkpoint_folder
from flash_attn_train.distributed.optimizer_state import renamed_state
from flash_attn_train.errors import CheckpointError


def _load_worker() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "distributed_worker", Path(__file__).with_name("distributed_worker.py")
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


worker = _load_worker()

GROUPS = [{"lr": 0.1, "params": ["b", "a"]}, {"lr": 0.2, "params": ["c"]}]


def write(path: Path, step: int) -> None:
    weights = {name: torch.full((1000,), float(step)) for name in "abc"}
    state: dict[str, dict[str, Any]] = {
        name: {"exp_avg": values + i, "step": torch.tensor(float(step)), "note": step}
        for i, (name, values) in enumerate(weights.items())
    }
    checkpoint = {"state_dict": weights, "optimizer_states": [{}], "global_step": step, "config": {"seed": 1}}
    write_checkpoint_folder(path, checkpoint, [(state, GROUPS)])


def names(folder: Path) -> list[str]:
    """Entries with what is random about them left out."""
    return sorted(
        entry.name[: -len("01234567")] + "*" if entry.name[0] == "." else entry.name
        for entry in folder.iterdir()
    )


@pytest.fixture
def last(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoints" / "last.ckpt"
    write(path, 3)
    return path


def test_folder_is_read_as_a_single_process_would_have_written_it(last: Path) -> None:
    checkpoint = read_checkpoint(last)
    assert checkpoint["global_step"] == 3 and checkpoint["config"] == {"seed": 1}
    assert list(checkpoint["state_dict"]) == ["a", "b", "c"]
    assert torch.equal(checkpoint["state_dict"]["a"], torch.full((1000,), 3.0))
    (optimizer,) = checkpoint["optimizer_states"]
    assert [group["params"] for group in optimizer["param_groups"]] == [[0, 1], [2]]
    # Numbers in the order of the groups: b, a, c.
    assert [optimizer["state"][i]["exp_avg"][0].item() for i in range(3)] == [4.0, 3.0, 5.0]
    assert optimizer["state"][0]["step"].item() == 3.0 and optimizer["state"][0]["note"] == 3
    assert consolidate(last).keys() == {"a", "b", "c"}
    assert read_header(last) == {"global_step": 3, "config": {"seed": 1}}


def test_a_new_folder_replaces_the_one_before(last: Path) -> None:
    write(last, 4)
    assert read_checkpoint(last)["global_step"] == 4
    assert names(last.parent) == [".last.ckpt.*", "last.ckpt"]


def test_files_and_folders_replace_each_other(last: Path) -> None:
    files = AtomicCheckpointIO()
    files.save_checkpoint({"global_step": 5}, last)
    assert read_checkpoint(last)["global_step"] == 5 and names(last.parent) == ["last.ckpt"]
    assert read_header(last) == {"global_step": 5}
    write(last, 6)
    copy = last.with_name("copied.ckpt")
    shutil.copytree(last, copy)  # what copying a run folder makes of the link
    assert read_checkpoint(copy)["global_step"] == 6
    write(copy, 7)
    assert read_checkpoint(copy)["global_step"] == 7
    files.remove_checkpoint(copy)
    files.remove_checkpoint(last)
    assert names(last.parent) == []


def test_file_system_without_links(last: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "symlink", refuse)
    write(last, 4)
    write(last, 5)
    assert read_checkpoint(last)["global_step"] == 5 and names(last.parent) == ["last.ckpt"]


@pytest.mark.parametrize("damage", ["cut", "flip", "lose", "lose manifest", "lose rest"])
def test_damaged_folder(last: Path, damage: str) -> None:
    data = next((last / "tensors").glob("*.distcp"))
    if damage == "cut":
        os.truncate(data, data.stat().st_size - 1)
    elif damage == "flip":
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    else:
        {"lose": data, "lose manifest": last / "manifest.json", "lose rest": last / "rest.pt"}[
            damage
        ].unlink()
    with pytest.raises(CheckpointError, match=r"truncated or damaged: .*Nothing was loaded"):
        read_checkpoint(last)


def test_folder_that_was_being_written_is_no_checkpoint(last: Path) -> None:
    half = new_folder_for(last)
    (half / "tensors").mkdir()
    assert read_checkpoint(last)["global_step"] == 3
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        read_checkpoint(half)
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        read_header(half)
    write(last, 4)
    assert names(last.parent) == [".last.ckpt.*", "last.ckpt"]


class Code:
    def __reduce__(self) -> Any:
        return os.getcwd, ()


def test_code_in_a_folder_is_not_run(last: Path) -> None:
    (last / "tensors" / ".metadata").write_bytes(pickle.dumps(Code()))
    (last / "manifest.json").write_text('{"files": {}}')  # an attacker would make it fit
    with pytest.raises(CheckpointError, match="which no checkpoint needs"):
        read_checkpoint(last)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing beyond this many bytes fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_keeps_the_folder_before(last: Path) -> None:
    with largest_file(4096), pytest.raises(CheckpointError) as error:
        write(last, 4)
    assert f"cannot write checkpoint {last}" in str(error.value)
    assert "the one before is still there" in str(error.value)
    assert read_checkpoint(last)["global_step"] == 3
    assert names(last.parent) == [".last.ckpt.*", "last.ckpt"]


def test_full_disk_keeps_the_file_before(tmp_path: Path) -> None:
    path, files = tmp_path / "last.ckpt", AtomicCheckpointIO()
    files.save_checkpoint({"global_step": 3}, path)
    with largest_file(4096), pytest.raises(CheckpointError, match="the one before is still there"):
        files.save_checkpoint({"global_step": 4, "weights": torch.ones(10000)}, path)
    assert read_checkpoint(path)["global_step"] == 3 and names(tmp_path) == ["last.ckpt"]


def test_no_space_while_tensors_are_written(last: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def disk_full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", disk_full)
    with pytest.raises(CheckpointError, match="No space left on device; the one before is still there"):
        write(last, 4)
    assert read_checkpoint(last)["global_step"] == 3


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_links_do_not_follow_what_they_were_made_of(tmp_path: Path, kind: str) -> None:
    def save(step: int) -> None:
        if kind == "folder":
            write(tmp_path / "last.ckpt", step)
        else:
            AtomicCheckpointIO().save_checkpoint({"global_step": step}, tmp_path / "last.ckpt")

    save(3)
    link_path(tmp_path / "last.ckpt", tmp_path / "step-3.ckpt")
    link_path(tmp_path / "last.ckpt", tmp_path / "step-3.ckpt")
    save(4)
    assert read_checkpoint(tmp_path / "step-3.ckpt")["global_step"] == 3
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 4
    assert len(names(tmp_path)) == (4 if kind == "folder" else 2)


def test_publishing_leaves_no_moment_without_a_checkpoint(
    last: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, seen = os.replace, []

    def watching(source: Any, target: Any) -> None:
        seen.append(read_checkpoint(last)["global_step"])
        replace(source, target)
        seen.append(read_checkpoint(last)["global_step"])

    folder = new_folder_for(last)
    shutil.copytree(last, folder, dirs_exist_ok=True)
    monkeypatch.setattr(os, "replace", watching)
    publish_folder(folder, last)
    assert seen == [3, 3]


def test_other_groups_of_parameters() -> None:
    numbered = {"state": {}, "param_groups": [{"params": [0, 1, 2]}]}
    with pytest.raises(CheckpointError, match=r"groups of \[3\] parameters, expected \[2, 1\]"):
        renamed_state(numbered, GROUPS)


def test_an_error_leaves_a_checkpoint_of_the_last_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the middle of a step, with gradients half accumulated and random numbers drawn."""
    common: dict[str, Any] = {
        "strategy": "single",
        "dropout": 0.2,
        "steps": 6,
        "trainer_options": {"batch_size": 2, "accumulate_grad_batches": 2},
    }
    whole = worker.run(folder=str(tmp_path / "whole"), **common)
    failed = worker.run(folder=str(tmp_path / "failed"), mode="error", **common)
    assert failed["error"] == "planned"
    interrupted = tmp_path / "failed" / "interrupted.ckpt"
    assert f"resume={interrupted} continues" in capsys.readouterr().out
    assert not (tmp_path / "failed" / "last.ckpt").exists()
    again = worker.run(folder=str(tmp_path / "again"), resume=str(interrupted), **common)
    assert again["losses"] == whole["losses"][3:]
    assert again["norms"] == whole["norms"][3:]


@pytest.mark.parametrize(("name", "code", "step"), [("SIGTERM", 128 + 15, 3), ("SIGINT", 1, 2)])
def test_stopped_runs_continue_bit_for_bit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, code: int, step: int
) -> None:
    """SIGTERM finishes the step that it came in; Ctrl-C leaves the one before."""
    common: dict[str, Any] = {"strategy": "single", "dropout": 0.2, "steps": 5}
    whole = worker.run(folder=str(tmp_path / "whole"), **common)
    stopped = worker.run(folder=str(tmp_path / "stopped"), mode=name, **common)
    last = tmp_path / "stopped" / "last.ckpt"
    assert stopped["exit"] == code and read_header(last)["global_step"] == step
    assert f"interrupted at step {step}; resume=true continues from {last}" in capsys.readouterr().out
    again = worker.run(folder=str(tmp_path / "again"), resume=str(last), **common)
    assert again["losses"] == whole["losses"][step:] and again["norms"] == whole["norms"][step:]


def test_kept_checkpoints(tmp_path: Path) -> None:
    save = {"keep_every_n_steps": 2, "keep_top_k": 2}
    worker.run(strategy="single", folder=str(tmp_path), steps=5, every_n_steps=100, save=save)
    found = {path.name: read_checkpoint(path)["global_step"] for path in tmp_path.iterdir()}
    assert found == {
        "step-2.ckpt": 2,
        "step-4.ckpt": 4,
        "last.ckpt": 5,
        "best.ckpt": 5,
        "best-step-5.ckpt": 5,
    }

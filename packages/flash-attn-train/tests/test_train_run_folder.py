"""Where a run goes and what it continues."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from flash_attn_train.configs import TrainConfig
from flash_attn_train.errors import CheckpointError, OutputError
from flash_attn_train.run_folder import RunFolder, choose_run_folder, write_config, write_manifest


def make_run(path: Path, *, with_checkpoint: bool) -> RunFolder:
    folder = RunFolder(path)
    folder.last_checkpoint.parent.mkdir(parents=True)
    write_config(folder, TrainConfig())
    if with_checkpoint:
        folder.last_checkpoint.write_bytes(b"")
        folder.best_checkpoint.write_bytes(b"")
    return folder


def choose(base: Path, resume: str = "false") -> tuple[Path, Path | None]:
    folder, checkpoint = choose_run_folder(TrainConfig(output_dir=str(base), resume=resume))
    return folder.path, checkpoint


def test_new_run_makes_nothing_yet(tmp_path: Path) -> None:
    assert choose(tmp_path / "deep" / "run") == (tmp_path / "deep" / "run", None)
    assert list(tmp_path.iterdir()) == []


def test_earlier_runs_are_never_written_into(tmp_path: Path) -> None:
    base = tmp_path / "run"
    base.mkdir()
    (base / "notes.txt").write_text("not a run")
    assert choose(base) == (base, None)
    make_run(tmp_path / "other", with_checkpoint=False)
    assert choose(tmp_path / "other") == (tmp_path / "other-2", None)
    make_run(tmp_path / "other-2", with_checkpoint=True)
    assert choose(tmp_path / "other") == (tmp_path / "other-3", None)


@pytest.mark.parametrize("resume", ["true", "True", "auto"])
def test_newest_run_with_a_checkpoint_is_continued(tmp_path: Path, resume: str) -> None:
    base = tmp_path / "run"
    make_run(base, with_checkpoint=True)
    second = make_run(tmp_path / "run-2", with_checkpoint=True)
    make_run(tmp_path / "run-3", with_checkpoint=False)
    assert choose(base, resume) == (second.path, second.last_checkpoint)


def test_nothing_to_continue(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"resume=true: no checkpoint .*resume=auto"):
        choose(tmp_path / "run", "true")
    assert choose(tmp_path / "run", "auto") == (tmp_path / "run", None)


def test_path_of_a_checkpoint_or_run_folder(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", with_checkpoint=True)
    base = tmp_path / "new"
    assert choose(base, str(run.path)) == (run.path, run.last_checkpoint)
    assert choose(base, str(run.best_checkpoint)) == (run.path, run.best_checkpoint)
    loose = tmp_path / "loose.ckpt"
    loose.write_bytes(b"")
    assert choose(base, str(loose)) == (base, loose)
    with pytest.raises(CheckpointError, match=r"resume: got .*nowhere"):
        choose(base, str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match="is not a run folder"):
        choose(base, str(tmp_path))


def test_checkpoint_that_is_a_folder(tmp_path: Path) -> None:
    """As ranks write it together: resumed from like a file, by whatever name."""
    run = make_run(tmp_path / "run", with_checkpoint=True)
    base = tmp_path / "new"
    for place in (run.path / "checkpoints" / "step-4.ckpt", tmp_path / "copy"):
        (place / "tensors").mkdir(parents=True)
        (place / "manifest.json").write_text("{}")
        assert choose(base, str(place)) == (run.path if place.suffix else base, place)


def test_name_that_cannot_be_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_config(RunFolder(tmp_path), TrainConfig())
    assert choose(Path("."))[0] == tmp_path.with_name(f"{tmp_path.name}-2")


def test_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(OutputError, match=r"output_dir: cannot write to .*Set output_dir"):
            choose(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="Permission denied"):
        choose(tmp_path / "run")


def test_manifest_grows_with_each_session(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    write_manifest(folder, {"first_step": 0})
    write_manifest(folder, {"first_step": 40})
    sessions = json.loads(folder.manifest.read_text())["sessions"]
    assert [session["first_step"] for session in sessions] == [0, 40]
    assert sessions[0]["versions"]["flash-attn-train"] == "0.1.0"
    assert sessions[0]["versions"]["torch"].startswith("2.")


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"sessions": 1}'])
def test_damaged_manifest(tmp_path: Path, content: str) -> None:
    folder = RunFolder(tmp_path)
    folder.manifest.write_text(content)
    with pytest.raises(OutputError, match=r"manifest\.json cannot be read .*Remove it"):
        write_manifest(folder, {})
    assert folder.manifest.read_text() == content

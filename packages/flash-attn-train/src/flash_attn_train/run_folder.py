"""Where a run keeps its files, and which earlier run it continues.

::

    runs/quickstart/            output_dir; a second run goes to runs/quickstart-2, and so on
      config.yaml               the resolved config
      manifest.json             versions, machine, data: one entry per start or resume
      tokenizer.json            of text;  labels.json  names of the classes, of classification
      checkpoints/last.ckpt     checkpoints/best.ckpt
      metrics.csv  tensorboard/ loss.png  sample.txt
"""

from __future__ import annotations

import itertools
import json
import platform
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

import flash_attn_train
from flash_attn_train.atomic import atomic_write
from flash_attn_train.configs import TrainConfig
from flash_attn_train.errors import CheckpointError, OutputError

_DISTRIBUTIONS = (
    "flash-attn-models",
    "flash-attn-ops",
    "flash-attn-kernels",
    "torch",
    "triton",
    "pytorch-lightning",
    "tokenizers",
    "numpy",
)


@dataclass(frozen=True)
class RunFolder:
    """Paths inside one run folder."""

    path: Path

    @property
    def last_checkpoint(self) -> Path:
        return self.path / "checkpoints" / "last.ckpt"

    @property
    def best_checkpoint(self) -> Path:
        return self.path / "checkpoints" / "best.ckpt"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.csv"

    @property
    def picture(self) -> Path:
        return self.path / "loss.png"

    @property
    def sample(self) -> Path:
        return self.path / "sample.txt"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer.json"

    @property
    def labels(self) -> Path:
        return self.path / "labels.json"

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"


def choose_run_folder(config: TrainConfig) -> tuple[RunFolder, Path | None]:
    """The folder of this run, which may not exist yet, and the checkpoint to continue from, if any.

    Raises:
        CheckpointError: ``resume`` asks for a checkpoint that is not there.
        OutputError: the folder cannot be written.
    """
    folder, checkpoint = _resolve_resume(config)
    _check_writable(folder.path)
    return folder, checkpoint


def _resolve_resume(config: TrainConfig) -> tuple[RunFolder, Path | None]:
    earlier = list(itertools.takewhile(_holds_run, _numbered(config.output_dir)))
    fresh = next(itertools.islice(_numbered(config.output_dir), len(earlier), None))
    resume = config.resume.strip()
    if resume.lower() in ("false", ""):
        return fresh, None
    if resume.lower() in ("true", "auto"):
        for folder in reversed(earlier):
            if folder.last_checkpoint.exists():
                return folder, folder.last_checkpoint
        if resume.lower() == "auto":
            return fresh, None
        raise CheckpointError(
            f"resume=true: no checkpoint of an earlier run in {config.output_dir}; expected "
            f"{RunFolder(Path(config.output_dir)).last_checkpoint}. Set output_dir to the run's folder, or "
            "use resume=auto to start a new run where there is none."
        )
    path = Path(resume).expanduser()
    if path.is_dir():
        folder = RunFolder(path)
        if not folder.last_checkpoint.exists():
            raise CheckpointError(
                f"resume: {path} is not a run folder: {folder.last_checkpoint} does not exist."
            )
        return folder, folder.last_checkpoint
    if not path.exists():
        raise CheckpointError(
            f"resume: got {resume!r}, expected true, false, auto, or the path of an existing checkpoint "
            "or run folder."
        )
    in_run_folder = path.parent.name == "checkpoints" and _holds_run(RunFolder(path.parent.parent))
    return (RunFolder(path.parent.parent) if in_run_folder else fresh), path


def _numbered(output_dir: str) -> Iterator[RunFolder]:
    """output_dir, output_dir-2, output_dir-3, ..."""
    base = Path(output_dir).expanduser()
    if base.name in ("", ".."):  # "." and the like: no name to put a number behind
        base = base.resolve()
    yield RunFolder(base)
    for number in itertools.count(2):
        yield RunFolder(base.with_name(f"{base.name}-{number}"))


def _holds_run(folder: RunFolder) -> bool:
    return folder.config.exists()


def _check_writable(path: Path) -> None:
    """Raises OutputError unless files can be created at ``path``; leaves nothing behind."""
    existing = path
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        with tempfile.TemporaryDirectory(prefix=".writable-", dir=existing):
            pass
    except OSError as error:
        raise OutputError(
            f"output_dir: cannot write to {path} ({existing}: {error.strerror}); expected a folder that can "
            "be written. Set output_dir to one."
        ) from error


def write_labels(folder: RunFolder, names: Sequence[str]) -> None:
    """Names of the classes, by class number."""
    with atomic_write(folder.labels) as file:
        file.write((json.dumps(list(names), ensure_ascii=False, indent=2) + "\n").encode())


def read_labels(folder: RunFolder) -> list[str]:
    """Names of the classes, by class number; none where the run has none.

    Raises:
        CheckpointError: the file cannot be read.
    """
    if not folder.labels.is_file():
        return []
    try:
        names = json.loads(folder.labels.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder.labels} cannot be read: {error}. Remove it to go on without the classes' names."
        ) from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(
            f"{folder.labels}: got {names!r:.80}, expected a list of the classes' names. Remove it to go on without "
            "them."
        )
    return names


def write_config(folder: RunFolder, config: TrainConfig) -> None:
    with atomic_write(folder.config) as file:
        file.write(OmegaConf.to_yaml(OmegaConf.structured(config)).encode())


def write_manifest(folder: RunFolder, session: dict[str, Any]) -> None:
    """Adds an entry for this start or resume: versions, machine, and what ``session`` says."""
    earlier = json.loads(folder.manifest.read_text())["sessions"] if folder.manifest.exists() else []
    entry = {
        **session,
        "command": sys.argv,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {"flash-attn-train": flash_attn_train.__version__, **_versions()},
    }
    with atomic_write(folder.manifest) as file:
        file.write((json.dumps({"sessions": [*earlier, entry]}, indent=2) + "\n").encode())


def _versions() -> dict[str, str]:
    versions = {}
    for name in _DISTRIBUTIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # run from a source tree, or not needed here
            versions[name] = "not installed as a distribution"
    return versions

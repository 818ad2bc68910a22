"""Where a run keeps its files, and which earlier run it continues.

::

    runs/quickstart/            output_dir; a second run goes to runs/quickstart-2, and so on
      config.yaml               the resolved config
      manifest.json             versions, machine, data: one entry per start or resume
      tokenizer.json            of text;  labels.json  names of the classes, of classification
      checkpoints/last.ckpt     checkpoints/best.ckpt
      metrics.csv  tensorboard/ loss.png  sample.txt
      profiler/                 of trainer.profiler
"""

from __future__ import annotations

import itertools
import json
import platform
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

import flash_attn_train
from flash_attn_train.atomic import atomic_write
from flash_attn_train.configs import TrainConfig
from flash_attn_train.configs.store import describe_entries
from flash_attn_train.distributed.checkpoint_folder import is_checkpoint_folder
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
    def profiler(self) -> Path:
        return self.path / "profiler"

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"


def find_checkpoint(source: str) -> Path | None:
    """The checkpoint that a source names, a file, or a folder into which many ranks wrote; of a run folder the last
    one. None where it can only be a model in Hugging Face layout.

    Raises:
        CheckpointError: a run folder without a checkpoint.
    """
    path = Path(source).expanduser()
    folder = RunFolder(path)
    if folder.last_checkpoint.exists():
        return folder.last_checkpoint
    if folder.config.exists():
        raise CheckpointError(f"{source}: {folder.last_checkpoint} does not exist. Name another checkpoint.")
    if path.suffix == ".ckpt" or path.is_file() or is_checkpoint_folder(path):
        return path
    return None


def folder_of_checkpoint(path: Path) -> RunFolder | None:
    """The run folder that a checkpoint is in; None of one by itself."""
    return RunFolder(path.parent.parent) if path.parent.name == "checkpoints" else None


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
    if not path.exists():
        raise CheckpointError(
            f"resume: got {resume!r}, expected true, false, auto, or the path of an existing checkpoint "
            "or run folder."
        )
    checkpoint = find_checkpoint(resume)
    if checkpoint is None:
        raise CheckpointError(
            f"resume: {path} is not a run folder: {RunFolder(path).last_checkpoint} does not exist."
        )
    its_folder = folder_of_checkpoint(checkpoint)
    return (its_folder if its_folder is not None and _holds_run(its_folder) else fresh), checkpoint


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


@contextmanager
def writing_into(folder: RunFolder) -> Iterator[None]:
    """Makes an OutputError of what the system says against writing a file of the run."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"output_dir: cannot write {error.filename or folder.path}: {error.strerror or error}; expected a folder "
            "that can be written, with room. What is there already is kept."
        ) from error


def write_config(folder: RunFolder, config: TrainConfig) -> None:
    text = f"# {describe_entries(config)}\n" + OmegaConf.to_yaml(OmegaConf.structured(config))
    with atomic_write(folder.config) as file:
        file.write(text.encode())


def read_sessions(folder: RunFolder) -> list[dict[str, Any]]:
    """What :func:`write_manifest` wrote, the first start first.

    Raises:
        OutputError: the file cannot be read.
    """
    try:
        return list(json.loads(folder.manifest.read_text(encoding="utf-8"))["sessions"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(
            f"{folder.manifest} cannot be read ({type(error).__name__}: {error}); expected what a run wrote. Remove it "
            "to go on without the record of earlier starts."
        ) from error


def write_manifest(folder: RunFolder, session: dict[str, Any]) -> None:
    """Adds an entry for this start or resume: versions, machine, and what ``session`` says."""
    earlier = read_sessions(folder) if folder.manifest.exists() else []
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

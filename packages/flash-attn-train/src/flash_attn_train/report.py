"""The report of a run: ``report.md`` with curves, made from the files in the run folder alone.

Every run writes it at its end. ``python -m flash_attn_train.report RUN_FOLDER`` makes it again, also for a run that
was killed or is still going on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from yaml import YAMLError  # type: ignore[import-untyped, unused-ignore]

from flash_attn_train.atomic import atomic_write
from flash_attn_train.command import command
from flash_attn_train.config_changes import config_changes
from flash_attn_train.errors import ConfigError
from flash_attn_train.figures import LOSS, PICTURES, Picture, Rows, draw
from flash_attn_train.loggers import read_metrics
from flash_attn_train.run_folder import RunFolder, read_sessions
from flash_attn_train.summary import RunResult, describe_run, result_of

__all__ = ["RunResult", "describe_run", "main", "result_of", "write_report"]


def write_report(folder: Path) -> Path:
    """Writes ``report.md``, ``loss.png`` and the other curves (in ``report/``) of a run. Returns the report's path.

    Raises:
        UserError: the folder is not that of a run, or a file in it is damaged.
    """
    for name in ("config.yaml", "manifest.json", "metrics.csv"):
        if not (folder / name).is_file():
            raise ConfigError(f"got {folder}, expected the folder of a run: {folder / name} does not exist.")
    rows = read_metrics(folder / "metrics.csv")
    sessions = read_sessions(RunFolder(folder))
    model = folder / "model.json"
    saved = _saved_config(folder / "config.yaml")
    sections = [
        f"# Run {folder.resolve().name}",
        _results(rows),
        _curves(folder, rows),
        _model(json.loads(model.read_text())) if model.exists() else "",
        _setup(sessions),
        _config(saved),
        _versions(sessions[-1]),
    ]
    path = folder / "report.md"
    with atomic_write(path) as file:
        file.write("\n\n".join(section for section in sections if section).encode() + b"\n")
    return path


def _saved_config(path: Path) -> dict[str, Any]:
    try:
        saved = OmegaConf.to_container(OmegaConf.load(path))
    except YAMLError as error:
        raise ConfigError(f"{path} cannot be read: {error}; expected what a run wrote.") from error
    if not isinstance(saved, dict):
        raise ConfigError(
            f"{path}: got a {type(saved).__name__}, expected keys and values, as a run writes them."
        )
    return {str(key): value for key, value in saved.items()}


def _results(rows: Rows) -> str:
    lines = []
    validations = [row for row in rows if "val/loss" in row]
    if validations:
        best = min(validations, key=lambda row: row["val/loss"])
        for title, row in (("first", validations[0]), ("best", best), ("last", validations[-1])):
            values = ", ".join(
                f"{k.removeprefix('val/')} {v:.4g}" for k, v in row.items() if k.startswith("val/")
            )
            lines.append((f"{title} validation", f"step {row['step']:.0f}: {values}"))
    training = [row for row in rows if "train/loss" in row]
    if training:
        last = training[-1]
        lines.append(("last training loss", f"{last['train/loss']:.4g} at step {last['step']:.0f}"))
        for unit in ("tokens", "samples"):
            if unit in last:
                lines.append((f"{unit} trained on", f"{last[unit]:,.0f}"))
        for column, title, text in (
            ("tokens_per_s", "tokens per second, all devices", "{:,.0f}"),
            ("samples_per_s", "samples per second, all devices", "{:,.0f}"),
            ("step_time_s", "seconds per step", "{:.4g}"),
            ("mfu", "MFU", "{:.1%}"),
            ("data_wait", "share of time waiting for data", "{:.2%}"),
        ):
            measured = [row[column] for row in training if column in row]
            if measured:
                lines.append((f"{title} (median)", text.format(statistics.median(measured))))
        peaks = [row["peak_memory_gib"] for row in training if "peak_memory_gib" in row]
        if peaks:
            lines.append(("peak memory per device", f"{max(peaks):.2f} GiB"))
    return "## Results\n\n" + (_table(("what", "value"), lines) if lines else "Nothing was recorded yet.")


def _curves(folder: Path, rows: Rows) -> str:
    links = []
    if draw(LOSS, rows, folder / LOSS.file, title=f"{folder.resolve().name}: loss"):
        links.append(_link(LOSS, LOSS.file))
    (folder / "report").mkdir(exist_ok=True)
    for picture in PICTURES:
        if draw(picture, rows, folder / "report" / picture.file):
            links.append(_link(picture, f"report/{picture.file}"))
    return "## Curves\n\n" + "\n\n".join(links) if links else ""


def _link(picture: Picture, target: str) -> str:
    return f"![{picture.title}, {picture.unit}, over optimizer steps]({target})"


def _model(facts: dict[str, Any]) -> str:
    parameters, flops = facts["parameters"], facts["flops_per_sample"]
    lines = [
        ("parameters", f"{parameters['total']:,}"),
        ("trained", f"{parameters['trainable']:,}"),
        ("in embeddings", f"{parameters['embeddings']:,}"),
        ("tokens per sample", f"{facts['tokens_per_sample']:,}"),
        ("devices, precision", f"{facts['devices']}, {facts['precision']}"),
    ]
    note = ""
    if flops is not None:
        lines.append(("FLOPs per sample, forward and backward", f"{flops:.4g}"))
        note = (
            "\n\nFLOPs are 6 N + 12 L H Q T per token: N weights of the matrices that a token is multiplied with, "
            "output layer included and embeddings not; L layers, H heads of width Q, T tokens of context, causal "
            "attention not halved."
        )
    return "## Model\n\n" + _table(("what", "value"), lines) + note


def _setup(sessions: Sequence[dict[str, Any]]) -> str:
    known = {"started", "first_step", "command", "versions"}
    last = [(key, str(value)) for key, value in sessions[-1].items() if key not in known]
    starts = [
        (str(s.get("started", "")), str(s.get("first_step", "")), " ".join(s["command"])) for s in sessions
    ]
    sections = [
        "## Machine and data\n\n" + _table(("what", "value"), last),
        "## Sessions\n\n" + _table(("started", "from step", "command"), starts),
    ]
    return "\n\n".join(sections)


def _config(saved: dict[str, Any]) -> str:
    changes = [
        (f"`{key}`", f"`{value}`", f"`{default}`") for key, (value, default) in config_changes(saved).items()
    ]
    if not changes:
        return "## Config\n\nAll options have their defaults."
    return "## Config\n\nWhat differs from the defaults; all of it is in `config.yaml`.\n\n" + _table(
        ("option", "value", "default"), changes
    )


def _versions(session: dict[str, Any]) -> str:
    versions = [(name, str(version)) for name, version in session["versions"].items()]
    return "## Versions\n\n" + _table(("distribution", "version"), versions)


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", r"\|").replace("\n", " ") for cell in line) + " |"
        for line in lines
    )


@command("flash-attn-train")
def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code, see :func:`~flash_attn_train.command.command`."""
    parser = argparse.ArgumentParser(
        prog="python -m flash_attn_train.report", description="Write the report of a run again."
    )
    parser.add_argument("run_folder", type=Path, help="folder of the run, such as runs/quickstart")
    folder: Path = parser.parse_args(argv).run_folder
    print(write_report(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())

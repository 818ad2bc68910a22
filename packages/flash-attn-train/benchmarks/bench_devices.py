"""Training on two GPUs: speed, loss and memory of each strategy against one GPU.

Every contestant is a run of the command line on the source of Python's standard library, in a process of its own, one
after the other. Speed is the median over training records from the fourth on; memory the highest peak of the first
process. Losses of runs with the same samples in each step can be compared: rounding in bf16 is all that differs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from flash_attn_models.testing import measure_ceilings, write_result
from flash_attn_train.loggers import read_metrics


@dataclass(frozen=True)
class Contestant:
    """A run: devices, strategy, and samples of a forward pass on each device."""

    name: str
    model: str
    devices: int
    strategy: str
    batch_size: int
    steps: int = 40

    def arguments(self, folder: Path) -> list[str]:
        return [
            f"model={self.model}",
            f"trainer.devices={self.devices}",
            f"strategy={self.strategy}",
            f"trainer.batch_size={self.batch_size}",
            f"trainer.max_steps={self.steps}",
            f"output_dir={folder / self.name.replace(' ', '-')}",
            f"data.cache_dir={folder / 'cache'}",
        ]


SMALL, LARGE = "gpt2-small", "gpt2-large"
COMMON = [
    *("experiment=none", "tokenizer.vocab_size=8192", "data.num_workers=2", "optimizer.lr=6e-4"),
    *("trainer.val_every_n_steps=1000", "trainer.val_sequences=64", "checkpoint.every_n_steps=1000"),
    *("logger.every_n_steps=5", "logger.tensorboard=false", "generation.max_new_tokens=0"),
]
CONTESTANTS = (
    Contestant("one GPU", SMALL, 1, "single", 32),
    Contestant("DDP", SMALL, 2, "ddp", 32),
    Contestant("tensor parallel", SMALL, 2, "tensor_parallel", 32),
    Contestant("large DDP", LARGE, 2, "ddp", 4, 20),
    Contestant("large FSDP2", LARGE, 2, "fsdp2", 4, 20),
)


def run(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "flash_attn_train.cli", *COMMON, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170)
    if done.returncode:
        raise RuntimeError(f"{arguments}: {done.stdout[-2000:]}{done.stderr[-3000:]}")


def row_of(contestant: Contestant, folder: Path) -> dict[str, Any]:
    records = read_metrics(folder / contestant.name.replace(" ", "-") / "metrics.csv")
    training = [record for record in records if "train/loss" in record]
    return {
        "run": contestant.name,
        "model": contestant.model,
        "devices": contestant.devices,
        "strategy": contestant.strategy,
        "samples_per_step": contestant.batch_size
        * (contestant.devices if "tensor" not in contestant.strategy else 1),
        "tokens_per_s": round(median(record["tokens_per_s"] for record in training[3:])),
        "data_wait": round(median(record["data_wait"] for record in training[3:]), 5),
        "peak_memory_gib": round(max(record["peak_memory_gib"] for record in training), 2),
        "loss_at_5": round(next(r["train/loss"] for r in training if r["step"] == 5), 5),
        "loss_at_20": round(next(r["train/loss"] for r in training if r["step"] == 20), 5),
        "last_val_loss": round(records[-1]["val/loss"], 5),
    }


def resumed(folder: Path) -> dict[str, Any]:
    """Ten more steps of the sharded checkpoint of two GPUs, on one."""
    source = folder / "large-FSDP2"
    arguments = [f"model={LARGE}", "trainer.devices=1", "strategy=single", "trainer.batch_size=8"]
    arguments += [
        "trainer.max_steps=30",
        f"output_dir={source}",
        f"resume={source}",
        "scheduler.decay_steps=20",
    ]
    run([*arguments, "scheduler.warmup_steps=2", f"data.cache_dir={folder / 'cache'}"])
    training = [r for r in read_metrics(source / "metrics.csv") if "train/loss" in r]
    return {
        "run": "large FSDP2 resumed on one GPU",
        "first_step": 25,
        "loss": round(training[-2]["train/loss"], 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", default="devices.json", help="result file (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="the small model alone")
    arguments = parser.parse_args()
    ceilings = measure_ceilings()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chosen = [c for c in CONTESTANTS if c.model == SMALL or not arguments.quick]
        for contestant in chosen:
            more = (
                ["scheduler.decay_steps=20", "scheduler.warmup_steps=2"] if contestant.model == LARGE else []
            )
            try:
                run([*contestant.arguments(folder), *more])
                rows.append(row_of(contestant, folder))
                print("  ".join(str(value) for value in rows[-1].values()), flush=True)
            except (RuntimeError, subprocess.TimeoutExpired, StopIteration) as error:
                print(f"{contestant.name} failed: {error}", flush=True)
            write_result(arguments.json, "devices", rows, ceilings)
        if not arguments.quick:
            print(resumed(folder), flush=True)


if __name__ == "__main__":
    main()

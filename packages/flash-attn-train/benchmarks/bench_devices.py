"""Training on two GPUs: speed, loss and memory of each strategy against one GPU.

Every contestant is a run of the command line on the source of Python's standard library, in processes of its own, one
after the other. Speed is the median over training records from the fourth on; memory the highest peak of the first
process, and beside it what weights, gradients and AdamW's two means take of it by arithmetic: 16 bytes a parameter,
divided by the devices that share them. ``loss_gap`` is the largest difference of a training loss, relative, to the
first run of the same model, of runs with the same samples in each step. Two runs on one GPU show what rounding does:
one takes the samples in two passes, so that sums of gradients are rounded differently; in the other layers are
compiled, so that all that they compute in bf16 is, as it is where ranks add up parts of it.

    python benchmarks/bench_devices.py [--json FILE] [--resume FILE]
    python benchmarks/bench_devices.py --smoke      # a tiny model, two processes on a CPU: measures nothing
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from flash_attn_train.cli import compose_config
from flash_attn_train.flops import count_parameters
from flash_attn_train.loggers import read_metrics
from flash_attn_train.models import DataSizes, build_model
from result_file import ResultFile, Row, add_options

TIMEOUT_S = 170  # of a run
SKIPPED_RECORDS = 3  # of speed, at the start
STATE_BYTES = 16  # of a parameter: float32 weight, gradient, and two means


@dataclass(frozen=True)
class Contestant:
    """A run: devices, strategy, samples of a forward pass on each device, passes of a step, layers compiled or not.

    With ``continues`` it goes on from the last step of the run of that name, whose folder it shares.
    """

    name: str
    devices: int
    strategy: str
    batch_size: int
    passes: int = 1
    compiled: bool = False
    continues: str | None = None

    @property
    def samples_per_step(self) -> int:
        data_parallel = 1 if self.strategy == "tensor_parallel" else self.devices
        return self.batch_size * self.passes * data_parallel

    @property
    def shards(self) -> int:
        """Devices that share weights, gradients and optimizer state."""
        return self.devices if self.strategy in ("fsdp2", "tensor_parallel") else 1

    @property
    def folder(self) -> str:
        return (self.continues or self.name).replace(" ", "-").replace(",", "")


@dataclass(frozen=True)
class Group:
    """Runs of one model, of which the first is what the others are compared with; steps of those that are continued
    before and after that."""

    model: str
    contestants: tuple[Contestant, ...]
    steps: int
    steps_before: int | None = None

    def steps_of(self, contestant: Contestant) -> int:
        is_continued = any(other.continues == contestant.name for other in self.contestants)
        return self.steps_before if is_continued and self.steps_before else self.steps


SMALL = (
    Contestant("one GPU", 1, "single", 64),
    Contestant("DDP", 2, "ddp", 64),
    Contestant("tensor parallel", 2, "tensor_parallel", 64),
    Contestant("one GPU, two passes", 1, "single", 32, passes=2),
    Contestant("one GPU, layers compiled", 1, "single", 64, compiled=True),
)
LARGE = (
    Contestant("large DDP", 2, "ddp", 4),
    Contestant("large FSDP2", 2, "fsdp2", 4),
    Contestant("large FSDP2, resumed on one GPU", 1, "single", 8, continues="large FSDP2"),
)
GROUPS = (Group("gpt2-small", SMALL, 40), Group("gpt2-large", LARGE, 30, steps_before=20))
COMMON = (
    *("experiment=none", "data.num_workers=2", "optimizer.lr=6e-4", "tokenizer.vocab_size=8192"),
    *("trainer.val_every_n_steps=1000", "trainer.val_sequences=64", "checkpoint.every_n_steps=1000"),
    *("logger.every_n_steps=5", "logger.tensorboard=false", "generation.max_new_tokens=0"),
)
# What --smoke puts in the place of the above.
TINY_GROUPS = (
    Group(
        "gpt2-small",
        (
            Contestant("one process", 1, "single", 4),
            Contestant("FSDP2", 2, "fsdp2", 2),
            Contestant("FSDP2, resumed in one process", 1, "single", 4, continues="FSDP2"),
        ),
        6,
        steps_before=4,
    ),
)
TINY = (
    *("trainer.accelerator=cpu", "model.n_layer=1", "model.n_head=2", "model.d_model=32"),
    *("model.max_seqlen=32", "tokenizer.vocab_size=512", "trainer.val_sequences=8"),
    *("logger.every_n_steps=1", "data.num_workers=0"),
)


def options_of(group: Group, contestant: Contestant, folder: Path, more: tuple[str, ...]) -> list[str]:
    run_folder = folder / contestant.folder
    return [
        *(f"model={group.model}", *COMMON, *more),
        f"strategy={contestant.strategy}",
        f"trainer.devices={contestant.devices}",
        f"trainer.batch_size={contestant.batch_size}",
        f"trainer.accumulate_grad_batches={contestant.passes}",
        f"trainer.compile={str(contestant.compiled).lower()}",
        f"trainer.max_steps={group.steps_of(contestant)}",
        f"scheduler.decay_steps={group.steps}",
        # Half of them: at the full rate the first steps of a new model make small differences large.
        f"scheduler.warmup_steps={group.steps // 2}",
        f"output_dir={run_folder}",
        f"data.cache_dir={folder / 'cache'}",
        *([f"resume={run_folder}"] if contestant.continues else []),
    ]


def run(options: list[str]) -> float:
    """Seconds of a run of the command line. It and all that it started end here, also when it takes too long."""
    command = [sys.executable, "-m", "flash_attn_train.cli", *options]
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            kill_session(process)
        if code != 0:
            output.seek(0)
            ended = f"took more than {TIMEOUT_S} s" if code is None else f"ended with {code}"
            raise RuntimeError(f"{' '.join(options)} {ended}: {output.read()[-3000:]}")
    return time.perf_counter() - started


def kill_session(process: subprocess.Popen[bytes]) -> None:
    """Ends what is left of a process and its children: a rank that stayed would keep its GPU's memory."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def training_records(folder: Path) -> list[dict[str, float]]:
    return [record for record in read_metrics(folder / "metrics.csv") if "train/loss" in record]


def largest_gap(records: list[dict[str, float]], others: list[dict[str, float]]) -> float:
    """Largest relative difference of two runs' training losses, over the steps that both have."""
    losses, expected = ({record["step"]: record["train/loss"] for record in run} for run in (records, others))
    return max(abs(losses[step] / expected[step] - 1.0) for step in losses.keys() & expected.keys())


def row_of(
    group: Group, contestant: Contestant, folder: Path, parameters: int, first: Row | None, seconds: float
) -> Row:
    """``first``: the row of the first run of the group, None for itself and where that failed."""
    records = training_records(folder / contestant.folder)
    if contestant.continues:
        records = [record for record in records if record["step"] > (group.steps_before or 0)]
    timed = records[SKIPPED_RECORDS:] or records[-1:]
    speed = median(record["tokens_per_s"] for record in timed)
    peaks = [record["peak_memory_gib"] for record in records if "peak_memory_gib" in record]
    gap = None
    if first is not None and contestant.samples_per_step == first["samples_per_step"]:
        gap = largest_gap(records, training_records(folder / group.contestants[0].folder))
    return {
        "model": group.model,
        "run": contestant.name,
        "devices": contestant.devices,
        "strategy": contestant.strategy,
        "samples_per_step": contestant.samples_per_step,
        "tokens_per_s": round(speed),
        "times_of_first": None if first is None else round(speed / first["tokens_per_s"], 3),
        "data_wait": round(median(record["data_wait"] for record in timed), 5),
        "peak_memory_gib": round(max(peaks), 2) if peaks else None,
        "state_gib": round(STATE_BYTES * parameters / contestant.shards / 2**30, 2),
        "loss": round(records[-1]["train/loss"], 5),
        "loss_gap": None if gap is None else float(f"{gap:.2e}"),
        "seconds": round(seconds, 1),
    }


def parameters_of(group: Group, more: tuple[str, ...]) -> int:
    """Of the model, with as many tokens as the tokenizer may have."""
    config = compose_config([f"model={group.model}", *COMMON, *more])
    with torch.device("meta"):
        model = build_model(config.model, DataSizes(vocab_size=config.tokenizer.vocab_size))
    return count_parameters(model).total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_options(parser, "devices.json")
    parser.add_argument("--quick", action="store_true", help="the small model alone")
    arguments = parser.parse_args()
    groups, more = (TINY_GROUPS, TINY) if arguments.smoke else (GROUPS, ())
    results = ResultFile.of_arguments("devices", arguments)
    with tempfile.TemporaryDirectory() as name:
        for group in groups[:1] if arguments.quick else groups:
            # Runs are compared with the records of others, so a group is measured whole.
            if len(results.rows_of({"model": group.model})) < len(group.contestants):
                measure(group, Path(name), more, results)
    return results.exit_code


def measure(group: Group, folder: Path, more: tuple[str, ...], results: ResultFile) -> None:
    parameters = parameters_of(group, more)
    results.rows = [row for row in results.rows if row["model"] != group.model]
    for contestant in group.contestants:
        case = {"model": group.model, "run": contestant.name}
        if results.on_gpu and torch.cuda.device_count() < contestant.devices:
            print(f"{contestant.name}: left out: it needs {contestant.devices} GPUs", flush=True)
            continue
        with results.attempt(case):
            seconds = run(options_of(group, contestant, folder, more))
            first = next(iter(results.rows_of({**case, "run": group.contestants[0].name})), None)
            results.put(case, [row_of(group, contestant, folder, parameters, first, seconds)])


if __name__ == "__main__":
    sys.exit(main())

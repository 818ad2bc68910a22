"""A thousand steps of GPT-2 124M on real text: the kernels in bf16 against attention in float32.

The text is the source of Python's standard library. The first two runs have the same initial weights and the same
batches; what differs is attention: the CUDA kernels on bf16 queries, keys and values, or torch's on float32 ones. The
third is the second one again with other initial weights: how far apart losses are by chance.

The gap of a run is the root of the mean square of the differences between its losses and those of the second run, over
all records, each of which is the mean loss of 50 steps. The kernels are within noise if their gap is no larger than
that of the third run.

    python benchmarks/bench_loss.py [--json FILE] [--resume FILE]
    python benchmarks/bench_loss.py --draw FILE     # the picture of a result, beside it; runs nothing
    python benchmarks/bench_loss.py --smoke         # a tiny model on a CPU: shows that it runs, measures nothing
"""

from __future__ import annotations

import argparse
import contextlib
import email
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from flash_attn_models.gpt import GPTConfig, GPTLMHeadModel
from flash_attn_models.gpt.families import named_config
from flash_attn_train.configs import GPTModelConfig, TextDataConfig, TokenizerConfig, TrainConfig
from flash_attn_train.configs.optimizer import AdamWConfig
from flash_attn_train.data import build_data
from flash_attn_train.figures import Curve, Picture, draw
from flash_attn_train.optim import build_optimizer, warmup_cosine
from result_file import ResultFile, Row, add_options, free_device_memory
from torch import Tensor, nn
from torch.nn import functional as F

Attention = Callable[..., Tensor]
Batches = Callable[[int], dict[str, Tensor]]  # by number of the step


def float32_attention(heads: Tensor, *, num_heads_q: int, causal: bool, **others: Any) -> Tensor:
    """torch's causal attention on float32 copies: heads (B,S,3H,D), those of queries, of keys and of values."""
    used = {name: value for name, value in others.items() if value not in (None, 0.0, (-1, -1), (None, None))}
    if used or not causal:
        raise ValueError(f"options: got {used} and causal={causal}, expected those of a plain GPT-2")
    with torch.autocast(heads.device.type, enabled=False):
        q_BHSD, k_BHSD, v_BHSD = heads.float().transpose(1, 2).split(num_heads_q, dim=1)
        out = F.scaled_dot_product_attention(q_BHSD, k_BHSD, v_BHSD, is_causal=True)
    return out.transpose(1, 2).to(heads.dtype)


@contextlib.contextmanager
def attention_in(function: Attention | None) -> Iterator[None]:
    if function is None:
        yield
    else:
        with mock.patch("flash_attn_models.layers.attention.flash_attn_qkvpacked_func", function):
            yield


@dataclass(frozen=True)
class Run:
    """One training: the seed of the initial weights, and what computes attention; None: the kernels."""

    name: str
    seed: int
    attention: Attention | None


REFERENCE = Run("float32 attention", 0, float32_attention)
KERNELS = Run("kernels, bf16", 0, None)
CHANCE = Run("float32 attention, other weights", 1, float32_attention)
RUNS = (KERNELS, REFERENCE, CHANCE)


@dataclass(frozen=True)
class Size:
    """What is trained, on what, and how many steps' losses make a record."""

    model: str
    config: GPTConfig
    data: TextDataConfig
    tokenizer: TokenizerConfig
    record_every: int = 50

    @classmethod
    def full(cls) -> Size:
        # The vocabulary of GPT-2 in whole tiles, of which the tokenizer uses a part.
        config = named_config("gpt2", vocab_size=50304, dropout=0.0, attn_dropout=0.0, embedding_dropout=None)
        return cls("gpt2", config, TextDataConfig(), TokenizerConfig(vocab_size=8192))

    @classmethod
    def smoke(cls) -> Size:
        config = GPTConfig(vocab_size=512, max_seqlen=64, n_layer=1, n_head=2, d_model=64)
        some_text = str(Path(email.__file__).parent)
        return cls("tiny", config, TextDataConfig(path=some_text), TokenizerConfig(vocab_size=512), 2)

    def batches(self, batch_size: int) -> Batches:
        """The same for all runs."""
        module = build_data(
            TrainConfig(
                model=GPTModelConfig(max_seqlen=self.config.max_seqlen),
                data=self.data,
                tokenizer=self.tokenizer,
            )
        )
        samples = module.train_samples
        return lambda step: samples.batch(np.arange(step * batch_size, (step + 1) * batch_size))  # type: ignore[union-attr]


def train(run: Run, config: GPTConfig, batches: Batches, steps: int, device: str) -> Tensor:
    """The loss of every step, (steps,) float32."""
    torch.manual_seed(run.seed)
    model = GPTLMHeadModel(config, device=device)
    optimizer = build_optimizer(AdamWConfig(lr=6e-4), model)
    peaks = [group["lr"] for group in optimizer.param_groups]
    losses = torch.empty(steps, device=device)
    for step in range(steps):
        factor = warmup_cosine(step, warmup_steps=steps // 10, decay_steps=steps, min_lr_ratio=0.1)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        batch = batches(step)
        with torch.autocast(device, torch.bfloat16), attention_in(run.attention):
            loss = model.loss(batch["input_ids"].to(device), batch["labels"].to(device))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses[step] = loss.detach()
    return losses.cpu()


def curve_rows(size: Size, run: Run, losses: Tensor) -> list[Row]:
    """A record for each whole ``record_every`` steps: their mean loss."""
    records = len(losses) // size.record_every
    means = losses[: records * size.record_every].view(records, size.record_every).mean(dim=1)
    return [
        _row("curve", size.model, run.name, step=size.record_every * number, loss=round(mean, 5))
        for number, mean in enumerate(means.tolist(), start=1)
    ]


def summary_rows(size: Size, rows: list[Row]) -> list[Row]:
    """Last loss and gap of each run that is done, and whether the kernels are within noise, once all are."""
    curves = {run.name: [row["loss"] for row in rows if row["run"] == run.name] for run in RUNS}
    reference = curves[REFERENCE.name]
    gaps = {
        name: math.sqrt(sum((a - b) ** 2 for a, b in zip(curve, reference, strict=True)) / len(curve))
        for name, curve in curves.items()
        if curve and reference
    }
    known = {KERNELS.name, CHANCE.name} <= gaps.keys()
    verdicts = {KERNELS.name: gaps[KERNELS.name] <= gaps[CHANCE.name]} if known else {}
    return [
        _row(
            "summary",
            size.model,
            name,
            loss=curve[-1],
            gap=round(gaps[name], 5) if name in gaps else None,
            within_noise=verdicts.get(name),
        )
        for name, curve in curves.items()
        if curve
    ]


def _row(kind: str, model: str, run: str, **values: Any) -> Row:
    columns = ("step", "loss", "gap", "within_noise")
    return {"kind": kind, "model": model, "run": run, **{name: values.get(name) for name in columns}}


def draw_result(path: Path) -> Path:
    """The curves of a result, as PNG beside it."""
    result = json.loads(path.read_text())
    records: dict[int, dict[str, float]] = {}
    for row in result["rows"]:
        if row["kind"] == "curve":
            records.setdefault(row["step"], {"step": row["step"]})[row["run"]] = row["loss"]
    title = f"Loss of {result['rows'][0]['model']} on {result['gpu'] or 'a CPU'}"
    curves = tuple(Curve(run.name, run.name) for run in RUNS)
    picture = path.with_suffix(".png")
    draw(Picture(picture.name, title, "loss (nats per token)", curves), [*records.values()], picture)
    return picture


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_options(parser, "loss.json")
    parser.add_argument("--steps", type=int, default=1000, help="of each run (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="100 steps")
    parser.add_argument(
        "--draw", type=Path, metavar="JSON", help="draw this result, beside it, and run nothing"
    )
    arguments = parser.parse_args()
    if arguments.draw is not None:
        print(draw_result(arguments.draw))
        return 0
    size = Size.smoke() if arguments.smoke else Size.full()
    steps = 100 if arguments.quick else arguments.steps
    results = ResultFile.of_arguments("loss", arguments)
    batches = size.batches(arguments.batch_size)
    for run in RUNS:
        case = {"run": run.name, "kind": "curve"}
        if len(results.rows_of(case)) == steps // size.record_every:
            continue
        with results.attempt(case):
            losses = train(run, size.config, batches, steps, "cuda" if results.on_gpu else "cpu")
            results.put(case, curve_rows(size, run, losses))
            curves = results.rows_of({"kind": "curve"})
            results.put({"kind": "summary"}, summary_rows(size, curves))
        free_device_memory()
    return results.exit_code


if __name__ == "__main__":
    sys.exit(main())

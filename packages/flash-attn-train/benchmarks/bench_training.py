"""Training speed of GPT-2 and LLaMA shapes on one GPU, against the same shapes of transformers.

One loop for all contestants: bf16 autocast over float32 weights, gradients of several forward passes added up, clipped
to norm 1, fused AdamW, random tokens, as many a step for all. The contestants take turns of a few steps in one process,
of which the first is not timed; weights and optimizer state of those that wait are in the CPU's memory, so that the
GPU's is there for one. training_contestants.py says who they are.

Model FLOPs are those of flash_attn_train.flops, the same for all contestants: 6 N + 12 L H Q T a token, with N weights
of the matrices that a token is multiplied with (the output layer also where it is tied; no embeddings, biases, norms),
L layers, H heads of width Q, T tokens of context; a causal mask is not discounted (Chowdhery et al. 2022,
arXiv:2204.02311, appendix B). MFU is their rate as a share of what the device's data sheet says of dense bf16. Peak
memory is of a step, with the weights and the optimizer state of the contestant, and without those of the others.

    python benchmarks/bench_training.py [--shapes gpt2@1024 ...] [--batch-size N] [--json FILE] [--resume FILE]
    python benchmarks/bench_training.py --smoke     # tiny shapes on a CPU: shows that it runs, measures nothing
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import median

import torch
from flash_attn_models.gpt import GPTConfig, GPTLMHeadModel
from flash_attn_models.gpt.families import named_config
from flash_attn_train.flops import count_parameters, flops_per_sample
from result_file import ResultFile, Row, add_options, free_device_memory
from training_contestants import MAKERS, THEIRS, Batch, Contestant

PEAK_TFLOPS = 989.4  # H100 SXM and H200, dense bf16
TOKENS_PER_STEP = 2**17
TURNS = 2  # of each contestant


@dataclass(frozen=True)
class Shape:
    """A model of the registry at a context length, and how many sequences one forward pass takes."""

    name: str
    seqlen: int
    batch_size: int
    layers: int | None = None  # fewer than the model has, to try the program out

    @property
    def passes(self) -> int:
        """Forward passes of a step."""
        return max(1, TOKENS_PER_STEP // (self.seqlen * self.batch_size)) if self.layers is None else 2

    @property
    def tokens_per_step(self) -> int:
        return self.passes * self.batch_size * self.seqlen

    @property
    def case(self) -> Row:
        """What a row says of it."""
        return {"model": self.name, "seqlen": self.seqlen, "batch_size": self.batch_size}

    def __str__(self) -> str:
        return f"{self.name}@{self.seqlen}"


# Sequences of a pass are as many as fit into 80 GB with room to spare. A step takes 16 bytes a parameter (weights,
# gradients, two means) and 2 of bf16 copies; for the backward pass our GPT-2 and LLaMA keep some 36 and 52 bytes a
# token, layer and unit of width, the peers a third more, and 4 bytes for every logit: at most 56 GiB, and 64.
SHAPES = (
    Shape("gpt2", 1024, 64),
    Shape("gpt2-medium", 1024, 32),
    Shape("gpt2-large", 1024, 16),
    Shape("gpt2-xl", 1024, 8),
    Shape("llama-3.2-1b", 2048, 8),
    Shape("llama-3.2-1b", 8192, 2),
)
SMOKE = (Shape("gpt2", 64, 2, layers=1), Shape("llama-3.2-1b", 64, 1, layers=1))


@dataclass
class Measured:
    """Of one contestant: seconds of its timed steps, and the most bytes that it had in one (0 on a CPU)."""

    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0


def config_of(shape: Shape) -> GPTConfig:
    config = dataclasses.replace(
        named_config(shape.name),
        max_seqlen=shape.seqlen,
        dropout=0.0,
        embedding_dropout=None,
        attn_dropout=0.0,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    if shape.layers is None:
        # A vocabulary in multiples of 64 for all contestants: rows of other lengths are not aligned.
        return dataclasses.replace(config, vocab_size=-(-config.vocab_size // 64) * 64)
    n_head_kv = None if config.n_head_kv is None else 2
    return dataclasses.replace(
        config,
        n_layer=shape.layers,
        vocab_size=1024,
        d_model=64,
        n_head=4,
        n_head_kv=n_head_kv,
        d_head=None,
        d_inner=128,
    )


def measure(shape: Shape, names: list[str], steps: int, results: ResultFile) -> None:
    """The contestants in turn; their rows go to the results together, which take the failed ones too."""
    device = "cuda" if results.on_gpu else "cpu"
    config = config_of(shape)

    def batches() -> list[Batch]:
        size = (shape.passes, shape.batch_size, shape.seqlen + 1)
        drawn = torch.randint(config.vocab_size, size, device=device)
        return [(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()) for tokens in drawn]

    torch.manual_seed(0)
    waiting: dict[str, Contestant] = {}
    measured = {name: Measured() for name in names}
    for turn in range(TURNS):
        for name in [name for name in names if turn == 0 or name in waiting]:
            contestant, started = None, time.perf_counter()
            with results.attempt({**shape.case, "contestant": name}):
                if turn == 0:
                    contestant = MAKERS[name](config, device)
                else:
                    contestant = waiting.pop(name)
                    contestant.wake()
                take_turn(contestant, batches, len(range(turn, steps, TURNS)), measured[name])
                if turn + 1 < TURNS:
                    contestant.park()
                    waiting[name] = contestant
            contestant = None  # the next one gets the memory
            free_device_memory()
            print(f"  {name}: turn of {time.perf_counter() - started:.0f} s", flush=True)
    finished = {name: one for name, one in measured.items() if len(one.seconds) == steps}
    results.put(shape.case, list(rows_of(shape, config, finished)))


def take_turn(
    contestant: Contestant, batches: Callable[[], list[Batch]], steps: int, measured: Measured
) -> None:
    timed_step(contestant, batches())  # compiles, makes the optimizer's state, gets the device's memory
    for _ in range(steps):
        seconds, peak_bytes = timed_step(contestant, batches())
        measured.seconds.append(seconds)
        measured.peak_bytes = max(measured.peak_bytes, peak_bytes)


def timed_step(contestant: Contestant, data: list[Batch]) -> tuple[float, int]:
    """Seconds of a step, and the most bytes that the contestant had in it (0 on a CPU)."""
    on_gpu = data[0][0].is_cuda
    others = 0  # bytes of anything else
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        others = torch.cuda.memory_allocated() - contestant.resting_bytes()
    started = time.perf_counter()
    contestant.step(data)
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    return seconds, torch.cuda.max_memory_allocated() - others if on_gpu else 0


def rows_of(shape: Shape, config: GPTConfig, measured: dict[str, Measured]) -> Iterator[Row]:
    with torch.device("meta"):
        model = GPTLMHeadModel(config)
    flops_per_token = (flops_per_sample(model, shape.seqlen) or 0) / shape.seqlen
    rates = {name: shape.tokens_per_step / median(one.seconds) for name, one in measured.items()}
    for name, one in measured.items():
        yield {
            "model": shape.name,
            "parameters": count_parameters(model).total,
            "seqlen": shape.seqlen,
            "batch_size": shape.batch_size,
            "tokens_per_step": shape.tokens_per_step,
            "contestant": name,
            "tokens_per_s": round(rates[name]),
            "times_of_transformers": round(rates[name] / rates[THEIRS], 3) if THEIRS in rates else None,
            "mfu": round(rates[name] * flops_per_token / (PEAK_TFLOPS * 1e12), 4),
            "peak_gib": round(one.peak_bytes / 2**30, 2),
            "step_ms": round(median(one.seconds) * 1e3, 1),
            "fastest_ms": round(min(one.seconds) * 1e3, 1),
            "slowest_ms": round(max(one.seconds) * 1e3, 1),
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_options(parser, "training.json")
    parser.add_argument(
        "--shapes",
        nargs="+",
        choices=[*dict.fromkeys(shape.name for shape in SHAPES), *map(str, SHAPES)],
        metavar="NAME[@SEQLEN]",
        help=f"some of {', '.join(map(str, SHAPES))} (default: all)",
    )
    parser.add_argument(
        "--contestants",
        nargs="+",
        choices=tuple(MAKERS),
        default=list(MAKERS),
        help="default: all",
    )
    parser.add_argument("--batch-size", type=int, help="sequences of a forward pass (default: by shape)")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of each (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="the smallest shape alone")
    arguments = parser.parse_args()
    results = ResultFile.of_arguments("training", arguments)
    if results.on_gpu:
        torch.set_float32_matmul_precision("high")  # of what autocast leaves in float32, for all contestants
    shapes = SMOKE if arguments.smoke else SHAPES[:1] if arguments.quick else SHAPES
    for shape in shapes:
        if arguments.shapes is not None and not {shape.name, str(shape)} & set(arguments.shapes):
            continue
        if arguments.batch_size is not None:
            shape = dataclasses.replace(shape, batch_size=arguments.batch_size)
        if {row["contestant"] for row in results.rows_of(shape.case)} >= set(arguments.contestants):
            continue
        print(f"{shape}, {shape.passes} x {shape.batch_size} sequences", flush=True)
        measure(shape, arguments.contestants, arguments.steps, results)
        torch.compiler.reset()
        free_device_memory()
    return results.exit_code


if __name__ == "__main__":
    sys.exit(main())

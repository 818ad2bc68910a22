"""Training speed of GPT-2 and LLaMA shapes on one GPU, against the same shapes of transformers.

One loop for all contestants: bf16 autocast over float32 weights, gradients of several forward passes added up, clipped
to norm 1, fused AdamW, random tokens. The contestants take turns of a few steps in one process, of which the first is
not timed; weights and optimizer state of those that wait are in pinned CPU memory, so that the GPU's is there for one.
The peer is transformers' model with SDPA attention, whole model and loss under torch.compile.

Model FLOPs are those of flash_attn_train.flops, the same for all contestants: 6 N + 12 L H Q T a token, with N weights
of the matrices that a token is multiplied with (the output layer also where it is tied; no embeddings, biases, norms),
L layers, H heads of width Q, T tokens of context; a causal mask is not discounted (Chowdhery et al. 2022,
arXiv:2204.02311, appendix B). MFU is their rate as a share of what the device's data sheet says of dense bf16. Peak
memory is of a step, with the weights and the optimizer state of the contestant, and without those of the others.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from flash_attn_models.gpt import GPTConfig, GPTLMHeadModel
from flash_attn_models.gpt.families import named_config
from flash_attn_models.testing import measure_ceilings, write_result
from flash_attn_train.flops import count_parameters, flops_per_sample
from torch import Tensor, nn
from torch.nn import functional as F

PEAK_TFLOPS = 989.4  # H100 SXM and H200, dense bf16
TOKENS_PER_STEP = 2**17
TURNS = 2  # of each contestant
SUPPORTED = ("ours", "ours, layers compiled", "transformers, compiled")


@dataclass(frozen=True)
class Shape:
    """A model of the registry at a context length, and how many sequences one forward pass takes."""

    name: str
    seqlen: int
    batch_size: int
    layers: int | None = None  # fewer than the model has, to try the program out


SHAPES = (
    Shape("gpt2", 1024, 32),
    Shape("gpt2-medium", 1024, 16),
    Shape("gpt2-large", 1024, 16),
    Shape("gpt2-xl", 1024, 8),
    Shape("llama-3.2-1b", 2048, 4),
    Shape("llama-3.2-1b", 8192, 1),
)
SMOKE = (Shape("gpt2", 64, 2, layers=1), Shape("llama-3.2-1b", 64, 1, layers=1))


def config_of(shape: Shape) -> GPTConfig:
    config = named_config(shape.name)
    # A vocabulary in multiples of 64 for all contestants: rows of other lengths are not aligned.
    vocab_size = 1024 if shape.layers else -(-config.vocab_size // 64) * 64
    return dataclasses.replace(
        config,
        max_seqlen=shape.seqlen,
        n_layer=shape.layers or config.n_layer,
        vocab_size=vocab_size,
        dropout=0.0,
        embedding_dropout=None,
        attn_dropout=0.0,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    )


class Contestant:
    """A model with its optimizer, and one training step."""

    def __init__(self, model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.model, self.loss = model, loss
        matrices = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)
        self.seconds: list[float] = []
        self.peak_bytes = 0
        self._copies: dict[Tensor, Tensor] = {}  # by identity, which is how tensors are hashed

    def step(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        device = batches[0][0].device
        for tokens, labels in batches:
            with torch.autocast(device.type, torch.bfloat16):
                loss = self.loss(tokens, labels) / len(batches)
            loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def resting_bytes(self) -> int:
        """Weights and optimizer state."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._resting())

    def park(self) -> None:
        """Moves weights and optimizer state to pinned CPU memory, and gives their memory on the device back.

        The tensors stay the same objects, which compiled code and the optimizer know.
        """
        for tensor in self._resting():
            storage = tensor.untyped_storage()
            if storage.nbytes():
                here = _bytes_of(storage)
                copy = self._copies.get(tensor)
                if copy is None:
                    copy = torch.empty(here.shape, dtype=torch.uint8, pin_memory=here.is_cuda)
                    self._copies[tensor] = copy
                copy.copy_(here)
                storage.resize_(0)

    def wake(self) -> None:
        """Undoes ``park``."""
        for tensor, copy in self._copies.items():
            storage = tensor.untyped_storage()
            storage.resize_(copy.numel())
            _bytes_of(storage).copy_(copy)

    def _resting(self) -> list[Tensor]:
        states = [t for state in self.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
        return [*self.model.parameters(), *states]


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def ours(config: GPTConfig, device: str, *, compile_layers: bool) -> Contestant:
    model = GPTLMHeadModel(config, device=device)
    if compile_layers:
        for layer in model.transformer.layers:
            layer.compile()
    return Contestant(model, model.loss)


def theirs(config: GPTConfig, device: str) -> Contestant:
    from flash_attn_models.gpt.hugging_face import config_to_hugging_face
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(config_to_hugging_face(config))
    hf_config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(hf_config, attn_implementation="sdpa", dtype=torch.float32)
    model.train()

    def loss(tokens: Tensor, labels: Tensor) -> Tensor:
        logits = model(tokens, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    return Contestant(model, torch.compile(loss))


MAKERS: dict[str, Callable[[GPTConfig, str], Contestant]] = {
    "ours": lambda config, device: ours(config, device, compile_layers=False),
    "ours, layers compiled": lambda config, device: ours(config, device, compile_layers=True),
    "transformers, compiled": theirs,
}


def measure(shape: Shape, names: list[str], steps: int, device: str) -> list[dict[str, Any]]:
    config = config_of(shape)
    with torch.device("meta"):
        model = GPTLMHeadModel(config)
    flops_per_token = (flops_per_sample(model, shape.seqlen) or 0) / shape.seqlen
    passes = max(1, TOKENS_PER_STEP // (shape.seqlen * shape.batch_size)) if shape.layers is None else 2

    def batches() -> list[tuple[Tensor, Tensor]]:
        drawn = torch.randint(config.vocab_size, (passes, shape.batch_size, shape.seqlen + 1), device=device)
        return [(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()) for tokens in drawn]

    torch.manual_seed(0)
    contestants: dict[str, Contestant] = {}
    for name in names:
        contestants[name] = MAKERS[name](config, device)
        started = time.perf_counter()
        _timed_step(contestants[name], batches())  # compiles, and makes the optimizer's state
        print(f"  {name}: first step {time.perf_counter() - started:.1f} s", flush=True)
        contestants[name].park()
    for turn in range(TURNS):
        for contestant in contestants.values():
            contestant.wake()
            _timed_step(contestant, batches())  # gets the device's memory
            for _ in range(-(-(steps - turn) // TURNS)):
                seconds, peak_bytes = _timed_step(contestant, batches())
                contestant.seconds.append(seconds)
                contestant.peak_bytes = max(contestant.peak_bytes, peak_bytes)
            contestant.park()
    rows = []
    for name, contestant in contestants.items():
        tokens = passes * shape.batch_size * shape.seqlen
        rate = tokens / median(contestant.seconds)
        rows.append(
            {
                "model": shape.name,
                "parameters": count_parameters(model).total,
                "seqlen": shape.seqlen,
                "batch_size": shape.batch_size,
                "tokens_per_step": tokens,
                "contestant": name,
                "tokens_per_s": round(rate),
                "mfu": round(rate * flops_per_token / (PEAK_TFLOPS * 1e12), 4),
                "peak_gib": round(contestant.peak_bytes / 2**30, 2),
                "step_ms": round(median(contestant.seconds) * 1e3, 1),
            }
        )
        print("  ".join(str(value) for value in rows[-1].values()), flush=True)
    return rows


def _timed_step(contestant: Contestant, data: list[tuple[Tensor, Tensor]]) -> tuple[float, int]:
    """Seconds of a step, and the most bytes that the contestant had in it (0 on a CPU)."""
    on_gpu = data[0][0].is_cuda
    before = 0
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    started = time.perf_counter()
    contestant.step(data)
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    if not on_gpu:
        return seconds, 0
    return seconds, torch.cuda.max_memory_allocated() - before + contestant.resting_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", default="training.json", help="result file (default: %(default)s)")
    parser.add_argument(
        "--shapes",
        nargs="*",
        metavar="NAME[@SEQLEN]",
        help="some of " + ", ".join(f"{shape.name}@{shape.seqlen}" for shape in SHAPES) + " (default: all)",
    )
    parser.add_argument("--contestants", nargs="*", choices=SUPPORTED, default=list(SUPPORTED))
    parser.add_argument("--steps", type=int, default=4, help="timed steps of each (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="the smallest shape alone")
    parser.add_argument("--smoke", action="store_true", help="tiny, on the CPU, to try the program out")
    arguments = parser.parse_args()
    if arguments.smoke:
        for shape in SMOKE:
            measure(shape, arguments.contestants, 1, "cpu")
        return
    torch.set_float32_matmul_precision("high")
    ceilings = measure_ceilings()
    rows: list[dict[str, Any]] = []
    for shape in SHAPES:
        wanted = arguments.shapes or ([SHAPES[0].name] if arguments.quick else [shape.name])
        if not {shape.name, f"{shape.name}@{shape.seqlen}"} & set(wanted):
            continue
        try:
            rows += measure(shape, arguments.contestants, arguments.steps, "cuda")
        except torch.OutOfMemoryError as error:
            print(f"{shape}: {error}", flush=True)
        gc.collect()
        torch.cuda.empty_cache()
        torch.compiler.reset()
        write_result(arguments.json, "training", rows, ceilings)


if __name__ == "__main__":
    main()

"""Decoding and prefill of models with random weights, against transformers and against what the hardware allows.

Decoding: time of a whole `generate` less that of one for a single token, so that the prompt does not count. Bytes of a
step are the weights that it reads (all but the table of positions, and the token embedding where it is not the head)
and the keys and values of half of the new tokens; their share of the same run's copy bandwidth says how far decoding is
from reading memory and nothing else. transformers runs in bf16 with SDPA; "static" is its static cache, which it
compiles, if that takes no longer than --compile-limit.

Prefill: one pass over the prompts into a cache, beside the matrix products and attention of the same layers alone.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from flash_attn_models.attention import flash_attn_func
from flash_attn_models.generation import generate, make_cache, release_cuda_graphs
from flash_attn_models.gpt import GPTConfig, GPTLMHeadModel
from flash_attn_models.gpt.families import named_config
from flash_attn_models.gpt.hugging_face import config_to_hugging_face, hugging_face_layout, to_hugging_face
from flash_attn_models.testing import Timing, interleaved_times, measure_ceilings, write_result
from torch.nn import functional as F

Call = Callable[[], object]


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    configs: dict[str, tuple[str, GPTConfig]]  # by name: Hugging Face's model_type, and ours
    batches: tuple[int, ...] = (1, 32)
    prompt: int = 512
    new: int = 128
    prefill_batches: tuple[int, ...] = (1, 8)
    prefill_prompt: int = 2048
    samples: int = 7
    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16


def full_sizes(samples: int) -> Sizes:
    configs = {
        "LLaMA-3.2-1B": ("llama", named_config("llama-3.2-1b")),
        "GPT-2-XL": ("gpt2", named_config("gpt2-xl", max_seqlen=4096)),
    }
    return Sizes(
        {name: (kind, _without_ends(config)) for name, (kind, config) in configs.items()}, samples=samples
    )


def smoke_sizes() -> Sizes:
    small: dict[str, Any] = {"vocab_size": 211, "max_seqlen": 64, "n_layer": 2, "n_head": 4, "d_model": 64}
    configs = {
        "llama": ("llama", GPTConfig.llama(**small, n_head_kv=2, d_inner=96)),
        "gpt2": ("gpt2", GPTConfig(**small)),
    }
    sizes = Sizes({name: (kind, _without_ends(config)) for name, (kind, config) in configs.items()})
    return replace(
        sizes,
        batches=(1, 3),
        prompt=16,
        new=8,
        prefill_batches=(1,),
        prefill_prompt=32,
        samples=2,
        device="cpu",
        dtype=torch.float32,
    )


def _without_ends(config: GPTConfig) -> GPTConfig:
    return replace(config, eos_token_id=None, bos_token_id=None, pad_token_id=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", default="generate.json", help="result file (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=7, help="of each contestant (default: %(default)s)")
    parser.add_argument(
        "--compile-limit",
        type=int,
        default=150,
        metavar="SECONDS",
        help="for transformers' compiled static cache; 0 leaves it out (default: %(default)s)",
    )
    parser.add_argument("--quick", action="store_true", help="two samples")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU, and no result file")
    arguments = parser.parse_args()
    sizes = smoke_sizes() if arguments.smoke else full_sizes(2 if arguments.quick else arguments.samples)
    ceilings = {"gemm_tflops": 1.0, "copy_gbps": 1.0} if arguments.smoke else measure_ceilings()
    print(f"ceilings: {ceilings}", flush=True)
    rows: list[dict[str, Any]] = []
    for name, (model_type, config) in sizes.configs.items():
        torch.manual_seed(0)
        ours = GPTLMHeadModel(config, device=sizes.device, dtype=sizes.dtype).eval()
        theirs = transformers_model(ours, model_type)
        check_agreement(ours, theirs, sizes)
        limit = 0 if arguments.smoke else arguments.compile_limit
        for measured in cases(name, ours, theirs, sizes, limit, ceilings["copy_gbps"]):
            rows += measured
            if not arguments.smoke:
                write_result(arguments.json, "generate", rows, ceilings)
        del ours, theirs
        if sizes.device == "cuda":
            torch.cuda.empty_cache()


def cases(
    name: str, ours: GPTLMHeadModel, theirs: Any, sizes: Sizes, compile_limit_s: int, copy_gbps: float
) -> Iterator[list[dict[str, Any]]]:
    """The rows of one batch size after the other, so that a run that is cut off keeps what it had."""
    for batch in sizes.batches:
        yield decode_rows(name, ours, theirs, sizes, batch, compile_limit_s, copy_gbps)
    for batch in sizes.prefill_batches:
        yield prefill_rows(name, ours, theirs, sizes, batch)


def transformers_model(ours: GPTLMHeadModel, model_type: str) -> Any:
    """The same model in transformers."""
    import transformers

    fields = config_to_hugging_face(ours.config, model_type)
    fields.pop("model_type", None)
    config = transformers.AutoConfig.for_model(model_type, **fields)
    with torch.device(ours.head_weight.device):
        theirs = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation="sdpa", dtype=ours.head_weight.dtype
        )
    layout = hugging_face_layout(ours.config, model_type)
    theirs.load_state_dict(to_hugging_face(ours.state_dict(), layout), strict=False)
    theirs.generation_config.eos_token_id = theirs.generation_config.pad_token_id = None
    return theirs.eval()


@torch.no_grad()
def check_agreement(ours: GPTLMHeadModel, theirs: Any, sizes: Sizes) -> None:
    """Our logits are no further from transformers' in float32 than twice its own in the dtype of the benchmark."""
    ids = random_ids(ours, 2, sizes.prompt)
    exact = copy.deepcopy(theirs).float()(ids).logits
    ours_off, theirs_off = (
        (model - exact).norm() for model in (ours(ids).float(), theirs(ids).logits.float())
    )
    slack = 1e-4 * exact.norm()
    if not ours_off <= 2 * theirs_off + slack:
        raise RuntimeError(
            f"logits are {ours_off / exact.norm():.2e} away from those in float32, transformers' "
            f"{theirs_off / exact.norm():.2e}"
        )


def random_ids(model: GPTLMHeadModel, batch: int, seqlen: int) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (batch, seqlen), device=model.head_weight.device)


def decode_rows(
    name: str,
    ours: GPTLMHeadModel,
    theirs: Any,
    sizes: Sizes,
    batch: int,
    compile_limit_s: int,
    copy_gbps: float,
) -> list[dict[str, Any]]:
    ids = random_ids(ours, batch, sizes.prompt)
    mask = torch.ones_like(ids)

    def our_call(new: int, cuda_graph: bool) -> Call:
        return lambda: generate(ours, ids, new, cuda_graph=cuda_graph)

    def their_call(new: int, **options: Any) -> Call:
        lengths = {"max_new_tokens": new, "min_new_tokens": new}
        return lambda: theirs.generate(
            ids, attention_mask=mask, do_sample=False, pad_token_id=0, **lengths, **options
        )

    makers: dict[str, Callable[[int], Call]] = {"ours": functools.partial(our_call, cuda_graph=False)}
    if sizes.device == "cuda":
        makers["ours, CUDA graph"] = functools.partial(our_call, cuda_graph=True)
    makers["transformers"] = their_call
    static = functools.partial(their_call, cache_implementation="static")
    if compile_limit_s > 0 and runs_within(compile_limit_s, static(sizes.new)):
        makers["transformers, static"] = static
    # Of one token no step is decoded: what is left is the prompt.
    calls = {(contestant, new): make(new) for contestant, make in makers.items() for new in (1, sizes.new)}
    times = wall_times(calls, sizes)
    moved = step_bytes(ours, batch, sizes.prompt + sizes.new // 2)
    rows = []
    for contestant in makers:
        steps_us = sorted(
            (whole - prompt) * 1e6 / (sizes.new - 1)
            for whole, prompt in zip(times[contestant, sizes.new], times[contestant, 1], strict=True)
        )
        timing = _timing(steps_us)
        gbps = moved / timing.median_us * 1e-3
        rows.append(
            _row(
                ("decode", name, batch, sizes.prompt, contestant),
                timing,
                tokens_per_s=batch / timing.median_us * 1e6,
                gbps=gbps,
                share_of_copy=gbps / copy_gbps,
            )
        )
    release_cuda_graphs(ours)
    return rows


def step_bytes(model: GPTLMHeadModel, batch: int, length: int) -> int:
    """Weights, keys and values that a decoding step of ``batch`` rows at this length must read."""
    config, embeddings = model.config, model.transformer.embeddings
    tables = {id(embeddings.word_embeddings.weight)}
    if embeddings.position_embeddings is not None:
        tables.add(id(embeddings.position_embeddings.weight))
    tables.discard(id(model.head_weight))
    weights = sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in tables)
    element = model.head_weight.element_size()
    return weights + 2 * config.n_layer * batch * length * model.cache_heads * config.head_dim * element


def prefill_rows(
    name: str, ours: GPTLMHeadModel, theirs: Any, sizes: Sizes, batch: int
) -> list[dict[str, Any]]:
    ids = random_ids(ours, batch, sizes.prefill_prompt)
    cache = make_cache(ours, batch, sizes.prefill_prompt)

    @torch.no_grad()
    def forward() -> object:
        cache.reset()
        return ours(ids, cache=cache, num_last_tokens=1)

    @torch.no_grad()
    def their_forward() -> object:
        return theirs(ids, use_cache=True, logits_to_keep=1)

    calls: dict[str, Call] = {
        "ours": forward,
        "matrix products and attention alone": floor_of(ours, batch, sizes.prefill_prompt),
        "transformers": their_forward,
    }
    if sizes.device == "cuda":
        timings = interleaved_times(calls, samples=max(sizes.samples, 10))
    else:
        seconds = wall_times(calls, sizes)
        timings = {contestant: _timing(sorted(t * 1e6 for t in seconds[contestant])) for contestant in calls}
    floor_us = timings["matrix products and attention alone"].median_us
    return [
        _row(
            ("prefill", name, batch, sizes.prefill_prompt, contestant),
            timing,
            tokens_per_s=ids.numel() / timing.median_us * 1e6,
            times_of_floor=timing.median_us / floor_us,
        )
        for contestant, timing in timings.items()
    ]


def floor_of(model: GPTLMHeadModel, batch: int, seqlen: int) -> Call:
    """The matrix products of all layers and of the head for the last tokens, and attention, on random data."""
    config, weight = model.config, model.head_weight

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=weight.device, dtype=weight.dtype)

    x = random(batch, seqlen, config.d_model)
    heads = config.n_head + 2 * model.cache_heads
    counts = [config.n_head, model.cache_heads, model.cache_heads]
    q, k, v = random(batch, seqlen, heads, config.head_dim).split(counts, dim=2)
    attended = random(batch, seqlen, config.n_head * config.head_dim)
    inner = random(batch, seqlen, config.inner_dim)

    @torch.no_grad()
    def run() -> None:
        for layer in model.transformer.layers:
            mixer, mlp = layer.mixer, layer.mlp
            F.linear(x, mixer.Wqkv.weight, mixer.Wqkv.bias)
            flash_attn_func(q, k, v, causal=True)
            F.linear(attended, mixer.out_proj.weight, mixer.out_proj.bias)
            F.linear(x, mlp.fc1.weight, mlp.fc1.bias)
            F.linear(inner, mlp.fc2.weight, mlp.fc2.bias)
        F.linear(x[:, -1:], weight)

    return run


def wall_times(calls: Mapping[Any, Call], sizes: Sizes) -> dict[Any, list[float]]:
    """Seconds of whole calls, host and device, contestants in turn."""
    times: dict[Any, list[float]] = {key: [] for key in calls}
    keys = list(calls)
    for number in range(-1, sizes.samples):  # the first round warms up
        shift = number % len(keys)
        for key in keys[shift:] + keys[:shift]:
            _wait(sizes.device)
            start = time.perf_counter()
            calls[key]()
            _wait(sizes.device)
            if number >= 0:
                times[key].append(time.perf_counter() - start)
    return times


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _timing(ordered: list[float]) -> Timing:
    last = len(ordered) - 1
    return Timing(statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)])


def _row(
    case: tuple[str, str, int, int, str], timing: Timing, *, tokens_per_s: float, **figures: float
) -> dict[str, Any]:
    row: dict[str, Any] = dict(zip(("phase", "model", "batch", "prompt", "contestant"), case, strict=True))
    row |= {
        "median_us": round(timing.median_us, 1),
        "p20_us": round(timing.p20_us, 1),
        "p80_us": round(timing.p80_us, 1),
        "tokens_per_s": round(tokens_per_s, 1),
    }
    for name, digits in (("gbps", 1), ("share_of_copy", 3), ("times_of_floor", 3)):
        row[name] = round(figures[name], digits) if name in figures else None
    print("  ".join(str(value) for value in row.values()), flush=True)
    return row


def runs_within(seconds: int, call: Call) -> bool:
    """Whether a peer runs at all, the first time within so many seconds."""
    try:
        with _time_limit(seconds):
            call()
    except Exception as error:
        print(f"a peer is left out: {type(error).__name__}: {str(error)[:200]}", flush=True)
        return False
    return True


@contextlib.contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


if __name__ == "__main__":
    main()

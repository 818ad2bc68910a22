"""A thousand steps of GPT-2 124M on real text: the kernels in bf16 against attention in float32.

The text is the source of Python's standard library. Both runs have the same initial weights and the same batches; what
differs is attention: the CUDA kernels on bf16 queries, keys and values, or torch's on float32 ones. A third run is the
first one again with other initial weights: how far apart losses are by chance.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from flash_attn_models.gpt import GPTConfig, GPTLMHeadModel
from flash_attn_models.testing import measure_ceilings, write_result
from flash_attn_train.configs import GPTModelConfig, TextDataConfig, TokenizerConfig, TrainConfig
from flash_attn_train.configs.optimizer import AdamWConfig
from flash_attn_train.data import build_data
from flash_attn_train.optim import build_optimizer, warmup_cosine
from torch import Tensor, nn
from torch.nn import functional as F

RECORD_EVERY = 50
Attention = Callable[..., Tensor]


def float32_attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """torch's causal attention on float32 copies: q, k, v (B,S,H,D)."""
    with torch.autocast("cuda", enabled=False):
        heads_first = [x.float().transpose(1, 2) for x in (q, k, v)]
        out = F.scaled_dot_product_attention(*heads_first, is_causal=True)
    return out.transpose(1, 2).to(q.dtype)


@contextlib.contextmanager
def attention_in(function: Attention | None) -> Iterator[None]:
    if function is None:
        yield
    else:
        with mock.patch("flash_attn_models.layers.attention.flash_attn_func", function):
            yield


def train(seed: int, attention: Attention | None, steps: int, batch_size: int) -> list[float]:
    """Mean training losses of the last RECORD_EVERY steps, every RECORD_EVERY steps."""
    config = TrainConfig(
        model=GPTModelConfig(max_seqlen=1024),
        data=TextDataConfig(),
        tokenizer=TokenizerConfig(vocab_size=8192),
    )
    data = build_data(config)
    torch.manual_seed(seed)
    shape = GPTConfig(vocab_size=data.vocab_size, max_seqlen=1024, n_layer=12, n_head=12, d_model=768)
    model = GPTLMHeadModel(shape, device="cuda")
    optimizer = build_optimizer(AdamWConfig(lr=6e-4), model)
    peaks = [group["lr"] for group in optimizer.param_groups]
    recent: list[Tensor] = []
    curve = []
    for step in range(steps):
        factor = warmup_cosine(step, warmup_steps=steps // 10, decay_steps=steps, min_lr_ratio=0.1)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        batch = data.train_samples.batch(np.arange(step * batch_size, (step + 1) * batch_size))  # type: ignore[union-attr]
        with torch.autocast("cuda", torch.bfloat16), attention_in(attention):
            loss = model.loss(batch["input_ids"].cuda(), batch["labels"].cuda())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append(loss.detach())
        if len(recent) == RECORD_EVERY:
            curve.append(torch.stack(recent).mean().item())
            recent.clear()
    return curve


RUNS: dict[str, tuple[int, Attention | None]] = {
    "kernels, bf16": (0, None),
    "float32 attention": (0, float32_attention),
    "kernels, bf16, other weights": (1, None),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", default="loss.json", help="result file (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1000, help="of each run (default: %(default)s)")
    parser.add_argument(
        "--batch-size", type=int, default=8, help="sequences of 1024 tokens (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="100 steps")
    arguments = parser.parse_args()
    ceilings = measure_ceilings()
    rows: list[dict[str, Any]] = []
    for name, (seed, attention) in RUNS.items():
        curve = train(seed, attention, 100 if arguments.quick else arguments.steps, arguments.batch_size)
        rows += [
            {"run": name, "step": RECORD_EVERY * number, "loss": round(loss, 4)}
            for number, loss in enumerate(curve, start=1)
        ]
        print(name, [round(loss, 3) for loss in curve], flush=True)
        write_result(arguments.json, "loss", rows, ceilings)


if __name__ == "__main__":
    main()

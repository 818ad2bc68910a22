"""An MLP forward and backward against its bare products, eager torch and torch.compile.

16384 tokens, 4096 -> 16384 -> 4096, with biases (gated: 4096 -> 2 x 8192 -> 4096). The bare products are the two of the
forward and the four of the backward by torch.mm, on the tensors that the layer has there, without bias, activation and
sums: ``share_of_bare`` is their time divided by the contestant's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config
import torch.nn.functional as F
from flash_attn_ops.fused_dense import gated_mlp, mlp
from flash_attn_ops.testing import interleaved_times, measure_ceilings, write_result
from torch import Tensor

torch._functorch.config.donated_buffer = False  # compiled backwards are timed again and again on one graph

TOKENS, FEATURES = 16384, 4096
HIDDEN = {"gelu_tanh": 16384, "relu": 16384, "squared_relu": 16384, "swiglu": 8192}


def plain(activation: str, x: Tensor, w1: Tensor, w2: Tensor, b1: Tensor, b2: Tensor) -> Tensor:
    return F.linear(hidden(activation, F.linear(x, w1, b1)), w2, b2)


def hidden(activation: str, pre: Tensor) -> Tensor:
    if activation == "swiglu":
        value, gate = pre.chunk(2, dim=-1)
        return F.silu(gate) * value
    return {
        "gelu_tanh": lambda: F.gelu(pre, approximate="tanh"),
        "relu": lambda: F.relu(pre),
        "squared_relu": lambda: F.relu(pre).square(),
    }[activation]()


def ours(activation: str, heuristic: int | str, *tensors: Tensor) -> Any:
    if activation == "swiglu":
        return gated_mlp(*tensors, activation="silu", order="value_gate", heuristic=heuristic)  # type: ignore
    return mlp(*tensors, activation=activation, heuristic=heuristic)  # type: ignore


def make_tensors(activation: str, tokens: int) -> list[Tensor]:
    """x, weights, biases, random: clocks depend on what is multiplied."""
    width = HIDDEN[activation]
    fc1 = 2 * width if activation == "swiglu" else width
    shapes = ((tokens, FEATURES), (fc1, FEATURES), (FEATURES, width), (fc1,), (FEATURES,))
    scales = (1.0, FEATURES**-0.5, width**-0.5, 1.0, 1.0)
    return [
        (torch.randn(shape, device="cuda") * scale).bfloat16().requires_grad_()
        for shape, scale in zip(shapes, scales, strict=True)
    ]


def bare_products(activation: str, tensors: list[Tensor], d_out: Tensor) -> dict[str, Callable[[], object]]:
    x, w1, w2, b1, _ = (tensor.detach() for tensor in tensors)
    pre = F.linear(x, w1, b1).requires_grad_()
    act = hidden(activation, pre)
    (d_pre,) = torch.autograd.grad(act, pre, d_out @ w2)
    act = act.detach()

    def forward() -> object:
        return x @ w1.t(), act @ w2.t()

    def both() -> object:
        return forward(), d_out @ w2, d_out.t() @ act, d_pre.t() @ x, d_pre @ w1

    return {"forward": forward, "forward + backward": both}


def check(
    activation: str, contestants: dict[str, Callable[..., Any]], tensors: list[Tensor], d_out: Tensor
) -> None:
    results = {}
    for name, call in contestants.items():
        out = call(*tensors)
        results[name] = [out.detach(), *torch.autograd.grad(out, tensors, d_out)]
    for name, found in results.items():
        for index, (actual, expected) in enumerate(zip(found, results["torch"], strict=True)):
            error = ((actual.float() - expected.float()).norm() / expected.float().norm()).item()
            if not error < (3e-2 if expected.dim() == 1 else 1e-2):
                raise RuntimeError(f"{activation}: {name}, tensor {index}: relative difference {error:.2e}")


def measure(activation: str, heuristics: list[int | str], tokens: int, samples: int) -> list[dict[str, Any]]:
    tensors = make_tensors(activation, tokens)
    d_out = torch.randn(tokens, FEATURES, device="cuda").bfloat16()
    compiled = torch.compile(lambda *t: plain(activation, *t), dynamic=False)
    contestants: dict[str, Callable[..., Any]] = {
        "ours" if heuristic == "auto" else f"ours, heuristic {heuristic}": (
            lambda *t, h=heuristic: ours(activation, h, *t)
        )
        for heuristic in heuristics
    }
    contestants |= {"torch": lambda *t: plain(activation, *t), "torch.compile": compiled}
    check(activation, contestants, tensors, d_out)
    bare = bare_products(activation, tensors, d_out)

    def forward(call: Callable[..., Any]) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad():
                return call(*tensors)

        return run

    def both(call: Callable[..., Any]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(call(*tensors), tensors, d_out)

    rows = []
    for direction, wrap in (("forward", forward), ("forward + backward", both)):
        calls = {"bare products": bare[direction]} | {name: wrap(call) for name, call in contestants.items()}
        times = interleaved_times(calls, samples=samples, warmup=3)
        for name, time in times.items():
            rows.append(
                {
                    "activation": activation,
                    "direction": direction,
                    "dtype": "bfloat16",
                    "tokens": tokens,
                    "features": FEATURES,
                    "hidden_features": HIDDEN[activation],
                    "contestant": name,
                    "median_us": round(time.median_us, 1),
                    "p20_us": round(time.p20_us, 1),
                    "p80_us": round(time.p80_us, 1),
                    "share_of_bare": round(times["bare products"].median_us / time.median_us, 4),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", default="fused_dense.json", help="result file (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one activation, fewer samples")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="default: %(default)s")
    parser.add_argument(
        "--heuristics", nargs="+", default=["auto"], help="of ours, beside each other (default: auto)"
    )
    arguments = parser.parse_args()
    heuristics = [int(text) if text.lstrip("-").isdigit() else text for text in arguments.heuristics]
    ceilings = measure_ceilings()
    print(f"ceilings: {ceilings}", flush=True)
    rows = []
    for activation in ["gelu_tanh"] if arguments.quick else HIDDEN:
        measured = measure(activation, heuristics, arguments.tokens, samples=8 if arguments.quick else 20)
        rows += measured
        for row in measured:
            print("  ".join(str(value) for value in row.values()), flush=True)
        torch.cuda.empty_cache()
        write_result(arguments.json, "fused_dense", rows, ceilings)


if __name__ == "__main__":
    main()

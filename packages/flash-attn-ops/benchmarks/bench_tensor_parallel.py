"""A tensor-parallel MLP on all GPUs of a machine, against the same without overlap, against DTensor, and against its
bare products.

Times are of the slowest rank, with forward alone and with backward; tflops are of one GPU. "products" is the same
matrix products without communication: what lies between it and a contestant is communication that nothing hides. On
one GPU there is nothing to send, and the layers are compared with torch's linear layers.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from flash_attn_ops.activations import activate
from flash_attn_ops.distributed import all_gather, all_reduce, copy_to_ranks, reduce_scatter, resolve_group
from flash_attn_ops.tensor_parallel import ParallelMLP, shard_state_dict
from flash_attn_ops.testing import measure_ceilings, write_result
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import Replicate, Shard

ACTIVATION = "gelu_tanh"
SAMPLE_US = 3000.0


class Problem(NamedTuple):
    sequence_parallel: bool
    tokens: int
    features: int
    hidden: int


class Contestant(NamedTuple):
    module: Callable[[Tensor], Tensor]
    x: Tensor
    upstream: Tensor
    parameters: list[nn.Parameter]

    def forward(self) -> Tensor:
        with torch.no_grad():
            return finished(self.module(self.x))

    def forward_backward(self) -> tuple[Tensor, ...]:
        gradients = torch.autograd.grad(self.module(self.x), [self.x, *self.parameters], self.upstream)
        return tuple(map(finished, gradients))


def finished(tensor: Tensor) -> Tensor:
    """DTensor layers return collectives that nobody has waited for yet, which would not be timed."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.wait() if isinstance(local, AsyncCollectiveTensor) else local


class TorchMLP(nn.Module):
    def __init__(self, features: int, hidden: int, device: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.fc1 = nn.Linear(features, hidden, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, features, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(activate(self.fc1(x), ACTIVATION))


def in_turn(x: Tensor, mlp: ParallelMLP, sequence_parallel: bool) -> Tensor:
    """The layer without overlap: every step waits for the one before."""
    group, fc1, fc2 = mlp.fc1.group, mlp.fc1, mlp.fc2
    x = all_gather(x, group) if sequence_parallel else copy_to_ranks(x, group)
    partial_sum = F.linear(activate(F.linear(x, fc1.weight, fc1.bias), ACTIVATION), fc2.weight)
    out = reduce_scatter(partial_sum, group) if sequence_parallel else all_reduce(partial_sum, group)
    # Its gradient is of this rank's tokens; ours is of all. To add it up is another all-reduce, left out here.
    return out + fc2.bias


def make_contestants(
    problem: Problem, group: dist.ProcessGroup, device: str, dtype: torch.dtype
) -> dict[str, Contestant]:
    me = resolve_group(group)
    torch.manual_seed(0)
    whole = TorchMLP(problem.features, problem.hidden, device, dtype)
    x, upstream = (torch.randn(problem.tokens, problem.features, device=device, dtype=dtype) for _ in "xy")

    def contestant(module: Callable[[Tensor], Tensor], owner: nn.Module, cut: bool) -> Contestant:
        tensors = (t.chunk(me.size)[me.rank].clone() if cut else t.clone() for t in (x, upstream))
        local, gradient = tensors
        return Contestant(module, local.requires_grad_(), gradient, list(owner.parameters()))

    ours = ParallelMLP(
        problem.features,
        problem.hidden,
        activation=ACTIVATION,
        group=group,
        sequence_parallel=problem.sequence_parallel,
        device=device,
        dtype=dtype,
    )
    ours.load_state_dict(shard_state_dict(ours, whole.state_dict(), me.rank))
    contestants = {"ours": contestant(ours, ours, problem.sequence_parallel)}
    if me.size == 1:
        return contestants | {"torch": contestant(whole, whole, False)}
    turns = partial(in_turn, mlp=ours, sequence_parallel=problem.sequence_parallel)
    contestants["without overlap"] = contestant(turns, ours, problem.sequence_parallel)
    layout = Shard(0) if problem.sequence_parallel else Replicate()
    plan = {
        "fc1": ColwiseParallel(input_layouts=layout),
        "fc2": RowwiseParallel(output_layouts=layout),
    }
    mesh = init_device_mesh(torch.device(device).type, (me.size,))
    # All ranks drew the same weights: nothing to send.
    dtensor = parallelize_module(copy.deepcopy(whole), mesh, plan, src_data_rank=None)
    contestants["torch DTensor"] = contestant(dtensor, dtensor, problem.sequence_parallel)
    products = TorchMLP(problem.features, problem.hidden // me.size, device, dtype)
    return contestants | {"products": contestant(products, products, False)}


def check_agreement(contestants: dict[str, Contestant]) -> None:
    """Outputs and input gradients of all layers, to the rounding of bf16 sums."""
    layers = {name: layer for name, layer in contestants.items() if name != "products"}
    results = {name: (layer.forward(), layer.forward_backward()[0]) for name, layer in layers.items()}
    for name, tensors in results.items():
        for actual, expected in zip(tensors, results["ours"], strict=True):
            error = ((actual.float() - expected.float()).norm() / expected.float().norm()).item()
            if not error < 1e-2:
                raise RuntimeError(f"{name}: relative difference {error:.2e}")


def sample_us(call: Callable[[], object], repeats: int) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    dist.barrier()
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        call()
    stop.record()
    stop.synchronize()
    return slowest(start.elapsed_time(stop) * 1e3 / repeats)


def slowest(us: float) -> float:
    """The same on all ranks, which must make the same number of calls."""
    worst = torch.tensor(us, device="cuda")
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return worst.item()


def interleaved(calls: dict[str, Callable[[], object]], samples: int) -> dict[str, list[float]]:
    repeats = {}
    for name, call in calls.items():
        sample_us(call, 3)
        repeats[name] = max(1, round(SAMPLE_US / sample_us(call, 3)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(samples):
        for name, call in calls.items():
            times[name].append(sample_us(call, repeats[name]))
    return times


def measure(
    problem: Problem, group: dist.ProcessGroup, gemm_tflops: float, samples: int
) -> list[dict[str, Any]]:
    contestants = make_contestants(problem, group, "cuda", torch.bfloat16)
    check_agreement(contestants)
    ranks = dist.get_world_size(group)
    rows = []
    for direction, products in (("forward", 2), ("forward and backward", 6)):
        calls = {
            name: layer.forward if direction == "forward" else layer.forward_backward
            for name, layer in contestants.items()
        }
        for name, times in interleaved(calls, samples).items():
            median = statistics.median(times)
            flops = products * 2 * problem.tokens * problem.features * problem.hidden / ranks
            tflops = flops / median * 1e-6
            ordered = sorted(times)
            rows.append(
                {
                    "ranks": ranks,
                    **problem._asdict(),
                    "direction": direction,
                    "contestant": name,
                    "median_us": round(median, 1),
                    "p20_us": round(ordered[round(0.2 * (len(ordered) - 1))], 1),
                    "p80_us": round(ordered[round(0.8 * (len(ordered) - 1))], 1),
                    "tflops": round(tflops, 1),
                    "share_of_gemm": round(tflops / gemm_tflops, 3),
                }
            )
    return rows


def problems(quick: bool) -> list[Problem]:
    sizes = (
        [(16384, 4096, 16384)] if quick else [(4096, 4096, 16384), (16384, 4096, 16384), (16384, 8192, 28672)]
    )
    return [Problem(sequence_parallel, *size) for size in sizes for sequence_parallel in (True, False)]


def run_rank(rank: int, arguments: argparse.Namespace, rendezvous: str) -> None:
    torch.cuda.set_device(rank)
    ceilings = measure_ceilings() if rank == 0 else {"gemm_tflops": 1.0}
    torch.cuda.empty_cache()
    dist.init_process_group(
        "nccl",
        init_method=rendezvous,
        rank=rank,
        world_size=arguments.ranks,
        device_id=torch.device("cuda", rank),
    )
    assert dist.group.WORLD is not None
    rows: list[dict[str, Any]] = []
    for problem in problems(arguments.quick):
        measured = measure(
            problem, dist.group.WORLD, ceilings["gemm_tflops"], samples=6 if arguments.quick else 20
        )
        torch.cuda.empty_cache()
        rows += measured
        if rank == 0:
            for row in measured:
                print("  ".join(map(str, row.values())), flush=True)
            write_result(arguments.json, "tensor_parallel", rows, ceilings)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", default="tensor_parallel.json", help="result file (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one size, fewer samples")
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count(), help="GPUs (default: all)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run_rank, (arguments, Path(folder, "rendezvous").as_uri()), nprocs=arguments.ranks)


if __name__ == "__main__":
    main()

"""Kernels that are started past Triton's host code are those that Triton would start, with the same arguments."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flash_attn_ops.dispatch import TRITON_INTERPRETS
from flash_attn_ops.norm import rms_norm

pytest.importorskip("triton", reason="needs Triton, which is not installed")
if TRITON_INTERPRETS:
    pytest.skip("kernels that are interpreted are not compiled", allow_module_level=True)

import triton
import triton.language as tl
from flash_attn_ops import triton_launch
from flash_attn_ops.triton_launch import launch
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

STREAM = 7


@triton.jit(do_not_specialize=["count", "other_count"])
def _kernel(
    first_ptr, second_ptr, third_ptr, size, other_size, count, other_count, number, FLAG: tl.constexpr
): ...


@triton.jit(do_not_specialize=["count"])
def _other_kernel(first_ptr, size, count, number, FLAG: tl.constexpr): ...


def compiled_for(kernel: JITFunction[Any], args: tuple[Any, ...], num_warps: int) -> tuple[Any, ...]:
    """What Triton compiles these arguments for, by its own account, on an NVIDIA GPU."""
    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    values, specialization, options = bind(*args, num_warps=num_warps)
    constants = {
        name: values[name] for name in values if kernel.params[list(values).index(name)].is_constexpr
    }
    return kernel.__name__, tuple(specialization), tuple(options.items()), tuple(constants.items())


class Launches:
    """What Triton was asked to run, and what was started past it: what that was compiled for, and its arguments."""

    def __init__(self) -> None:
        self.by_triton: list[Any] = []
        self.past_triton: list[tuple[Any, tuple[Any, ...]]] = []

    def run(self, kernel: JITFunction[Any], *args: Any, grid: Any, warmup: bool, num_warps: int) -> Any:
        wanted = compiled_for(kernel, args, num_warps)
        self.by_triton.append(wanted)
        compiled = CompiledKernel.__new__(CompiledKernel)
        compiled.module, compiled.function, compiled.packed_metadata = None, "function", "metadata"
        compiled._run = lambda *started: self.past_triton.append((wanted, started))
        return compiled


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    launches = Launches()
    monkeypatch.setattr(
        JITFunction, "run", lambda kernel, *args, **kwargs: launches.run(kernel, *args, **kwargs)
    )
    monkeypatch.setattr(
        triton_launch, "driver", SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda _: STREAM))
    )
    monkeypatch.setattr(triton_launch, "_compiled", {})
    return launches


def call(
    tensor: torch.Tensor, size: int = 32, count: int = 3, number: float = 1.0, flag: Any = True
) -> tuple[Any, ...]:
    return _other_kernel, (5, 1), (tensor,), (size,), (count,), (number,), (flag,), 4


def test_like_calls_are_what_triton_takes_for_like(launches: Launches) -> None:
    """Random arguments of few values, so that most calls have been seen in part and many as a whole."""
    values = torch.zeros(64)
    pointers = (None, values, values[4:], values[1:], values.half(), values.bfloat16(), values.long()[:2])
    sizes = (0, 1, 2, 15, 16, 17, 32, 1024, 2**31 - 1, 2**31, 2**40, -16, -(2**31))
    draw = random.Random(0)
    for _ in range(8000):
        tensors = (values, draw.choice(pointers), draw.choice(pointers))
        given, counts = (
            (draw.choice(sizes), draw.choice(sizes[:8])),
            (draw.choice(sizes), draw.choice((1, 3))),
        )
        number, flag, num_warps = draw.choice((0, 1, 1.0, 0.5)), draw.choice((True, "a")), draw.choice((4, 8))
        before = len(launches.past_triton)
        launch(_kernel, (9, 2), tensors, given, counts, (number,), (flag,), num_warps)
        wanted = compiled_for(_kernel, (*tensors, *given, *counts, float(number), flag), num_warps)
        if len(launches.past_triton) == before:
            assert launches.by_triton[-1] == wanted
            continue
        compiled, (*grid, stream, function, metadata, launch_metadata, enter, leave) = (
            launches.past_triton[-1][0],
            launches.past_triton[-1][1][:9],
        )
        assert compiled == wanted
        assert (grid, stream, function, metadata) == ([9, 2, 1], STREAM, "function", "metadata")
        assert (launch_metadata, enter, leave) == (None, None, None)
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        assert launches.past_triton[-1][1][9:] == (*addresses, *given, *counts, number, flag)
    assert len(launches.past_triton) > 1000 and len(set(launches.by_triton)) > 500


@pytest.mark.parametrize(
    ("change", "is_like"),
    [
        (lambda x: call(x.clone(), 48, 5, 2.5), True),
        (lambda x: call(x[1:]), False),
        (lambda x: call(x.half()), False),
        (lambda x: call(x, size=33), False),
        (lambda x: call(x, size=1), False),
        (lambda x: call(x, size=2**33), False),
        (lambda x: call(x, count=2**33), False),
        (lambda x: call(x, flag="other"), False),
        (lambda x: (*call(x)[:-1], 8), False),
    ],
)
def test_what_differs(change: Callable[[torch.Tensor], Any], is_like: bool, launches: Launches) -> None:
    x = torch.zeros(64)
    launch(*call(x))
    launch(*change(x))
    assert (len(launches.by_triton), len(launches.past_triton)) == ((1, 1) if is_like else (2, 0))


def test_whoever_watches_launches_is_told(launches: Launches) -> None:
    seen: list[Any] = []
    x = torch.zeros(4)
    for _ in range(2):
        launch(*call(x))
    assert len(launches.past_triton) == 1
    for hooks in (triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook):
        hooks.add(seen.append)
        try:
            launch(*call(x))
        finally:
            hooks.remove(seen.append)
    assert (len(launches.by_triton), len(launches.past_triton)) == (3, 1)
    launch(*call(x))
    assert len(launches.past_triton) == 2


def test_unknown_versions_of_triton_start_their_kernels(
    launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_launch, "_IS_KNOWN", False)
    for _ in range(3):
        launch(*call(torch.zeros(4)))
    assert len(launches.by_triton) == 3 and not launches.past_triton


def test_what_runs_nothing_is_not_kept(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(JITFunction, "run", lambda *_, **__: None)  # as the interpreter
    launch(*call(torch.zeros(4)))
    assert not triton_launch._compiled


def test_memory_is_bounded(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "MAX_COMPILED", 3)
    for flag in range(10):
        launch(*call(torch.zeros(4), flag=flag))
        assert len(triton_launch._compiled) <= 3


@pytest.mark.parametrize("wrong", ["counts", "constants"])
def test_arguments_of_another_kind_are_found(wrong: str, launches: Launches) -> None:
    kernel, grid, tensors, _, _, numbers, constants, num_warps = call(torch.zeros(4))
    with pytest.raises(AssertionError):
        if wrong == "counts":  # a size that the kernel is compiled for
            launch(kernel, grid, tensors, (), (32, 3), numbers, constants, num_warps)
        else:
            launch(kernel, grid, tensors, (32,), (3,), (), (*numbers, *constants), num_warps)


@pytest.mark.gpu
def test_the_same_bits_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that Triton starts, and the same calls past it; aligned and not, of many sizes and dtypes."""
    monkeypatch.setattr(triton_launch, "_compiled", {})

    def results() -> list[torch.Tensor]:
        torch.manual_seed(0)
        found = []
        for rows, columns in ((1, 16), (3, 17), (64, 1024), (5, 1000), (2, 40000), (65, 8192)):
            for dtype in (torch.bfloat16, torch.float32):
                memory = torch.randn(rows * columns + 1, device="cuda", dtype=dtype)
                weight = torch.randn(columns, device="cuda", dtype=dtype, requires_grad=True)
                for begin in (0, 1):
                    x = memory[begin : begin + rows * columns].view(rows, columns).requires_grad_()
                    out = rms_norm(x, weight)
                    found += (out, *torch.autograd.grad(out, (x, weight), torch.ones_like(out)))
        return found

    first, again = results(), results()
    assert triton_launch._compiled
    monkeypatch.setattr(triton_launch, "_IS_KNOWN", False)
    monkeypatch.setattr(triton_launch, "_compiled", {})
    by_triton = results()
    assert not triton_launch._compiled
    for one, two, three in zip(first, again, by_triton, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)


@pytest.mark.gpu
def test_the_current_stream_is_taken() -> None:
    """A graph is captured on a stream of its own; what ran elsewhere would not be in it."""
    x, weight = torch.randn(64, 512, device="cuda"), torch.randn(512, device="cuda")
    rms_norm(x, weight)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = rms_norm(x, weight)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(out, rms_norm(x, weight))

"""How kernels are started: by Triton the first time, and for calls like that one past most of Triton's host code.

Triton finds out for every launch what it would compile it for: it looks at each argument. Here the arguments come
sorted by what of them Triton looks at, so that a short key tells whether a launch like this one has been compiled.

What Triton tells apart, and where it is in the key:

* pointers: None, and the dtype: both in it. Divisibility of the address by 16: others than divisible ones are left to
  Triton.
* integers that a kernel is compiled for: 1, and divisibility by 16: in it by the remainder, and 1 by itself. 32 bits or
  64: those beyond 32 bits are left to Triton.
* integers that it is not compiled for (``do_not_specialize``): their 32 bits, as above.
* floats: nothing.
* constants and the number of warps: in it. The device, since a compiled kernel is loaded on one.

Settings of Triton that are changed later count for kernels that have not been started yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from .launch import on_device_of

MAX_COMPILED = 4096  # entries: calls of ever new constants should not fill the memory
_INT32_MIN, _INT32_MAX = -(2**31), 2**31 - 1
# The versions of Triton whose compiled kernels are known to be started as ``launch`` does it; and on AMD's GPUs Triton
# looks at more than the above.
_IS_KNOWN = (3, 6) <= tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 9) and not torch.version.hip

# How to start a kernel: what does so, its function and metadata, a device's current stream; and the compiled kernel,
# without which the function would be unloaded.
_Start = tuple[Callable[..., None], Any, Any, Callable[[int], int], CompiledKernel]
_compiled: dict[tuple[Any, ...], _Start] = {}


def launch(
    kernel: Any,
    grid: tuple[int, int],
    pointers: Sequence[Tensor | None],
    sizes: Sequence[int],
    counts: Sequence[int],
    numbers: Sequence[float],
    constants: tuple[Any, ...],
    num_warps: int,
) -> None:
    """Starts a ``triton.jit`` function on the device of the first pointer.

    Its parameters are in this order: ``pointers`` (the first is not None), ``sizes``, integers that it is compiled for;
    ``counts``, integers that it is not, which its ``do_not_specialize`` names; ``numbers``, floats; ``constants``.
    """
    addresses: list[int | None] = []
    kinds: list[Any] = []
    bits = 0
    for tensor in pointers:
        if tensor is None:
            addresses.append(None)
            kinds.append(None)
        else:
            address = tensor.data_ptr()
            bits |= address
            addresses.append(address)
            kinds.append(tensor.dtype)
    kinds += [-1 if size == 1 else size & 15 for size in sizes]
    first: Any = pointers[0]
    device = first.get_device()
    key = (kernel.fn, device, num_warps, constants, *kinds)
    start = _compiled.get(key)
    integers = (*sizes, *counts)
    is_usual = bits & 15 == 0 and (
        not integers or (min(integers) >= _INT32_MIN and max(integers) <= _INT32_MAX)
    )
    if start is not None and is_usual and not _is_watched():
        run, function, metadata, stream_of, _ = start
        with on_device_of(first):
            run(
                *(grid[0], grid[1], 1, stream_of(device), function, metadata, None, None, None),
                *(*addresses, *integers, *numbers, *constants),
            )
        return
    with on_device_of(first):
        compiled = kernel[grid](*pointers, *integers, *map(float, numbers), *constants, num_warps=num_warps)
    if start is None and is_usual and _IS_KNOWN and isinstance(compiled, CompiledKernel):
        _check_kinds(kernel, len(pointers) + len(sizes), len(counts), len(constants))
        if len(_compiled) >= MAX_COMPILED:
            _compiled.clear()
        stream_of = driver.active.get_current_stream
        _compiled[key] = (
            *(compiled.run, compiled.function, compiled.packed_metadata, stream_of),
            compiled,
        )


def _is_watched() -> bool:
    """Whether somebody, a profiler, wants to be told of launches; Triton does so."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _check_kinds(kernel: JITFunction[Any], begin_counts: int, num_counts: int, num_constants: int) -> None:
    """The arguments are of the kinds that the key takes them for."""
    counts = kernel.params[begin_counts : begin_counts + num_counts]
    begin_constants = len(kernel.params) - num_constants
    assert all(parameter.do_not_specialize for parameter in counts), kernel
    assert [parameter.is_constexpr for parameter in kernel.params] == [
        index >= begin_constants for index in range(len(kernel.params))
    ], kernel

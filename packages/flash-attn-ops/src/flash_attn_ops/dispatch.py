"""Which implementation runs an operation, and why.

There are two: ``triton`` (GPU kernels) and ``reference`` (plain torch operations, any device and dtype). The
choice is a pure function of a few facts, :func:`choose`; :func:`runs_on_triton` collects the facts from
tensors, and warns once for each reason for which a CUDA tensor is left to the slow path.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
TRITON_INTERPRETS = (
    os.environ.get("TRITON_INTERPRET") == "1"
)  # as Triton itself reads it, when kernels are defined
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MIN_CAPABILITY = (8, 0)

MAX_REMEMBERED = 4096  # calls

Result = TypeVar("Result")

_UNKNOWN: Any = object()
_warned: set[str] = set()


@dataclass(frozen=True)
class Choice:
    """The implementation that runs, and the reason."""

    path: Literal["triton", "reference"]
    reason: str


def choose(
    device_type: str,
    dtypes: tuple[torch.dtype, ...],
    capability: tuple[int, int] | None,
    *,
    triton_installed: bool,
    interpreted: bool,
    without_memory: str | None = None,
) -> Choice:
    """The path for tensors of these dtypes on this device; ``capability`` is None where the device has
    none. ``without_memory`` names the type of a tensor that has none, see :func:`has_memory`."""
    if device_type == "cuda":
        if not triton_installed:
            return Choice(
                "reference", "Triton is not installed; install the triton package for the fast kernels"
            )
        if capability is not None and capability < MIN_CAPABILITY:
            name = ".".join(map(str, capability))
            return Choice(
                "reference", f"the GPU has compute capability {name} and the kernels need 8.0 or newer"
            )
    elif not (device_type == "cpu" and interpreted and triton_installed):
        return Choice("reference", f"the tensors are on {device_type} and the kernels run on CUDA devices")
    unsupported = [str(dtype) for dtype in dtypes if dtype not in KERNEL_DTYPES]
    if unsupported:
        return Choice(
            "reference", f"the kernels compute in float32, which is not enough for {unsupported[0]}"
        )
    if without_memory is not None:
        reason = f"a {without_memory} has no memory of its own, from which the kernels could read"
        return Choice("reference", reason)
    if device_type == "cuda":
        return Choice("triton", "CUDA tensors of a supported dtype")
    return Choice("triton", "TRITON_INTERPRET=1 runs the kernels on the CPU")


def explain(*tensors: Tensor) -> Choice:
    """The path these tensors take through any operation of this package, and why."""
    device = tensors[0].device
    capability = None
    if device.type == "cuda" and torch.version.hip is None:
        capability = _capability(device)
    return choose(
        device.type,
        tuple(tensor.dtype for tensor in tensors),
        capability,
        triton_installed=TRITON_INSTALLED,
        interpreted=TRITON_INTERPRETS,
        without_memory=next((type(tensor).__name__ for tensor in tensors if not has_memory(tensor)), None),
    )


def has_memory(tensor: Tensor) -> bool:
    """Whether the tensor has values in memory of its own: not those of the meta device and of FakeTensorMode, which
    have no values, and not those that stand for other tensors, as a DTensor does."""
    usual = Tensor.__torch_dispatch__
    return not tensor.is_meta and getattr(type(tensor), "__torch_dispatch__", usual) is usual


def _capability(device: torch.device) -> tuple[int, int]:
    if torch.compiler.is_compiling():
        return _read_capability(device)
    return _remembered_capability(device)


def _read_capability(device: torch.device) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(device)  # which torch.compile takes for a constant
    return properties.major, properties.minor


_remembered_capability = functools.cache(_read_capability)


def runs_on_triton(operation: str, *tensors: Tensor | None) -> bool:
    """Whether the kernels take these tensors (None is skipped, and so are calls that have nothing to
    compute)."""
    given = [tensor for tensor in tensors if tensor is not None]
    if given[0].numel() == 0:
        return False
    choice = explain(*given)
    if choice.path == "reference" and given[0].is_cuda and not torch.compiler.is_compiling():
        message = f"{operation} runs as plain torch operations: {choice.reason}."
        if message not in _warned:
            _warned.add(message)
            warnings.warn(message, stacklevel=4)
    return choice.path == "triton"


def once_for_like_calls(decide: Callable[..., Result]) -> Callable[..., Result]:
    """Decorates a check of arguments or a choice that reads nothing of tensors but type, shape, dtype and device: what
    it returned for one call is returned for others like it. It takes a tuple of tensors (and None), and options that
    are hashable. A tracer always runs it, and so do calls that are refused, or whose sizes are symbols."""
    known: dict[tuple[Any, ...], Any] = {}

    @functools.wraps(decide)
    def decide_once(tensors: tuple[Tensor | None, ...], *options: Any) -> Result:
        if torch.compiler.is_compiling():
            return decide(tensors, *options)
        key: list[Any] = [TRITON_INSTALLED, TRITON_INTERPRETS, *options]
        try:
            for tensor in tensors:
                if tensor is None:
                    key.append(None)
                else:
                    key += (type(tensor), tensor.shape, tensor.dtype, tensor.device)
            result = known.get(tuple(key), _UNKNOWN)
        except (AttributeError, TypeError):
            return decide(tensors, *options)
        if result is _UNKNOWN:
            result = decide(tensors, *options)
            if len(known) >= MAX_REMEMBERED:
                known.clear()
            known[tuple(key)] = result
        return result

    return decide_once

"""Operators that torch.compile takes as they are.

A function that launches kernels becomes an operator ``torch.ops.flash_attn_ops.*`` with a schema and a fake that
allocates what it returns: a tracer records the call and never looks inside. Eager code calls the function itself,
which costs less than the dispatcher. Registering imports neither Triton nor the compiler.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from flash_attn_kernels.second_derivative import (
    once_differentiable as once_differentiable,  # for layers above
)
from torch import Tensor

_library = torch.library.Library("flash_attn_ops", "DEF")


def opaque(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a launcher. It takes positional arguments as ``schema`` says (which names the operator and declares
    what it overwrites), on any device, and returns new tensors: one, or a tuple with None for absent ones.

    ``fake`` takes the same arguments and returns tensors of the same shapes, strides, dtypes and device, without
    their values. Schemas know no absent results: where the function returns None the operator returns an empty
    tensor, so callers go by what they asked for.
    """
    name = schema[: schema.index("(")]

    def register(launch: Callable[..., Any]) -> Callable[..., Any]:
        _library.define(schema)
        _library.impl(name, _without_absent(launch), "CompositeExplicitAutograd")
        torch.library.register_fake(f"flash_attn_ops::{name}", _without_absent(fake), lib=_library)
        operator = getattr(torch.ops.flash_attn_ops, name).default

        @functools.wraps(launch)
        def call(*args: Any) -> Any:
            return operator(*args) if torch.compiler.is_compiling() else launch(*args)

        return call

    return register


def _without_absent(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def returning_tensors(first: Tensor, *rest: Any) -> Any:
        results = function(first, *rest)
        if not isinstance(results, tuple):
            return results
        return tuple(first.new_empty(0) if result is None else result for result in results)

    return returning_tensors


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """``function.apply``, where a tensor may be several of the arguments: torch.compile takes each but once."""
    if torch.compiler.is_compiling():
        arguments = tuple(
            argument.view_as(argument)
            if isinstance(argument, Tensor) and any(argument is earlier for earlier in arguments[:index])
            else argument
            for index, argument in enumerate(arguments)
        )
    return function.apply(*arguments)


def tell_autograd(*overwritten: Tensor | None) -> None:
    """Kernels write behind autograd's back: a backward that has saved these tensors must not take them for what they
    were. (Tracers know from the operators' schemas.)"""
    if torch.compiler.is_compiling():
        return
    for tensor in overwritten:
        if tensor is not None:
            torch.autograd.graph.increment_version(tensor)


def kernels_of(package: str) -> Callable[[], Any]:
    """A function that returns the module ``triton_kernels`` of the package, imported when it is first called: Triton is
    not needed before, and may be missing."""

    @functools.cache
    def kernels() -> Any:
        return importlib.import_module(".triton_kernels", package)

    return kernels

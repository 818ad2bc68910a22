"""An error in the place of second derivatives, for autograd.Functions whose backwards run kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def once_differentiable(what: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates the backward of an autograd.Function, of ``what``: its gradients are an error to differentiate in the
    upstream gradients and in what the forward saved, and so in inputs that are among that, or that it was computed of.

    torch's decorator of this name takes microseconds also where no graph of the gradients is made, and a second
    derivative that is asked for by ``torch.autograd.grad`` with ``allow_unused=True`` (as
    ``torch.autograd.functional.hessian`` does), or where the upstream gradient is a constant, is 0 or None there.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def once(ctx: Any, *upstream: Tensor | None) -> Any:
            # Compiled graphs refuse it themselves.
            if not torch.is_grad_enabled() or torch.compiler.is_compiling():
                return backward(ctx, *upstream)
            kept = _Kept(ctx)
            with torch.no_grad():  # with create_graph
                gradients = backward(kept, *upstream)
            if not isinstance(gradients, tuple):
                gradients = (gradients,)
            present = [x for x in gradients if x is not None]
            if not present:
                return gradients
            inputs = (*map(_varying, upstream), *kept.saved_tensors)
            marked = iter(_NoSecondDerivative.apply(what, len(present), *present, *inputs))
            return tuple(None if x is None else next(marked) for x in gradients)

        return once

    return decorate


class _Kept:
    """The context of a backward, whose saved tensors can be read more than once: under activation checkpointing they
    are there but once."""

    def __init__(self, ctx: Any) -> None:
        self._ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def _varying(gradient: Tensor | None) -> Tensor | None:
    """An upstream gradient, also a constant, so that a graph leads to it."""
    if gradient is None or gradient.requires_grad:
        return gradient
    return gradient.detach().requires_grad_()


class _NoSecondDerivative(torch.autograd.Function):
    """The first ``count`` tensors, gradients, as they are: an error where they are differentiated in the others."""

    @staticmethod
    def forward(ctx: Any, what: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.what = what
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            f"{ctx.what} has no second derivative: got a gradient of it to differentiate, made with create_graph=True. "
            "Fix: leave create_graph out, or compute it by plain torch operations."
        )

"""LAMB: AdamW whose step of each tensor is scaled to the tensor's own norm.

Source: You et al. 2020, arXiv:1904.00962, algorithm 2, with the identity as the scaling function phi. As in the
authors' own runs, tensors without weight decay are not scaled, unless that is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


class Lamb(Optimizer):
    """LAMB over real parameters of any dtype.

    With m and v as AdamW's bias-corrected running means, the update is ``u = m / (sqrt(v) + eps) + weight_decay * x``,
    and the step ``x -= lr * |x| / |u| * u``; the ratio is 1 where one of the norms is 0.

    The state of a parameter is ``step`` (float32 scalar on the CPU), ``exp_avg`` and ``exp_avg_sq`` (like the
    parameter), so that a run that is saved and loaded continues bit for bit. A parameter that is a DTensor is updated
    on each rank's own part, with norms of the whole. A plain tensor is taken as a whole: where it is a shard, the ratio
    is that of the shard.

    Args:
        params: tensors or groups, which may have their own values of the others.
        lr: learning rate.
        betas: decay of the two running means.
        eps: added to the denominator.
        weight_decay: decoupled.
        adapt_undecayed: whether the ratio is used where ``weight_decay`` is 0 too.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        adapt_undecayed: bool = False,
    ) -> None:
        for name, value, valid in (
            ("lr", lr, lr >= 0.0),
            ("betas", betas, all(0.0 <= beta < 1.0 for beta in betas)),
            ("eps", eps, eps >= 0.0),
            ("weight_decay", weight_decay, weight_decay >= 0.0),
        ):
            if not valid:
                expected = "numbers in [0, 1)" if name == "betas" else "at least 0"
                raise ValueError(f"{name}: got {value}; expected {expected}.")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "adapt_undecayed": adapt_undecayed,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all parameters that have a gradient. Returns what the closure does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameters in _alike(group["params"]):
                self._step(parameters, group)
        return loss

    def _step(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        states = [self._state(parameter) for parameter in parameters]
        beta1, beta2 = group["betas"]
        x = [_local(parameter) for parameter in parameters]
        # The running means are of the parameters' dtype, whatever that of a gradient is.
        gradients = [_local(p.grad).to(p.dtype) for p in parameters if p.grad is not None]
        means = [_local(state["exp_avg"]) for state in states]
        squares = [_local(state["exp_avg_sq"]) for state in states]
        for state in states:
            state["step"] += 1
        steps = [state["step"].item() for state in states]

        torch._foreach_lerp_(means, gradients, 1.0 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1.0 - beta2)
        denominators = torch._foreach_div(squares, [1.0 - beta2**step for step in steps])
        torch._foreach_sqrt_(denominators)
        torch._foreach_add_(denominators, group["eps"])
        updates = torch._foreach_div(means, [1.0 - beta1**step for step in steps])
        torch._foreach_div_(updates, denominators)
        if group["weight_decay"]:
            torch._foreach_add_(updates, x, alpha=group["weight_decay"])
        if group["weight_decay"] or group["adapt_undecayed"]:
            ratios: Any = _trust_ratios(parameters, x, updates)
            torch._foreach_mul_(updates, ratios)
        torch._foreach_add_(x, updates, alpha=-group["lr"])

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state


def _alike(parameters: Sequence[Tensor]) -> Iterable[list[Tensor]]:
    """The parameters with a gradient, in lists of one device and dtype: what one foreach call takes."""
    lists: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if parameter.grad.is_sparse:
            raise ValueError("Lamb: got a sparse gradient; expected dense ones. Fix: use sparse=False.")
        lists.setdefault((parameter.device, parameter.dtype), []).append(parameter)
    return lists.values()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _trust_ratios(parameters: list[Tensor], x: list[Tensor], updates: Sequence[Tensor]) -> list[Tensor]:
    """|x| / |u| of each parameter, as scalars on its device: no wait for the device."""
    ratios = []
    for parameter, own, update in zip(
        parameters, _norms(parameters, x), _norms(parameters, updates), strict=True
    ):
        ratio = torch.where((own > 0) & (update > 0), own / update, 1.0)
        ratios.append(ratio.to(parameter.dtype))
    return ratios


def _norms(parameters: list[Tensor], parts: Sequence[Tensor]) -> list[Tensor]:
    """Euclidean norms of whole tensors, of which each rank holds parts laid out as the parameters are."""
    low = parts[0].element_size() < 4
    norms = list(torch._foreach_norm(list(parts), 2, dtype=torch.float32 if low else None))
    for number, (parameter, part) in enumerate(zip(parameters, parts, strict=True)):
        if isinstance(parameter, DTensor):
            whole = DTensor.from_local(
                part,
                parameter.device_mesh,
                parameter.placements,
                run_check=False,
                shape=parameter.shape,
                stride=parameter.stride(),
            )
            norm = torch.linalg.vector_norm(whole, dtype=torch.float32 if low else None)
            assert isinstance(norm, DTensor)
            norms[number] = norm.full_tensor()
    return norms

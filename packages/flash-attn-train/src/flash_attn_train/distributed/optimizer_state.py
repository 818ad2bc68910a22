"""Optimizer state by the names of parameters, which any number of ranks and any order of parameters understand."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import Optimizer

from flash_attn_train.errors import CheckpointError

# Name of a parameter -> name of a value, such as exp_avg -> the value.
NamedState = dict[str, dict[str, Any]]
# As in torch's state dicts, with names for "params".
NamedGroups = list[dict[str, Any]]


def named_state(optimizer: Optimizer, model: nn.Module) -> tuple[NamedState, NamedGroups]:
    """What this rank has of the optimizer's state, not copied, and the groups of all parameters."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    holder = optimizer.optim if isinstance(optimizer, ZeroRedundancyOptimizer) else optimizer
    state = {names[id(parameter)]: dict(values) for parameter, values in holder.state.items()}
    groups = [
        {**group, "params": [names[id(parameter)] for parameter in group["params"]]}
        for group in optimizer.param_groups
    ]
    return state, groups


def numbered_state(state: NamedState, groups: NamedGroups) -> dict[str, Any]:
    """torch's state dict: parameters numbered in the order of the groups."""
    numbers: dict[str, int] = {}
    numbered_groups = []
    for group in groups:
        for name in group["params"]:
            numbers.setdefault(name, len(numbers))
        numbered_groups.append({**group, "params": [numbers[name] for name in group["params"]]})
    return {
        "state": {number: state[name] for name, number in numbers.items() if name in state},
        "param_groups": numbered_groups,
    }


def renamed_state(numbered: dict[str, Any], groups: NamedGroups) -> NamedState:
    """The state of torch's state dict by name.

    Args:
        numbered: of an optimizer with the same groups of parameters.
        groups: as :func:`named_state` says.

    Raises:
        CheckpointError: the groups have other numbers of parameters.
    """
    sizes = [len(group["params"]) for group in groups]
    saved = [len(group["params"]) for group in numbered["param_groups"]]
    if sizes != saved:
        raise CheckpointError(
            f"the checkpoint's optimizer has groups of {saved} parameters, expected {sizes}. Use the optimizer and "
            "the model of the run that wrote it."
        )
    names = [name for group in groups for name in group["params"]]
    numbers = [number for group in numbered["param_groups"] for number in group["params"]]
    return {
        name: numbered["state"][number]
        for name, number in zip(names, numbers, strict=True)
        if number in numbered["state"]
    }

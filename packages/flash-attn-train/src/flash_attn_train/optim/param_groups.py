"""Parameter groups: which parameters are decayed, and with which rate each is trained."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from flash_attn_train.configs.optimizer import AdamWConfig, OptimizerConfig, ParameterOverride
from flash_attn_train.errors import ConfigError
from flash_attn_train.optim.parameters import Kind, NamedParameter, named_parameters, width_of


@dataclass(frozen=True)
class Setting:
    """How one parameter is trained.

    Attributes:
        named: the parameter.
        lr_multiplier: factor on the optimizer's rate.
        weight_decay: of this parameter.
    """

    named: NamedParameter
    lr_multiplier: float
    weight_decay: float


def parameter_settings(model: nn.Module, config: OptimizerConfig) -> list[Setting]:
    """How each parameter that is trained is trained, in the model's order.

    Weight decay goes to matrices (see :func:`flash_attn_train.optim.parameters.named_parameters`). With muP, the rate
    of hidden matrices is scaled by ``mup_base_width / width``, as it is for Adam in Yang et al. 2022, arXiv:2203.03466,
    table 8, and in Cerebras-GPT and BTLM; decoupled decay goes with the rate. The factors of embedding and logits that
    belong to muP are the model's. Then the config's overrides apply, of which ``lr_multiplier`` replaces that scale.

    Raises:
        ConfigError: nothing to train; an override that matches nothing, or changes nothing; muP of a model that has no
            width or no hidden matrices.
    """
    parameters = named_parameters(model)
    if not parameters:
        raise ConfigError(
            "optimizer: the model has no parameters to train; expected some with requires_grad."
        )
    scale = _hidden_scale(config, model, parameters)
    settings = [
        Setting(
            named,
            lr_multiplier=scale if named.kind is Kind.HIDDEN else 1.0,
            weight_decay=config.weight_decay if named.is_decayed else 0.0,
        )
        for named in parameters
    ]
    for number, override in enumerate(config.overrides):
        settings = _overridden(settings, override, f"optimizer.overrides[{number}]")
    return settings


def param_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """The parameters in groups of equal rate and decay, as torch's optimizers take them.

    Each group has ``params``, ``lr`` and ``weight_decay``, and one with a rate of its own a ``name`` that says how many
    times the optimizer's that is, such as "x0.25". Their order follows from model and config alone, so that a
    saved optimizer fits again: first the decayed matrices' group, then the others by first parameter. Frozen parameters
    are in no group; one that several modules share is in one group, once.

    Raises:
        ConfigError: see :func:`parameter_settings`.
    """
    groups = []
    for settings in _grouped(parameter_settings(model, config)):
        multiplier = settings[0].lr_multiplier
        group = {
            "params": [setting.named.parameter for setting in settings],
            "lr": config.lr * multiplier,
            "weight_decay": settings[0].weight_decay,
        }
        groups.append(group if multiplier == 1.0 else {**group, "name": f"x{multiplier:g}"})
    return groups


def describe_groups(model: nn.Module, config: OptimizerConfig) -> str:
    """The groups as a table for people: a line for each kind of parameter in each group."""
    rows = [("rate", "weight decay", "kind", "tensors", "parameters", "first")]
    for settings in _grouped(parameter_settings(model, config)):
        for kind in Kind:
            of_kind = [setting for setting in settings if setting.named.kind is kind]
            if of_kind:
                rows.append(
                    (
                        f"{config.lr * of_kind[0].lr_multiplier:.3g}",
                        f"{of_kind[0].weight_decay:.3g}",
                        kind.value,
                        f"{len(of_kind):,}",
                        f"{sum(setting.named.parameter.numel() for setting in of_kind):,}",
                        of_kind[0].named.name,
                    )
                )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _grouped(settings: Sequence[Setting]) -> list[list[Setting]]:
    groups: dict[tuple[float, float], list[Setting]] = {}
    for setting in settings:
        groups.setdefault((setting.lr_multiplier, setting.weight_decay), []).append(setting)
    # Stable: groups of the same sort stay in the order of their first parameters.
    return sorted(groups.values(), key=lambda group: not group[0].named.is_decayed)


def _hidden_scale(config: OptimizerConfig, model: nn.Module, parameters: Sequence[NamedParameter]) -> float:
    if not isinstance(config, AdamWConfig) or config.mup_base_width is None:
        return 1.0
    width = width_of(model)
    if width is None or not any(named.kind is Kind.HIDDEN for named in parameters):
        raise ConfigError(
            f"optimizer.mup_base_width: got {config.mup_base_width}, expected null for a {type(model).__name__}, "
            "which has no width in its config or no hidden matrices; use optimizer.overrides for other rates."
        )
    return config.mup_base_width / width


def _overridden(settings: Sequence[Setting], override: ParameterOverride, key: str) -> list[Setting]:
    if override.lr_multiplier is None and override.weight_decay is None:
        raise ConfigError(
            f"{key}: got pattern {override.pattern!r} alone, expected lr_multiplier or weight_decay with it."
        )
    result, matched = [], False
    for setting in settings:
        if any(fnmatch.fnmatchcase(name, override.pattern) for name in setting.named.names):
            matched = True
            multiplier, decay = override.lr_multiplier, override.weight_decay
            setting = Setting(
                setting.named,
                lr_multiplier=setting.lr_multiplier if multiplier is None else multiplier,
                weight_decay=setting.weight_decay if decay is None else decay,
            )
        result.append(setting)
    if not matched:
        names = [name for setting in settings for name in setting.named.names]
        nearest = difflib.get_close_matches(override.pattern, names, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"{key}.pattern: got {override.pattern!r}, which matches no parameter that is trained; expected a pattern "
            f"of whole names, such as {nearest!r} or '*.{nearest.rpartition('.')[2]}'."
        )
    return result

"""Parameter groups and schedule."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from flash_attn_models.gpt import GPTConfig, GPTLMHeadModel
from flash_attn_train.optim import param_groups, warmup_cosine
from torch import nn

SIZES = {"vocab_size": 40, "max_seqlen": 8, "n_layer": 2, "n_head": 2, "d_model": 16}


@pytest.mark.parametrize("tie_embeddings", [True, False])
@pytest.mark.parametrize(("norm", "position"), [("layer_norm", "learned"), ("rms_norm", "rotary")])
def test_decays_matrices_only(tie_embeddings: bool, norm: str, position: str) -> None:
    model = GPTLMHeadModel(GPTConfig(**SIZES, norm=norm, position=position, tie_embeddings=tie_embeddings))
    decayed, plain = param_groups(model, 0.1)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed_names = {names[id(parameter)] for parameter in decayed["params"]}
    plain_names = {names[id(parameter)] for parameter in plain["params"]}
    assert len(decayed["params"]) + len(plain["params"]) == len(names)
    assert decayed_names | plain_names == set(names.values())
    for name in plain_names:
        assert name.endswith("bias") or "norm" in name or "ln_f" in name or "embeddings" in name, name
    for name in decayed_names:
        assert name.endswith("weight") and not ("norm" in name or "ln_f" in name or "embeddings" in name), (
            name
        )
    assert ("lm_head.weight" in decayed_names) == (not tie_embeddings)


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Linear(3, 3)
    model.weight.requires_grad_(False)
    decayed, plain = param_groups(model, 0.1)
    assert decayed["params"] == [] and len(plain["params"]) == 1


def test_only_decayed_parameters_shrink_without_a_gradient() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(param_groups(model, 0.5), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"2.weight"}
    torch.testing.assert_close(model[2].weight, before["2.weight"] * (1 - 0.1 * 0.5))


SCHEDULE = {"warmup_steps": 10, "decay_steps": 110, "min_lr_ratio": 0.1}


@pytest.mark.parametrize(
    ("step", "factor"),
    [
        (0, 0.1),
        (4, 0.5),
        (9, 1.0),
        (10, 1.0),
        (35, 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2),
        (60, 0.55),
        (110, 0.1),
        (10_000, 0.1),
    ],
)
def test_schedule_values(step: int, factor: float) -> None:
    assert warmup_cosine(step, **SCHEDULE) == pytest.approx(factor, rel=1e-12)


def test_schedule_never_rises_after_warmup_and_stays_in_range() -> None:
    factors = [warmup_cosine(step, **SCHEDULE) for step in range(10, 200)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(factors))
    assert min(factors) == 0.1 and max(factors) == 1.0


def test_schedule_without_warmup_or_decay() -> None:
    assert warmup_cosine(0, warmup_steps=0, decay_steps=10, min_lr_ratio=0.0) == 1.0
    assert warmup_cosine(10, warmup_steps=10, decay_steps=10, min_lr_ratio=0.5) == 0.5
    assert warmup_cosine(9, warmup_steps=10, decay_steps=10, min_lr_ratio=0.5) == 1.0

"""Kinds of parameters, groups, and the optimizers made of them."""

from __future__ import annotations

import copy
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from flash_attn_models.bert import BertConfig, BertForMaskedLM
from flash_attn_models.gpt import GPTConfig, GPTLMHeadModel
from flash_attn_models.vit import ViTConfig, ViTForImageClassification
from flash_attn_train.configs.optimizer import (
    OPTIMIZERS,
    AdamW8bitConfig,
    AdamWConfig,
    LambConfig,
    OptimizerConfig,
    ParameterOverride,
    SGDConfig,
)
from flash_attn_train.errors import ConfigError
from flash_attn_train.optim import (
    Lamb,
    build_optimizer,
    describe_groups,
    optimizer_recipe,
    param_groups,
    parameter_settings,
)
from flash_attn_train.optim.parameters import Kind, named_parameters
from torch import nn

SIZES = {"vocab_size": 40, "max_seqlen": 8, "n_layer": 2, "n_head": 2, "d_model": 16}


def gpt(**changes: Any) -> GPTLMHeadModel:
    return GPTLMHeadModel(GPTConfig(**{**SIZES, **changes}))


def undecayed(model: nn.Module) -> set[str]:
    return {named.name for named in named_parameters(model) if not named.is_decayed}


@pytest.mark.parametrize("tie_embeddings", [True, False])
@pytest.mark.parametrize(("norm", "position"), [("layer_norm", "learned"), ("rms_norm", "rotary")])
def test_decays_matrices_only(tie_embeddings: bool, norm: str, position: str) -> None:
    model = gpt(norm=norm, position=position, tie_embeddings=tie_embeddings)
    decayed, plain = param_groups(model, AdamWConfig(lr=0.5, weight_decay=0.1))
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert decayed["lr"] == plain["lr"] == 0.5
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


def test_embeddings_of_bert_and_vit_are_not_decayed() -> None:
    bert = undecayed(BertForMaskedLM(BertConfig(**SIZES)))
    assert {"bert.embeddings.word_embeddings.weight", "bert.embeddings.token_type_embeddings.weight"} <= bert
    assert "head.bias" in bert and "head.dense.weight" not in bert
    config = ViTConfig(image_size=8, patch_size=4, n_layer=1, n_head=2, d_model=16, n_classes=3)
    vit = undecayed(ViTForImageClassification(config))
    assert {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings"} <= vit
    assert "vit.embeddings.patch_embed.proj.weight" not in vit and "head.weight" not in vit


def test_norms_of_transformers_are_not_decayed() -> None:
    transformers = pytest.importorskip("transformers")
    shape = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    names = undecayed(transformers.LlamaForCausalLM(shape))
    assert names == {
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.post_attention_layernorm.weight",
        "model.norm.weight",
    }


def test_a_norm_with_matrices_and_an_embedding_of_single_values_are_told_by_their_class() -> None:
    class GroupedRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 4))

    # Wrappers such as FSDP2 put a class of their own in front.
    wrapped = GroupedRMSNorm()
    wrapped.__class__ = type("FSDPModule", (GroupedRMSNorm,), {})
    model = nn.Sequential(wrapped, nn.EmbeddingBag(5, 4), nn.Linear(4, 4, bias=False))
    kinds = {named.name: named.kind for named in named_parameters(model)}
    assert kinds == {"0.weight": Kind.VECTOR, "1.weight": Kind.EMBEDDING, "2.weight": Kind.MATRIX}


def test_models_may_exempt_parameters_by_name() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pos_embed = nn.Parameter(torch.zeros(1, 3, 4))
            self.table = nn.Parameter(torch.zeros(3, 4))
            self.weight = nn.Parameter(torch.zeros(3, 4))
            self.weight._no_weight_decay = True  # type: ignore[attr-defined]
            self.other = nn.Parameter(torch.zeros(3, 4))

        def no_weight_decay(self) -> set[str]:
            return {"pos_embed", "table"}

    assert undecayed(nn.Sequential(Inner())) == {"0.pos_embed", "0.table", "0.weight"}


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Linear(3, 3)
    model.weight.requires_grad_(False)
    (group,) = param_groups(model, AdamWConfig())
    assert group["params"] == [model.bias] and group["weight_decay"] == 0.0
    model.bias.requires_grad_(False)
    with pytest.raises(ConfigError, match="no parameters to train"):
        param_groups(model, AdamWConfig())


def test_names_are_those_without_wrappers() -> None:
    compiled = nn.Sequential()
    compiled.add_module("block", nn.Sequential())
    compiled.block.add_module("_orig_mod", nn.Linear(2, 2))
    assert [named.name for named in named_parameters(compiled)] == ["block.weight", "block.bias"]


def test_only_decayed_parameters_shrink_without_a_gradient() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(AdamWConfig(lr=0.1, weight_decay=0.5), model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"2.weight"}
    torch.testing.assert_close(model[2].weight, before["2.weight"] * (1 - 0.1 * 0.5))


class TestOverrides:
    def settings(self, *overrides: ParameterOverride, **options: Any) -> dict[str, tuple[float, float]]:
        config = AdamWConfig(weight_decay=0.1, overrides=list(overrides), **options)
        return {
            setting.named.name: (setting.lr_multiplier, setting.weight_decay)
            for setting in parameter_settings(gpt(), config)
        }

    def test_a_pattern_sets_rate_and_decay_of_what_it_matches(self) -> None:
        settings = self.settings(
            ParameterOverride("*.embeddings.*", lr_multiplier=0.5),
            ParameterOverride("*.word_embeddings.*", lr_multiplier=0.25, weight_decay=0.01),
        )
        assert settings["transformer.embeddings.position_embeddings.weight"] == (0.5, 0.0)
        assert settings["transformer.embeddings.word_embeddings.weight"] == (0.25, 0.01)
        assert settings["transformer.layers.0.mlp.fc1.weight"] == (1.0, 0.1)

    def test_groups_follow(self) -> None:
        overrides = [ParameterOverride("*.layers.0.*", lr_multiplier=0.5)]
        groups = param_groups(gpt(), AdamWConfig(lr=0.2, weight_decay=0.1, overrides=overrides))
        assert [(group["lr"], group["weight_decay"]) for group in groups] == [
            (0.1, 0.1),
            (0.2, 0.1),
            (0.2, 0.0),
            (0.1, 0.0),
        ]

    def test_a_pattern_that_matches_nothing_is_an_error(self) -> None:
        with pytest.raises(
            ConfigError, match=r"optimizer.overrides\[0\].pattern: got 'lm_head'.*word_emb|got"
        ):
            self.settings(ParameterOverride("lm_head", lr_multiplier=0.5))

    def test_a_pattern_alone_is_an_error(self) -> None:
        with pytest.raises(ConfigError, match=r"overrides\[1\].*expected lr_multiplier or weight_decay"):
            self.settings(ParameterOverride("*", lr_multiplier=0.5), ParameterOverride("*"))

    def test_either_name_of_a_tied_parameter_matches(self) -> None:
        model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
        model[1].weight = model[0].weight
        config = AdamWConfig(overrides=[ParameterOverride("1.*", lr_multiplier=0.5)])
        (setting,) = parameter_settings(model, config)
        assert setting.lr_multiplier == 0.5 and setting.named.names == ("0.weight", "1.weight")


class TestMup:
    def test_the_rate_of_hidden_matrices_falls_with_width(self) -> None:
        model = gpt(tie_embeddings=False)
        settings = parameter_settings(model, AdamWConfig(mup_base_width=4))
        scaled = {setting.named.name for setting in settings if setting.lr_multiplier != 1.0}
        assert scaled == {
            f"transformer.layers.{layer}.{name}.weight"
            for layer in range(2)
            for name in ("mixer.Wqkv", "mixer.out_proj", "mlp.fc1", "mlp.fc2")
        }
        assert {setting.lr_multiplier for setting in settings} == {1.0, 0.25}
        groups = param_groups(model, AdamWConfig(lr=1e-2, mup_base_width=4))
        assert {(group["lr"], group.get("name")) for group in groups} == {(1e-2, None), (2.5e-3, "x0.25")}

    def test_first_steps_of_all_widths_are_equally_long(self) -> None:
        """The point of muP: after a step of Adam the change of a layer's output does not grow with width."""

        def change(width: int) -> float:
            torch.manual_seed(0)
            model = gpt(d_model=width, n_layer=1)
            optimizer = build_optimizer(AdamWConfig(lr=1e-3, weight_decay=0.0, mup_base_width=16), model)
            layer = model.get_submodule("transformer.layers.0.mlp.fc1")
            before = layer.weight.detach().clone()
            model(torch.arange(8)[None]).square().mean().backward()
            optimizer.step()
            # Each element moves by about the rate, so that the change's spectral norm is about rate * width.
            return float(torch.linalg.matrix_norm((layer.weight - before).detach(), 2))

        assert change(64) < 2 * change(16)

    def test_a_model_without_width_is_an_error(self) -> None:
        with pytest.raises(ConfigError, match=r"mup_base_width: got 4.*Linear"):
            param_groups(nn.Linear(3, 3), AdamWConfig(mup_base_width=4))


def test_the_table_names_kinds_and_numbers() -> None:
    lines = describe_groups(gpt(), AdamWConfig(lr=1e-3, mup_base_width=4)).splitlines()
    assert lines[0].split() == ["rate", "weight", "decay", "kind", "tensors", "parameters", "first"]
    assert len(lines) == 4
    assert lines[1].split()[:5] == ["0.00025", "0.1", "hidden", "matrix", "8"]
    total = sum(int(line.split()[-2].replace(",", "")) for line in lines[1:])
    assert total == sum(parameter.numel() for parameter in gpt().parameters())


class TestBuilding:
    @pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "adamw_8bit"])
    def test_each_optimizer_lowers_a_loss_and_resumes_bit_for_bit(self, name: str) -> None:
        config = OPTIMIZERS[name](lr=0.02)

        def losses(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
            result = []
            for _ in range(steps):
                optimizer.zero_grad()
                loss = (model(torch.linspace(-1, 1, 24).view(8, 3)) - 1).square().mean()
                loss.backward()
                optimizer.step()
                result.append(loss.item())
            return result

        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2))
        optimizer = build_optimizer(config, model)
        first = losses(model, optimizer, 10)
        assert first[-1] < 0.9 * first[0]
        other = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2))
        resumed = build_optimizer(config, other)
        other.load_state_dict(model.state_dict())
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert losses(other, resumed, 5) == losses(model, optimizer, 5)

    def test_fused_is_passed_on(self) -> None:
        for config in (AdamWConfig(), SGDConfig()):
            for fused in (True, False):
                assert build_optimizer(config, nn.Linear(2, 2), fused=fused).defaults["fused"] is fused

    def test_every_option_arrives(self) -> None:
        adamw = build_optimizer(AdamWConfig(lr=0.3, beta1=0.5, beta2=0.6, eps=0.7), nn.Linear(2, 2)).defaults
        assert (adamw["lr"], adamw["betas"], adamw["eps"]) == (0.3, (0.5, 0.6), 0.7)
        lamb = build_optimizer(
            LambConfig(beta1=0.5, beta2=0.6, eps=0.7, adapt_undecayed=True), nn.Linear(2, 2)
        )
        assert isinstance(lamb, Lamb) and lamb.defaults["adapt_undecayed"]
        sgd = build_optimizer(SGDConfig(momentum=0.8, nesterov=True), nn.Linear(2, 2)).defaults
        assert (sgd["momentum"], sgd["nesterov"]) == (0.8, True)

    def test_the_recipe_makes_the_same(self) -> None:
        recipe = optimizer_recipe(AdamWConfig(), gpt())
        assert recipe.cls is torch.optim.AdamW and len(recipe.groups) == 2
        assert "betas" in recipe.options

    def test_nesterov_without_momentum_is_an_error(self) -> None:
        with pytest.raises(ConfigError, match="nesterov"):
            build_optimizer(SGDConfig(momentum=0.0, nesterov=True), nn.Linear(2, 2))

    def test_unknown_kind_is_a_mistake_of_ours(self) -> None:
        with pytest.raises(TypeError, match="OptimizerConfig"):
            build_optimizer(OptimizerConfig(), nn.Linear(2, 2))


class TestEightBit:
    def test_a_missing_library_names_the_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "bitsandbytes", None)
        with pytest.raises(ConfigError, match=r"pip install flash-attn-train\[bitsandbytes\]"):
            build_optimizer(AdamW8bitConfig(), nn.Linear(2, 2))

    def test_other_devices_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.install(monkeypatch)
        with pytest.raises(ConfigError, match="device cpu"):
            build_optimizer(AdamW8bitConfig(), nn.Linear(2, 2))

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        module = types.ModuleType("bitsandbytes.optim")
        module.AdamW8bit = torch.optim.AdamW  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "bitsandbytes", types.ModuleType("bitsandbytes"))
        monkeypatch.setitem(sys.modules, "bitsandbytes.optim", module)


def test_sharded_models_have_the_same_groups_and_steps(tmp_path: Path) -> None:
    """FSDP2 on one rank: DTensors, and modules of other classes."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    config = AdamWConfig(lr=0.1, overrides=[ParameterOverride("*.fc1.*", lr_multiplier=0.5)])
    plain = gpt(norm="rms_norm")
    sharded = copy.deepcopy(plain)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for layer in sharded.transformer.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)

        def described(model: nn.Module) -> list[tuple[str, float, float, Kind]]:
            return [
                (setting.named.name, setting.lr_multiplier, setting.weight_decay, setting.named.kind)
                for setting in parameter_settings(model, config)
            ]

        assert described(sharded) == described(plain)
        for model in (plain, sharded):
            optimizer = build_optimizer(config, model)
            model(torch.arange(8)[None]).square().mean().backward()
            optimizer.step()
        for own, other in zip(plain.parameters(), sharded.parameters(), strict=True):
            torch.testing.assert_close(other.full_tensor(), own.detach())
    finally:
        dist.destroy_process_group()

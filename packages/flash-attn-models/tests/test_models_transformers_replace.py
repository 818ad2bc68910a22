"""Our modules inside one transformers model: equal results, same parameters, undone, and no other model changed."""

from __future__ import annotations

import pytest
import torch
from flash_attn_models.transformers_integration import replace_loss, replace_mlps, replace_norms
from flash_attn_ops.norm import LayerNorm, RMSNorm

transformers = pytest.importorskip("transformers")

_SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**_SIZES),
    "gemma2": lambda: transformers.Gemma2Config(**_SIZES, num_key_value_heads=2, head_dim=8),
    "qwen3": lambda: transformers.Qwen3Config(**_SIZES, num_key_value_heads=2, head_dim=8),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**_SIZES),
}


def make(kind):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def same(model, before):
    ids = torch.randint(1, 101, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(ids).logits
    if before is not None:
        torch.testing.assert_close(logits, before, atol=1e-4, rtol=1e-4)
    return logits


@pytest.mark.parametrize("kind", CONFIGS)
def test_norms(kind):
    model, other = make(kind), make(kind)
    before, names = same(model, None), list(model.state_dict())
    parameters = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    replacement = replace_norms(model)
    ours = [module for module in model.modules() if isinstance(module, (RMSNorm, LayerNorm))]
    per_layer = {"llama": 2, "gemma2": 4, "qwen3": 4, "gpt_neox": 2}[kind]
    assert len(replacement.replaced) == len(ours) == 2 * per_layer + 1
    assert all(norm.zero_centered_weight == (kind == "gemma2") for norm in ours)
    same(model, before)
    assert list(model.state_dict()) == names
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == parameters
    assert not any(isinstance(module, (RMSNorm, LayerNorm)) for module in other.modules())
    replacement.restore()
    assert not any(isinstance(module, (RMSNorm, LayerNorm)) for module in model.modules())
    assert torch.equal(same(model, None), before)
    replacement.restore()  # once is enough


@pytest.mark.parametrize(("kind", "activation"), [("llama", "silu"), ("gemma2", "gelu_tanh")])
def test_mlps(kind, activation):
    model = make(kind)
    before, names = same(model, None), list(model.state_dict())
    replacement = replace_mlps(model)
    assert list(replacement.replaced) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert model.model.layers[0].mlp.activation == activation
    same(model, before)
    assert list(model.state_dict()) == names
    replacement.restore()
    assert torch.equal(same(model, None), before)


def test_gradients_and_loss():
    expected, model = make("llama"), make("llama")
    ids = torch.randint(1, 101, (2, 9))
    labels = ids.clone()
    labels[0, :4] = -100
    replacements = [replace(model) for replace in (replace_norms, replace_mlps, replace_loss)]
    for count in (None, torch.tensor(5)):
        losses = [m(ids, labels=labels, num_items_in_batch=count).loss for m in (expected, model)]
        torch.testing.assert_close(losses[1], losses[0])
    for loss in losses:
        loss.backward()
    grads = {name: parameter.grad for name, parameter in expected.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name], atol=1e-5, rtol=1e-3)
    for replacement in replacements:
        replacement.restore()
    assert type(model.model.norm) is type(expected.model.norm)
    assert model.loss_function is expected.loss_function


def test_what_is_not_equal_stays():
    class OddRMSNorm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(8))
            self.eps = 1e-6

        def forward(self, x):
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight.square() * 2

    class Hooked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.odd, self.norm, self.plain = OddRMSNorm(), torch.nn.LayerNorm(8), torch.nn.LayerNorm(8)
            self.two = torch.nn.LayerNorm((2, 8))
            self.norm.register_forward_hook(lambda *_: None)

    assert list(replace_norms(Hooked()).replaced) == ["plain"]
    assert replace_mlps(Hooked()).replaced == {}
    with pytest.raises(ValueError, match="model: got parameters on the meta device"):
        replace_norms(torch.nn.LayerNorm(8, device="meta"))
    with pytest.raises(ValueError, match="model: got a Hooked"):
        replace_loss(Hooked())


def test_a_shared_norm_is_replaced_everywhere():
    model = torch.nn.ModuleDict({"a": torch.nn.LayerNorm(8)})
    model["b"] = model["a"]
    assert list(replace_norms(model).replaced) == ["a", "b"]
    assert model["a"] is model["b"]

"""What layers do on demand: gated activations, a residual stream in float32, dropout in norms, checkpointing."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from flash_attn_models.gpt import GPTConfig, GPTLMHeadModel
from flash_attn_models.gpt.hugging_face import config_to_hugging_face
from flash_attn_models.layers import MLP, Block, GatedMLP, ParallelBlock, StochasticDepth
from flash_attn_ops.norm import LayerNorm, RMSNorm
from torch import nn
from torch.nn import functional as F

SMALL = GPTConfig(vocab_size=61, max_seqlen=24, n_layer=3, n_head=4, d_model=32, initializer_range=0.3)


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("silu", F.silu),
        ("gelu", F.gelu),
        ("gelu_tanh", lambda gate: F.gelu(gate, approximate="tanh")),
        ("relu", F.relu),
        ("sigmoid", torch.sigmoid),
    ],
)
def test_gated_activations(activation, function):
    mlp = GatedMLP(8, 20, activation=activation, dtype=torch.float64)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    value, gate = mlp.fc1(x).chunk(2, dim=-1)
    torch.testing.assert_close(mlp(x), mlp.fc2(value * function(gate)))


@pytest.mark.parametrize(
    ("activation", "function"), [("silu", F.silu), ("squared_relu", lambda x: F.relu(x).square())]
)
def test_more_activations(activation, function):
    mlp = MLP(8, 20, activation=activation, dtype=torch.float64)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(mlp(x), mlp.fc2(function(mlp.fc1(x))))


def test_the_gated_width_is_rounded_up():
    mlp = GatedMLP(8, 20, multiple_of=16)
    assert mlp.fc1.weight.shape == (64, 8) and mlp.fc2.weight.shape == (8, 32)


@pytest.mark.parametrize(
    "changes", [{}, {"parallel_block": True}, {"parallel_block": True, "tied_norm": True}]
)
def test_the_residual_stream_in_float32(changes):
    """A long stack of small branches in bfloat16: float32 sums lose less."""
    config = dataclasses.replace(SMALL, n_layer=24, initializer_range=0.05, **changes)
    exact = GPTLMHeadModel(config, dtype=torch.bfloat16)
    precise = GPTLMHeadModel(dataclasses.replace(config, residual_in_fp32=True), dtype=torch.bfloat16)
    assert exact.state_dict().keys() == precise.state_dict().keys()
    precise.load_state_dict(exact.state_dict())
    reference = GPTLMHeadModel(config, dtype=torch.float64)
    reference.load_state_dict(exact.state_dict())
    input_ids = torch.randint(61, (8, 24))
    streams = []
    precise.transformer.layers[7].register_forward_hook(lambda *args: streams.append(args[-1][-1].dtype))
    out, expected = precise(input_ids), reference(input_ids)
    assert streams == [torch.float32] and out.dtype == torch.bfloat16
    lost = (exact(input_ids) - expected).square().mean()
    assert (out - expected).square().mean() < 0.8 * lost


def test_the_residual_stream_of_norms_behind_branches_is_theirs():
    with pytest.raises(ValueError, match=r"GPTConfig.residual_in_fp32: got True; .*prenorm=False"):
        dataclasses.replace(SMALL, prenorm=False, residual_in_fp32=True)


@pytest.mark.parametrize("changes", [{}, {"parallel_block": True}, {"prenorm": False}, {"norm": "rms_norm"}])
def test_dropout_of_branches_happens_in_the_norms_that_add_them(changes):
    config = dataclasses.replace(SMALL, dropout=0.25, embedding_dropout=0.0, **changes)
    model = GPTLMHeadModel(config).transformer
    norms = {name: m.dropout_p for name, m in model.named_modules() if isinstance(m, (LayerNorm, RMSNorm))}
    adds_no_branch = {"layers.0.norm1"} if config.prenorm else set()
    for name, probability in norms.items():
        if not (config.parallel_block and name.endswith("norm2")):  # whose weights norm1 uses
            assert probability == (0.0 if name in adds_no_branch else 0.25), name
    assert not any(m.p for m in model.modules() if isinstance(m, nn.Dropout))
    without = GPTLMHeadModel(dataclasses.replace(config, dropout=0.0)).transformer
    without.load_state_dict(model.state_dict())
    input_ids = torch.randint(61, (2, 9))
    assert not torch.equal(model(input_ids), model(input_ids))
    assert torch.equal(model.eval()(input_ids), without.eval()(input_ids))


def test_dropout_of_a_norm_falls_on_the_branch_alone():
    class Zero(nn.Module):
        def forward(self, x, cache=None):
            return torch.zeros_like(x)

    for block in (
        Block(LayerNorm(6), Zero(), LayerNorm(6, dropout_p=0.5), Zero()),
        ParallelBlock(LayerNorm(6, dropout_p=0.5), Zero(), None, Zero()),
    ):
        residual = torch.randn(2, 50, 6)
        ones = torch.ones_like(residual)
        if isinstance(block, Block):
            assert torch.equal(block(torch.zeros_like(residual), residual)[1], residual)
            continue
        added = block(ones, torch.zeros_like(residual), residual)[-1] - residual
        assert 0.3 < (added.abs() < 1e-6).float().mean() < 0.7
        torch.testing.assert_close(block.eval()(ones, ones, residual)[-1], residual + 2)


@pytest.mark.parametrize("probability", [-0.1, 1.0])
def test_a_drop_path_that_is_no_probability(probability):
    with pytest.raises(ValueError, match="drop_path: got"):
        StochasticDepth(probability)


def saved_bytes(model, input_ids):
    """Bytes of distinct tensors, other than parameters, that a forward pass keeps for the backward one."""
    parameters = {p.data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(input_ids)
    assert out.requires_grad
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize(
    "config",
    [SMALL, dataclasses.replace(SMALL, position="rotary", norm="rms_norm", activation="swiglu", n_head_kv=2)],
    ids=["gpt2", "llama"],
)
def test_checkpointing_keeps_less_and_changes_no_gradient(config):
    model = GPTLMHeadModel(dataclasses.replace(config, dropout=0.1, attn_dropout=0.1))
    input_ids = torch.randint(61, (2, 24))
    parameters = list(model.parameters())

    def gradients():
        torch.manual_seed(5)
        return torch.autograd.grad(model(input_ids).square().sum(), parameters)

    expected, kept = gradients(), {False: saved_bytes(model, input_ids)}
    for choice in (True, 1, 2, 3, "attention", "mlp", False):
        model.transformer.activation_checkpointing = choice
        assert model.transformer.activation_checkpointing == choice
        for ours, theirs in zip(gradients(), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
        kept[choice] = saved_bytes(model, input_ids)
    assert kept[1] < kept[2] <= kept[3] < kept[False], kept
    assert kept["attention"] < kept[False] and kept["mlp"] < kept[False], kept


@pytest.mark.parametrize("choice", [0, -1, "atention", 1.5, None])
def test_unknown_ways_of_checkpointing(choice):
    model = GPTLMHeadModel(SMALL)
    with pytest.raises(ValueError, match=r"activation_checkpointing: got .*expected True, False, n >= 1"):
        model.transformer.activation_checkpointing = choice


def test_a_residual_stream_in_float32_is_saved_as_any_other():
    fields = config_to_hugging_face(dataclasses.replace(SMALL, residual_in_fp32=True))
    assert fields == config_to_hugging_face(SMALL)

"""On an NVIDIA GPU: layers and their options through the CUDA kernels against fp64. Needs torch and pytest only."""

from __future__ import annotations

import pytest
import torch
from flash_attn_models.bert import BertConfig, BertModel
from flash_attn_models.generation import make_cache
from flash_attn_models.gpt import GPTConfig, GPTLMHeadModel
from flash_attn_models.layers import CausalDepthwiseConv, CausalSelfAttention, CrossAttention, GatedMLP
from flash_attn_models.layers.packed import real_tokens
from flash_attn_models.testing import assert_within_reference_error
from torch import nn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

COMMON = {
    "vocab_size": 509,
    "max_seqlen": 512,
    "n_layer": 2,
    "n_head": 6,
    "d_model": 384,
    "initializer_range": 0.1,
}
CONFIGS = {
    "learned": GPTConfig(**COMMON),
    "sinks_gqa": GPTConfig(**COMMON, n_head_kv=2, position="rotary", sinks=True),
    "alibi_window": GPTConfig(**COMMON, position="alibi", window=100),
    "conv_residual_in_fp32": GPTConfig(
        **COMMON, position="rotary", norm="rms_norm", activation="swiglu", conv_width=3, residual_in_fp32=True
    ),
    "parallel": GPTConfig(**COMMON, position="rotary", rotary_dim=32, parallel_block=True),
}
LENGTHS = [200, 1, 0, 129, 512, 63]


def randomized(model):
    for module in model.modules():
        if isinstance(module, CausalDepthwiseConv):
            nn.init.normal_(module.weight)
        if isinstance(module, CausalSelfAttention) and module.sinks is not None:
            nn.init.normal_(module.sinks)
    return model


def in_three_ways(make, call):
    """Results and gradients of ``call(module, convert)``: on the GPU in bfloat16; in float64; in bfloat16 by plain
    operations of the CPU, whose error sets the scale. convert() puts a tensor where the module is, in its dtype."""
    results = []
    for device, dtype in (("cuda", torch.bfloat16), ("cpu", torch.float64), ("cpu", torch.bfloat16)):
        torch.manual_seed(0)
        module = randomized(make()).bfloat16().to(device, dtype)

        def convert(tensor, device=device, dtype=dtype):
            return tensor.bfloat16().to(device, dtype) if tensor.is_floating_point() else tensor.to(device)

        torch.manual_seed(1)
        out = call(module, convert)
        weights = convert(torch.randn(out.shape, generator=torch.Generator().manual_seed(2)))
        grads = torch.autograd.grad((out * weights).sum(), list(module.parameters()))
        results.append([out, *grads])
    names = ["out", *(name for name, _ in module.named_parameters())]
    for name, ours, exact, plain in zip(names, *results, strict=True):
        slack = torch.finfo(torch.bfloat16).eps * exact.abs().max().item()
        factor = 2.0 if name == "out" else 3.0
        assert_within_reference_error(ours.cpu(), exact, plain, factor=factor, atol=slack, name=name)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_documents(name, given):
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    input_ids = torch.randint(509, (int(ends[-1]),))
    in_three_ways(
        lambda: GPTLMHeadModel(CONFIGS[name]),
        lambda model, convert: model(
            convert(input_ids), cu_seqlens=convert(ends), max_seqlen=512 if given else None
        ),
    )


@torch.no_grad()
@pytest.mark.parametrize("name", ["sinks_gqa", "conv_residual_in_fp32"])
def test_decoding_in_parts(name):
    model = randomized(GPTLMHeadModel(CONFIGS[name], device="cuda", dtype=torch.bfloat16)).eval()
    exact = GPTLMHeadModel(CONFIGS[name], dtype=torch.float64).eval()
    exact.load_state_dict(model.state_dict())
    input_ids = torch.randint(509, (3, 140))
    cache = make_cache(model, 3, 200)
    parts = input_ids.cuda().split([129, 1, 1, 9], dim=1)
    cached = torch.cat([model(part, cache=cache) for part in parts], dim=1)
    reference = exact(input_ids)
    slack = torch.finfo(torch.bfloat16).eps * reference.abs().max().item()
    plain = model(input_ids.cuda()).cpu()
    assert_within_reference_error(cached.cpu(), reference, plain, atol=slack, name="logits")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"n_head_kv": 2}, {"causal": True}, {"softcap": 5.0}, {"sinks": True}],
    ids=["plain", "gqa", "causal", "softcap", "sinks"],
)
def test_cross_attention(options, masked):
    x, context = torch.randn(3, 70, 384), torch.randn(3, 150, 256)
    mask = torch.arange(150) < torch.tensor([[150], [77], [1]])
    in_three_ways(
        lambda: CrossAttention(384, 6, d_context=256, **options),
        lambda layer, convert: layer(
            convert(x), convert(context), key_padding_mask=convert(mask) if masked else None
        ),
    )


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu", "sigmoid"])
def test_gated_activations(activation):
    x = torch.randn(100, 384)
    in_three_ways(lambda: GatedMLP(384, 512, activation=activation), lambda mlp, convert: mlp(convert(x)))


@pytest.mark.parametrize("choice", [True, 2, "attention", "mlp"])
def test_checkpointing_changes_no_gradient(choice):
    config = GPTConfig(**COMMON, position="rotary", activation="swiglu", dropout=0.1, attn_dropout=0.1)
    model = GPTLMHeadModel(config, device="cuda", dtype=torch.bfloat16)
    input_ids = torch.randint(509, (2, 257), device="cuda")
    gradients = []
    for value in (False, choice):
        model.transformer.activation_checkpointing = value
        torch.manual_seed(3)
        loss = model(input_ids).float().square().mean()
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for ours, theirs in zip(*gradients, strict=True):
        error = (ours.float() - theirs.float()).norm() / theirs.float().norm()
        assert error < 1e-2, error


@pytest.mark.parametrize("padding_free", [False, True])
def test_bert_with_and_without_padding(padding_free):
    config = BertConfig(
        vocab_size=509, max_seqlen=160, n_layer=2, n_head=6, d_model=384, dropout=0.0, attn_dropout=0.0
    )
    input_ids = torch.randint(509, (4, 150))
    mask = torch.arange(150) < torch.tensor([[150], [64], [1], [99]])
    in_three_ways(
        lambda: BertModel(config, with_pooler=False),
        lambda model, convert: model(
            convert(input_ids), convert(mask), padding_free=padding_free
        ).hidden.masked_fill(~convert(mask)[..., None], 0.0),
    )


def test_real_tokens_are_those_of_the_cpu():
    mask = torch.rand(7, 130) < 0.4
    on_cpu, on_gpu = real_tokens(mask), real_tokens(mask.cuda())
    assert torch.equal(on_cpu.indices, on_gpu.indices.cpu())
    assert torch.equal(on_cpu.cu_seqlens, on_gpu.cu_seqlens.cpu())
    assert on_cpu.max_seqlen == on_gpu.max_seqlen
    assert torch.equal(on_cpu.indices, mask.flatten().nonzero().flatten())
    assert real_tokens(torch.ones(3, 4, dtype=torch.bool, device="cuda")) is None

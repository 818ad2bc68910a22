"""On an NVIDIA GPU: the model through the CUDA kernels against fp64. Needs torch and pytest only."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from flash_attn_models.attention import attention_path
from flash_attn_models.generation import generate, make_cache
from flash_attn_models.gpt import GPTConfig, GPTLMHeadModel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CONFIGS = {
    "gpt2": GPTConfig(
        vocab_size=509, max_seqlen=1024, n_layer=3, n_head=3, d_model=192, initializer_range=0.1
    ),
    "llama_gqa": GPTConfig.llama(
        vocab_size=509,
        max_seqlen=1024,
        n_layer=3,
        n_head=6,
        n_head_kv=2,
        d_model=384,
        d_inner=704,
        initializer_range=0.1,
    ),
    "llama_d128": GPTConfig.llama(
        vocab_size=509,
        max_seqlen=1024,
        n_layer=2,
        n_head=4,
        n_head_kv=1,
        d_model=512,
        d_inner=704,
        initializer_range=0.1,
    ),
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def config(request: pytest.FixtureRequest) -> GPTConfig:
    return request.param


def loss_and_gradients(logits, labels, parameters):
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).double(), labels[:, 1:].flatten())
    return loss, torch.autograd.grad(loss, parameters)


def assert_tolerance_law(name, out, ref, pt, factor, dtype):
    """max|out - ref| <= factor max|pt - ref| + one unit in the last place of the largest value."""
    error = (out.double() - ref).abs().max().item()
    allowed = (
        factor * (pt.double() - ref).abs().max().item() + torch.finfo(dtype).eps * ref.abs().max().item()
    )
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seqlen", [1, 63, 129, 1000])
def test_forward_and_backward_obey_the_tolerance_law(config, plain_gpt, dtype, seqlen):
    assert attention_path(config, seqlen=seqlen, device="cuda", dtype=dtype).path in ("sm90", "sm80")
    model = GPTLMHeadModel(config, device="cuda", dtype=dtype)
    names = [name for name, _ in model.named_parameters()]
    low = [parameter.detach().clone().requires_grad_() for parameter in model.parameters()]
    high = [parameter.detach().double().requires_grad_() for parameter in model.parameters()]
    input_ids = torch.randint(config.vocab_size, (2, seqlen), device="cuda")
    out = model(input_ids)
    pt = plain_gpt(config, dict(zip(names, low, strict=True)), input_ids)
    ref = plain_gpt(config, dict(zip(names, high, strict=True)), input_ids)
    assert_tolerance_law("logits", out, ref, pt, 2, dtype)
    if seqlen == 1:
        return  # no next token, no loss
    _, grads = loss_and_gradients(out, input_ids, list(model.parameters()))
    _, pt_grads = loss_and_gradients(pt, input_ids, low)
    _, ref_grads = loss_and_gradients(ref, input_ids, high)
    for name, grad, pt_grad, ref_grad in zip(names, grads, pt_grads, ref_grads, strict=True):
        assert_tolerance_law(name, grad, ref_grad, pt_grad, 3, dtype)


def test_autocast_reaches_the_cuda_kernel(config, plain_gpt):
    model = GPTLMHeadModel(config, device="cuda")
    input_ids = torch.randint(config.vocab_size, (2, 257), device="cuda")
    seen = []
    model.transformer.layers[0].mixer.out_proj.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].dtype)
    )
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = model(input_ids)
        pt = plain_gpt(config, model.state_dict(), input_ids)
    ref = plain_gpt(config, {name: tensor.double() for name, tensor in model.state_dict().items()}, input_ids)
    assert seen == [torch.bfloat16]
    assert_tolerance_law("logits", out, ref, pt, 2, torch.bfloat16)


@torch.no_grad()
def test_cache_equals_no_cache(config):
    model = GPTLMHeadModel(config, device="cuda", dtype=torch.bfloat16).eval()
    reference = GPTLMHeadModel(config, device="cuda", dtype=torch.float64).eval()
    reference.load_state_dict(model.state_dict())
    input_ids = torch.randint(config.vocab_size, (2, 150), device="cuda")
    cache = make_cache(model, 2, 200)
    cached = torch.cat([model(part, cache=cache) for part in input_ids.split([129, 1, 20], dim=1)], dim=1)
    assert_tolerance_law("logits", cached, reference(input_ids), model(input_ids), 2, torch.bfloat16)


@torch.no_grad()
def test_greedy_tokens_are_those_of_the_cpu(config):
    config = dataclasses.replace(config, n_layer=1)
    on_cpu = GPTLMHeadModel(config, dtype=torch.float64).eval()
    on_gpu = GPTLMHeadModel(config, device="cuda", dtype=torch.float64).eval()
    on_gpu.load_state_dict(on_cpu.state_dict())
    input_ids = torch.randint(config.vocab_size, (2, 9))
    assert torch.equal(generate(on_gpu, input_ids.cuda(), 30).cpu(), generate(on_cpu, input_ids, 30))


@torch.no_grad()
def test_sampling_with_a_generator_on_the_gpu(config):
    model = GPTLMHeadModel(config, device="cuda", dtype=torch.bfloat16).eval()
    input_ids = torch.randint(config.vocab_size, (4, 9), device="cuda")

    def run(seed):
        return generate(
            model,
            input_ids,
            20,
            do_sample=True,
            top_k=50,
            top_p=0.9,
            generator=torch.Generator("cuda").manual_seed(seed),
        )

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    with pytest.raises(
        ValueError, match=r"generator: got a generator on cpu; expected one on the model's device, cuda:0"
    ):
        generate(model, input_ids, 20, do_sample=True, generator=torch.Generator())

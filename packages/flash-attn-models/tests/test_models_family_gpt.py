"""The registry of families, and what the switches of the model do in each kind of block and position."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from flash_attn_models.attention import attention_path
from flash_attn_models.generation import generate, make_cache
from flash_attn_models.gpt import GPTConfig, GPTLMHeadModel
from flash_attn_models.gpt.families import FAMILIES, family_of, named_config
from flash_attn_models.gpt.hugging_face import config_to_hugging_face

# Of the published weights.
PARAMETERS = {
    "gpt2": 124_439_808,
    "gpt2-xl": 1_557_611_200,
    "tinyllama-1.1b": 1_100_048_384,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-3-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "pythia-70m": 70_426_624,
    "pythia-1.4b": 1_414_647_808,
    "pythia-12b": 11_846_072_320,
    "gpt-neox-20b": 20_554_567_680,
    "gpt-j-6b": 6_050_882_784,
    "opt-125m": 125_239_296,
    "opt-350m": 331_196_416,
    "opt-6.7b": 6_658_473_984,
    "falcon-rw-1b": 1_311_625_216,
    "santacoder": 1_124_886_528,
    "starcoderbase-1b": 1_137_207_296,
    "starcoder": 15_517_456_384,
}
ROUNDED = {  # in billions, where no exact number was at hand
    "falcon-7b": 6.9,
    "falcon-40b": 41.3,
    "baichuan-7b": 7.0,
    "baichuan-13b": 13.3,
    "baichuan2-7b": 7.5,
    "baichuan2-13b": 13.9,
    "btlm-3b-8k": 2.6,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_named_configs_have_the_published_number_of_parameters(name):
    assert GPTLMHeadModel(named_config(name), device="meta").num_parameters() == PARAMETERS[name]


@pytest.mark.parametrize("name", ROUNDED)
def test_named_configs_have_about_the_published_number_of_parameters(name):
    count = GPTLMHeadModel(named_config(name), device="meta").num_parameters()
    assert round(count / 1e9, 1) == ROUNDED[name]


def test_every_size_is_of_its_family():
    for family in FAMILIES.values():
        for name in family.sizes:
            assert family_of(name) is family
            config_to_hugging_face(named_config(name), family.model_type)


def test_named_configs_and_presets_agree():
    for preset, name in (("llama2-7b", "llama-2-7b"), ("llama3-8b", "llama-3-8b")):
        assert config_to_hugging_face(GPTConfig.llama(preset)) == config_to_hugging_face(named_config(name))


def test_named_config_changes_and_errors():
    assert named_config("pythia-70m", n_layer=1).n_layer == 1
    with pytest.raises(ValueError, match=r"name: got 'pythia-71m'; .*did you mean 'pythia-70m'"):
        named_config("pythia-71m")
    with pytest.raises(ValueError, match=r"unknown field 'n_layers' \(did you mean 'n_layer'\?\)"):
        named_config("pythia-70m", n_layers=1)
    with pytest.raises(
        ValueError, match=r"GPTConfig.eos_token_id: got 61; expected a token id in \[0, vocab_size=61"
    ):
        named_config("pythia-70m", vocab_size=61, eos_token_id=61)


def test_a_scale_spelt_out_keeps_no_model_from_being_saved():
    spelt_out = named_config("gpt2", softmax_scale=64**-0.5)
    assert config_to_hugging_face(spelt_out) == config_to_hugging_face(named_config("gpt2"))
    with pytest.raises(ValueError, match=r"config: got softmax_scale=0.5; expected .*softmax_scale 1 / sqrt"):
        config_to_hugging_face(named_config("gpt2", softmax_scale=0.5), "gpt2")


def test_special_tokens_that_a_named_vocabulary_lacks_are_none():
    small = named_config("gpt2", vocab_size=1000)
    assert (small.bos_token_id, small.eos_token_id) == (None, None)
    assert named_config("gpt2", vocab_size=1000, eos_token_id=5).eos_token_id == 5
    assert named_config("gpt2", vocab_size=50304).eos_token_id == 50256
    assert named_config("pythia-70m", vocab_size=61).eos_token_id == 0


SMALL = GPTConfig(vocab_size=61, max_seqlen=24, n_layer=2, n_head=4, d_model=32, initializer_range=0.2)
CONFIGS = {
    name: dataclasses.replace(SMALL, **changes)
    for name, changes in {
        "parallel": {"parallel_block": True, "position": "rotary", "rotary_dim": 4},
        "parallel_tied_rms": {
            "parallel_block": True,
            "tied_norm": True,
            "norm": "rms_norm",
            "position": "alibi",
        },
        "post_norm_narrow": {"prenorm": False, "d_embedding": 20, "position_offset": 2},
        "window_softcap": {
            "position": "rotary",
            "window": 5,
            "softcap": 2.0,
            "n_head_kv": 2,
            "activation": "swiglu",
        },
        "qk_norm_scaled": {
            "position": "rotary",
            "qk_norm": True,
            "norm": "rms_norm",
            "rotary_scaling": {"kind": "linear", "factor": 2.0},
            "tie_embeddings": False,
            "head_bias": True,
        },
        "factors": {"position": "alibi", "embedding_scale": 3.0, "logit_scale": 0.2, "normalize_head": True},
    }.items()
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def config(request):
    torch.manual_seed(0)
    return request.param


def tokens(config, seqlen=13):
    return torch.randint(config.vocab_size, (2, seqlen))


def gradients(model, logits):
    weights = torch.linspace(-1, 1, logits.numel()).view_as(logits)
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad((logits * weights).sum(), parameters), strict=True))


def test_activation_checkpointing_keeps_gradients(config):
    model = GPTLMHeadModel(dataclasses.replace(config, dropout=0.1))
    input_ids = tokens(config)
    torch.manual_seed(1)
    expected = gradients(model, model(input_ids))
    model.transformer.activation_checkpointing = True
    torch.manual_seed(1)
    for name, grad in gradients(model, model(input_ids)).items():
        assert torch.equal(grad, expected[name]), name


def test_autocast(config):
    model = GPTLMHeadModel(config)
    input_ids = tokens(config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids)
    logits.float().square().mean().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    expected = model(input_ids)
    assert (logits.float() - expected).abs().max() < 0.05 * expected.abs().max()


def test_compiled_model_equals_eager(config):
    torch.compiler.reset()  # every test compiles the same code, and the compiler counts that as recompiling
    model = GPTLMHeadModel(dataclasses.replace(config, n_layer=1))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    input_ids = tokens(config)
    torch.testing.assert_close(compiled(input_ids), model(input_ids))
    expected = gradients(model, model(input_ids))
    for name, grad in gradients(model, compiled(input_ids)).items():
        torch.testing.assert_close(grad, expected[name], msg=name)


def test_meta_device_allocates_nothing_and_loads_by_assignment(config):
    model = GPTLMHeadModel(config, device="meta").eval()
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    input_ids = tokens(config)
    assert model(input_ids.to("meta")).shape == (2, 13, config.vocab_size)
    filled = GPTLMHeadModel(config).eval()
    model.load_state_dict(filled.state_dict(), assign=True)
    assert torch.equal(model(input_ids), filled(input_ids))


@torch.no_grad()
def test_decoding_equals_one_pass(config):
    model = GPTLMHeadModel(config).eval()
    input_ids = tokens(config, 24)
    cache = make_cache(model, 2, 24)
    pieces = [model(part, cache=cache) for part in input_ids.split([7, 1, 1, 15], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(input_ids), rtol=1e-5, atol=1e-5)
    prompt = input_ids[:, :8]
    result = generate(model, prompt, 10)
    for _ in range(10):
        prompt = torch.cat([prompt, model(prompt)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(result, prompt)


def test_generating_first_leaves_training_possible(config):
    model = GPTLMHeadModel(config)
    with torch.inference_mode():
        generate(model, tokens(config), 3)
    assert all(torch.isfinite(grad).all() for grad in gradients(model, model(tokens(config, 20))).values())


def test_attention_path_is_asked_about_all_options(config):
    explained = attention_path(config, seqlen=24, device="cpu", dtype=torch.float32)
    assert explained.path == "portable"

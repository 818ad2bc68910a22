"""Our attention and modules inside transformers models on a GPU, in 16 bits, against what their own do."""

from __future__ import annotations

import copy

import pytest
import torch
from flash_attn_models import load_pretrained
from flash_attn_models.testing import assert_within_reference_error
from flash_attn_models.transformers_integration import (
    ATTENTION_NAME,
    register_with_transformers,
    replace_mlps,
    replace_norms,
)

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

_SIZES = {
    "vocab_size": 517,
    "hidden_size": 512,
    "intermediate_size": 768,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**_SIZES),
    "mistral": lambda: transformers.MistralConfig(**_SIZES, sliding_window=100),
    "gemma2": lambda: transformers.Gemma2Config(**_SIZES, sliding_window=100, attn_logit_softcapping=20.0),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **_SIZES, sliding_window=100, num_local_experts=2, num_experts_per_tok=2
    ),
}


def make(config, attention, dtype):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        copy.deepcopy(config), attn_implementation=attention
    )
    return model.eval().bfloat16().to("cuda", dtype)  # the same weights in every dtype


def batch(side):
    ids, mask = torch.randint(1, 517, (3, 300)), torch.zeros(3, 300, dtype=torch.long)
    for row, length in enumerate((300, 37, 211)):
        mask[row, slice(-length, None) if side == "left" else slice(length)] = 1
    return (ids * mask).cuda(), mask.cuda()


@pytest.fixture(autouse=True)
def registered():
    register_with_transformers()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_logits_of_padded_batches(kind, side):
    config = CONFIGS[kind]()
    ids, mask = batch(side)
    real = mask.bool()
    logits = [
        make(config, attention, dtype)(ids, attention_mask=mask).logits[real]
        for attention, dtype in (
            (ATTENTION_NAME, torch.bfloat16),
            ("eager", torch.float32),
            ("eager", torch.bfloat16),
        )
    ]
    assert_within_reference_error(*logits)


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
@torch.no_grad()
def test_generation_in_fp32_token_for_token(implementation):
    config = CONFIGS["mistral"]()
    ids, mask = batch("left")
    options = {"attention_mask": mask, "max_new_tokens": 24, "do_sample": False, "disable_compile": True}
    expected = make(config, "eager", torch.float32).generate(ids, **options)
    kind = None if implementation == "dynamic" else "static"
    got = make(config, ATTENTION_NAME, torch.float32).generate(ids, **options, cache_implementation=kind)
    assert torch.equal(got, expected)


@torch.no_grad()
def test_compiled_decoding_with_a_static_cache():
    config = CONFIGS["llama"]()
    ids, mask = batch("left")
    model = make(config, ATTENTION_NAME, torch.bfloat16)
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    tokens = model.generate(ids, **options, cache_implementation="static")
    assert tokens.shape == (3, 308)


@torch.no_grad()
def test_packed_sequences_do_not_see_each_other():
    model = make(CONFIGS["llama"](), ATTENTION_NAME, torch.bfloat16)
    exact = make(CONFIGS["llama"](), "eager", torch.float32)
    plain = make(CONFIGS["llama"](), "eager", torch.bfloat16)
    lengths = (130, 1, 77)
    parts = [torch.randint(1, 517, (1, length), device="cuda") for length in lengths]
    positions = torch.cat([torch.arange(length, device="cuda") for length in lengths])[None]
    got = model(torch.cat(parts, dim=1), position_ids=positions, use_cache=False).logits
    each = [torch.cat([m(part).logits for part in parts], dim=1) for m in (exact, plain)]
    assert_within_reference_error(got, *each)


def test_replaced_modules_and_gradients():
    config = CONFIGS["llama"]()
    ids, mask = batch("right")
    labels = ids.masked_fill(mask == 0, -100)
    models = [
        make(config, attention, dtype)
        for attention, dtype in (
            (ATTENTION_NAME, torch.bfloat16),
            ("eager", torch.float32),
            ("eager", torch.bfloat16),
        )
    ]
    assert len(replace_norms(models[0]).replaced) == 7
    assert len(replace_mlps(models[0]).replaced) == 3
    for model in models:
        model(ids, attention_mask=mask, labels=labels).loss.backward()
    ours, exact, plain = (dict(model.named_parameters()) for model in models)
    for name in ours:
        assert_within_reference_error(ours[name].grad, exact[name].grad, plain[name].grad, factor=3.0)


def test_loading_onto_a_gpu_takes_one_copy(tmp_path):
    """Weights go to the GPU one by one."""
    make(CONFIGS["llama"](), "eager", torch.bfloat16).save_pretrained(tmp_path / "m")
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = load_pretrained(tmp_path / "m", device="cuda")
    weights = sum(parameter.nbytes for parameter in model.parameters())
    largest = max(parameter.nbytes for parameter in model.parameters())
    assert torch.cuda.max_memory_allocated() - before <= 1.1 * weights + largest + 2**21

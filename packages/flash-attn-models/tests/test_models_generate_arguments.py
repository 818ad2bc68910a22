"""Kinds of arguments of generation: numbers of other libraries, and what is refused by name instead of from inside."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from flash_attn_models.generation import generate, keep_min_p, sample, scale_by_temperature, stream_tokens
from flash_attn_models.gpt import GPTConfig, GPTLMHeadModel
from torch import nn

CONFIG = GPTConfig(vocab_size=31, max_seqlen=20, n_layer=1, n_head=2, d_model=16, initializer_range=0.4)


@pytest.fixture
def model():
    return GPTLMHeadModel(CONFIG).eval()


@pytest.fixture
def prompt():
    return torch.randint(31, (2, 5))


@pytest.mark.parametrize("number", [np.int64, np.int32, torch.tensor], ids=lambda kind: kind.__name__)
def test_whole_numbers_may_be_of_any_kind(model, prompt, number):
    free = generate(model, prompt, 6)
    end, fill = free[0, 7].item(), 3
    expected = generate(model, prompt, 6, eos_token_id=end, pad_token_id=fill)
    options = {"eos_token_id": number(end), "pad_token_id": number(fill)}
    assert torch.equal(generate(model, prompt, number(6), **options), expected)
    options["eos_token_id"] = [number(end)]
    paged = {"cache": "paged", "page_size": number(4)}
    assert torch.equal(generate(model, prompt, 6, **options, **paged), expected)
    drafted = {"draft": "prompt_lookup", "lookahead": number(2)}
    assert torch.equal(generate(model, prompt, 6, **options, **drafted), expected)
    assert torch.equal(generate(model, prompt, 6, do_sample=True, top_k=number(1)), free)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 6.0}, r"max_new_tokens: got 6.0; expected at least 1, a whole number"),
        ({"max_new_tokens": "6"}, r"max_new_tokens: got '6'; expected at least 1, a whole number"),
        ({"max_new_tokens": True}, r"max_new_tokens: got True; expected at least 1, a whole number"),
        ({"lookahead": 2.0, "draft": "prompt_lookup"}, r"lookahead: got 2.0; expected at least 1 token"),
        ({"page_size": 4.0, "cache": "paged"}, r"page_size: got 4.0; expected at least 1 token"),
        ({"eos_token_id": 3.5}, r"eos_token_id: got 3.5; expected a token id in \[0, vocab_size=31\)"),
        ({"eos_token_id": "a"}, r"eos_token_id: got 'a'; expected a token id"),
        ({"eos_token_id": True}, r"eos_token_id: got True; expected a token id"),
        ({"pad_token_id": 1.5}, r"pad_token_id: got 1.5; expected a token id"),
        ({"do_sample": True, "top_k": 5.0}, r"top_k: got 5.0; expected at least 1, a whole number"),
        ({"do_sample": True, "temperature": None}, r"temperature: got None; expected a positive number"),
        ({"do_sample": True, "temperature": "1"}, r"temperature: got '1'; expected a positive number"),
        (
            {"do_sample": True, "temperature": float("inf")},
            r"temperature: got inf; expected a positive number",
        ),
        ({"do_sample": True, "top_p": "0.9"}, r"top_p: got '0.9'; expected a probability"),
        ({"do_sample": True, "min_p": "0.9"}, r"min_p: got '0.9'; expected a factor"),
        ({"do_sample": True, "generator": 3}, r"generator: got 3; expected a torch.Generator"),
        ({"repetition_penalty": "2"}, r"repetition_penalty: got '2'; expected a positive number"),
        ({"attention_mask": [[1] * 5] * 2}, r"attention_mask: got a list; expected the shape of input_ids"),
    ],
)
def test_other_kinds_are_refused_before_anything_is_computed(model, prompt, options, message):
    model.register_forward_pre_hook(lambda *_: pytest.fail("computed something"))
    arguments = {"max_new_tokens": 5, **options}
    with pytest.raises(ValueError, match=message):
        stream_tokens(model, prompt, arguments.pop("max_new_tokens"), **arguments)


def test_what_is_no_tensor_of_ids_is_refused(model, prompt):
    for given, kind in ((prompt.tolist(), "list"), ({"input_ids": prompt}, "dict")):
        with pytest.raises(ValueError, match=rf"input_ids: got a {kind}; expected token ids of shape"):
            stream_tokens(model, given, 5)


def test_another_device_is_refused_at_once(prompt):
    with pytest.raises(
        ValueError, match=r"input_ids: got a tensor on cpu; expected one on the model's device, meta"
    ):
        stream_tokens(GPTLMHeadModel(CONFIG, device="meta"), prompt, 5)


def test_other_models_are_refused(model, prompt):
    for name, options in (("model", {}), ("draft", {"draft": nn.Sequential(model)})):
        given = model if options else nn.Sequential(model)
        with pytest.raises(ValueError, match=rf"{name}: got a Sequential; expected a GPTLMHeadModel"):
            stream_tokens(given, prompt, 5, **options)


def test_compiled_models_are_models(model, prompt):
    expected = generate(model, prompt, 5)
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(generate(compiled, prompt, 5), expected)
    small = GPTLMHeadModel(dataclasses.replace(CONFIG, d_model=8)).eval()
    assert torch.equal(
        generate(model, prompt, 5, draft=torch.compile(small, backend="eager"), lookahead=2), expected
    )


@pytest.mark.parametrize("temperature", [1e-4, 1e-30, 1e-40, 5e-324])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_temperature_near_0_draws_the_most_likely_tokens(temperature, dtype):
    logits = (20 * torch.randn(200, 17)).to(dtype)
    logits[:, 3] = -torch.inf
    assert torch.equal(sample(logits, temperature=temperature), logits.argmax(-1))
    scaled = scale_by_temperature(logits, temperature)
    assert torch.equal(scaled.float().softmax(-1).argmax(-1), logits.argmax(-1))
    ties = torch.tensor([1.0, 5.0, 5.0, 2.0], dtype=dtype).expand(500, 4)
    assert set(sample(ties, temperature=temperature).tolist()) == {1, 2}


def test_min_p_is_exact_in_16_bits():
    """The bound is not rounded: 20 + log(0.5) is 19.307, and its neighbours in bfloat16 are 19.25 and 19.375."""
    logits = torch.tensor([20.0, 19.25, 19.375], dtype=torch.bfloat16)
    assert keep_min_p(logits, 0.5).isfinite().tolist() == [True, False, True]
    logits = torch.tensor([20.0, 19.375], dtype=torch.bfloat16)
    assert keep_min_p(logits, 0.53).isfinite().tolist() == [True, True]  # 19.365 would round up to 19.375
    assert keep_min_p(logits, 0.54).isfinite().tolist() == [True, False]  # 19.384 would round down to 19.375

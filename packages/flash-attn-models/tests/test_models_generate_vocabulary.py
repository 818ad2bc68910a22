"""Ids that pad the vocabulary: never chosen, whatever is asked for besides."""

from __future__ import annotations

import pytest
import torch
from flash_attn_models.generation import generate, generate_output, stream_tokens
from flash_attn_models.gpt import GPTConfig, GPTLMHeadModel, with_vocab_size

SIZES = {"max_seqlen": 40, "n_layer": 2, "n_head": 2, "d_model": 16, "initializer_range": 0.4}


@pytest.fixture
def model():
    return GPTLMHeadModel(GPTConfig(vocab_size=29, **SIZES), dtype=torch.float64).eval()


@pytest.fixture
def draft():
    return GPTLMHeadModel(GPTConfig(vocab_size=48, **{**SIZES, "n_layer": 1})).eval()


OPTIONS = {
    "greedy": {},
    "penalty": {"repetition_penalty": 3.0},
    "drawn": {"do_sample": True, "temperature": 4.0},
    "filters": {"do_sample": True, "top_k": 40, "top_p": 0.99, "min_p": 0.001, "repetition_penalty": 1.2},
}


@pytest.mark.parametrize("drafted", [None, "prompt_lookup", "model"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_a_padded_model_writes_what_the_model_does(model, draft, options, drafted):
    """The same tokens and probabilities, whatever logits the padding has."""
    padded = with_vocab_size(model, 48)
    with torch.no_grad():
        padded.head_weight[29:] = 9 * padded.head_weight[:19]
    input_ids = torch.randint(29, (3, 6))
    drafts = {None: [None] * 2, "prompt_lookup": ["prompt_lookup"] * 2}
    drafts["model"] = [with_vocab_size(draft, 29), draft]
    results = []
    for one, vocab_size, its_draft in zip((model, padded), (None, 29), drafts[drafted], strict=True):
        given = dict(options)
        if "do_sample" in given:
            given["generator"] = torch.Generator().manual_seed(3)
        results.append(
            generate_output(
                one, input_ids, 20, vocab_size=vocab_size, draft=its_draft, return_logprobs=True, **given
            )
        )
    assert torch.equal(results[0].sequences, results[1].sequences)
    torch.testing.assert_close(results[0].logprobs, results[1].logprobs)
    assert generate(padded, input_ids, 20).max() >= 29  # it matters


@pytest.mark.parametrize(
    ("vocab_size", "message"),
    [
        (0, r"vocab_size: got 0; expected between 1 and the model's 29"),
        (30, r"vocab_size: got 30; expected between 1 and the model's 29"),
        (3.0, r"vocab_size: got 3.0; expected between 1 and the model's 29, a whole number"),
    ],
)
def test_sizes_that_are_none_are_refused(model, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        stream_tokens(model, torch.ones(1, 3, dtype=torch.int64), 5, vocab_size=vocab_size)

"""Log-probabilities of generated tokens: Hugging Face's transition scores."""

from __future__ import annotations

import json

import pytest
import torch
from flash_attn_models.generation import generate, generate_output
from flash_attn_models.gpt import GPTConfig, GPTLMHeadModel
from flash_attn_models.gpt.hugging_face import (
    config_from_hugging_face,
    from_hugging_face,
    hugging_face_layout,
)


@pytest.fixture
def model():
    sizes = {"vocab_size": 61, "max_seqlen": 32, "n_layer": 1, "n_head": 4, "d_model": 32}
    return GPTLMHeadModel(GPTConfig(**sizes, initializer_range=0.3), dtype=torch.float64).eval()


def prompt(model, batch=4, seqlen=7):
    return torch.randint(model.config.vocab_size, (batch, seqlen))


@pytest.mark.parametrize("penalty", [None, 1.4])
def test_logprobs_equal_transition_scores_of_transformers(hf_model, penalty):
    fields = json.loads(hf_model.config.to_json_string(use_diff=False))
    config = config_from_hugging_face(fields)
    model = GPTLMHeadModel(config).eval()
    model.load_state_dict(
        from_hugging_face(hf_model.state_dict(), hugging_face_layout(config, fields["model_type"]))
    )
    input_ids = prompt(model)
    theirs = hf_model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=20,
        do_sample=False,
        pad_token_id=0,
        repetition_penalty=penalty,
        return_dict_in_generate=True,
        output_scores=True,
    )
    expected = hf_model.compute_transition_scores(theirs.sequences, theirs.scores, normalize_logits=True)
    output = generate_output(model, input_ids, 20, repetition_penalty=penalty, return_logprobs=True)
    assert torch.equal(output.sequences, theirs.sequences)
    torch.testing.assert_close(output.logprobs, expected, rtol=1e-4, atol=1e-4)
    assert output.acceptance is None


@pytest.mark.parametrize("draft", [False, True], ids=["plain", "speculative"])
def test_logprobs_are_those_of_the_distribution_drawn_from(model, draft):
    input_ids = prompt(model)
    output = generate_output(
        model,
        input_ids,
        12,
        do_sample=True,
        temperature=0.7,
        generator=torch.Generator().manual_seed(0),
        return_logprobs=True,
        draft="prompt_lookup" if draft else None,
    )
    assert output.logprobs.dtype == torch.float32
    with torch.no_grad():
        logprobs = (model(output.sequences)[:, 6:-1] / 0.7).log_softmax(-1)
    expected = logprobs.gather(-1, output.sequences[:, 7:, None])[..., 0]
    torch.testing.assert_close(output.logprobs, expected.float(), rtol=1e-4, atol=1e-5)


def test_filled_places_have_logprob_0_also_with_drafts(model):
    input_ids = prompt(model)
    free = generate(model, input_ids, 20)
    options = {"eos_token_id": [free[0, 9].item(), free[1, 15].item()], "pad_token_id": 1}
    plain = generate_output(model, input_ids, 20, return_logprobs=True, **options)
    drafted = generate_output(model, input_ids, 20, return_logprobs=True, draft="prompt_lookup", **options)
    assert plain.logprobs.shape == plain.sequences[:, 7:].shape
    assert torch.equal(plain.sequences, drafted.sequences)
    torch.testing.assert_close(drafted.logprobs, plain.logprobs)
    for logprobs, row in zip(plain.logprobs, plain.sequences[:, 7:].tolist(), strict=True):
        places = [place for place, token in enumerate(row) if token in options["eos_token_id"]]
        n = places[0] + 1 if places else len(row)
        assert (logprobs[:n] < 0).all()
        assert (logprobs[n:] == 0).all()


def test_nothing_is_kept_that_is_not_asked_for(model):
    output = generate_output(model, prompt(model), 5)
    assert output.logprobs is None
    assert output.acceptance is None
    with pytest.raises(TypeError, match="max_tokens"):
        generate_output(model, prompt(model), 5, max_tokens=3)

"""Generation: equal to transformers and to a loop without cache; ends of sequences, sampling, errors."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from flash_attn_models.generation import generate, stream_tokens
from flash_attn_models.gpt import GPTLMHeadModel
from flash_attn_models.gpt.hugging_face import (
    config_from_hugging_face,
    from_hugging_face,
    hugging_face_layout,
)


@pytest.fixture
def model(config):
    return GPTLMHeadModel(dataclasses.replace(config, initializer_range=0.3)).eval()


def prompt(model, batch=3, seqlen=7):
    return torch.randint(model.config.vocab_size, (batch, seqlen))


@torch.no_grad()
def greedy_without_cache(model, input_ids, max_new_tokens):
    for _ in range(max_new_tokens):
        input_ids = torch.cat([input_ids, model(input_ids)[:, -1:].argmax(-1)], dim=1)
    return input_ids


def test_greedy_equals_transformers_token_for_token(hf_model):
    fields = json.loads(hf_model.config.to_json_string(use_diff=False))
    config = config_from_hugging_face(fields)
    model = GPTLMHeadModel(config).eval()
    model.load_state_dict(
        from_hugging_face(hf_model.state_dict(), hugging_face_layout(config, fields["model_type"]))
    )
    input_ids = prompt(model, batch=4, seqlen=9)
    # Without a mask transformers takes every fill id in the prompt for padding.
    options = {"attention_mask": torch.ones_like(input_ids), "max_new_tokens": 50, "do_sample": False}
    expected = hf_model.generate(input_ids, **options, pad_token_id=0)
    assert len(expected[:, 9:].unique()) > 10  # not one token for ever
    assert torch.equal(generate(model, input_ids, 50), expected)

    ends = expected[:2, 20].tolist()  # each ends some row, at different times
    expected = hf_model.generate(input_ids, **options, eos_token_id=ends, pad_token_id=1)
    assert torch.equal(generate(model, input_ids, 50, eos_token_id=ends, pad_token_id=1), expected)


def test_greedy_equals_a_loop_without_cache(model):
    input_ids = prompt(model)
    tokens = generate(model, input_ids, 33)
    assert tokens.shape == (3, 40)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, greedy_without_cache(model, input_ids, 33))


def test_each_row_is_generated_as_if_alone(model):
    input_ids = prompt(model)
    together = generate(model, input_ids, 20)
    alone = torch.cat([generate(model, row[None], 20) for row in input_ids])
    assert torch.equal(together, alone)


def test_ended_rows_are_filled_and_never_revived(model):
    input_ids = prompt(model, batch=4)
    free = generate(model, input_ids, 30)
    end = free[0, 12].item()  # row 0 ends here at the latest
    tokens = generate(model, input_ids, 30, eos_token_id=end, pad_token_id=5)
    for row, free_row in zip(tokens[:, 7:].tolist(), free[:, 7:].tolist(), strict=True):
        stop = free_row.index(end) + 1 if end in free_row else len(free_row)
        assert row[:stop] == free_row[: min(stop, len(row))]
        assert set(row[stop:]) <= {5}


def test_stops_as_soon_as_every_row_has_ended(model):
    input_ids = prompt(model)
    free = generate(model, input_ids, 30)
    ends = free[:, 10].tolist()
    last = max(min(row.index(end) for end in ends if end in row) for row in free[:, 7:].tolist())
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    tokens = generate(model, input_ids, 30, eos_token_id=ends)
    handle.remove()
    assert tokens.shape == (3, 7 + last + 1)
    assert len(calls) == last + 1


def test_end_and_fill_ids_default_to_the_configs(config):
    config = dataclasses.replace(config, initializer_range=0.3)
    model = GPTLMHeadModel(config).eval()
    input_ids = prompt(model)
    free = generate(model, input_ids, 20)
    end = free[0, 9].item()
    model.config = dataclasses.replace(config, eos_token_id=end, pad_token_id=3)
    assert torch.equal(
        generate(model, input_ids, 20), generate(model, input_ids, 20, eos_token_id=end, pad_token_id=3)
    )
    assert torch.equal(generate(model, input_ids, 20, eos_token_id=()), free)
    model.config = dataclasses.replace(config, eos_token_id=(end,))
    assert torch.equal(
        generate(model, input_ids, 20), generate(model, input_ids, 20, eos_token_id=end, pad_token_id=end)
    )


def test_sampling_follows_the_generator(model):
    input_ids = prompt(model, batch=8)

    def run(seed, **options):
        return generate(
            model, input_ids, 20, do_sample=True, generator=torch.Generator().manual_seed(seed), **options
        )

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    greedy = generate(model, input_ids, 20)
    assert torch.equal(run(1, top_k=1), greedy)
    assert torch.equal(run(1, top_p=1e-6), greedy)
    assert torch.equal(run(1, temperature=1e-4), greedy)
    for options in ({"top_k": 5}, {"top_p": 0.5}, {"temperature": 3.0}):
        assert not torch.equal(run(1, **options), run(1))
    torch.manual_seed(3)
    first = generate(model, input_ids, 20, do_sample=True)
    torch.manual_seed(3)
    assert torch.equal(generate(model, input_ids, 20, do_sample=True), first)


def test_sampled_first_token_has_the_models_distribution(model):
    """Chi-squared over the ten likeliest tokens and the rest, 10 degrees of freedom: 45 has p = 2e-6."""
    n = 5000
    input_ids = prompt(model, batch=1)
    with torch.no_grad():
        probabilities = model(input_ids)[0, -1].softmax(-1)
    top, indices = probabilities.topk(10)
    drawn = generate(
        model, input_ids.expand(n, -1), 1, do_sample=True, generator=torch.Generator().manual_seed(0)
    )
    counts = drawn[:, -1].bincount(minlength=model.config.vocab_size)[indices].double()
    observed = torch.cat([counts, n - counts.sum()[None]])
    expected = n * torch.cat([top, 1 - top.sum()[None]]).double()
    assert ((observed - expected) ** 2 / expected).sum() < 45


def test_stream_gives_the_same_tokens_one_by_one(model):
    input_ids = prompt(model)
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    stream = stream_tokens(model, input_ids, 10)
    columns = []
    for column in stream:
        columns.append(column)
        assert len(calls) == len(columns)  # each token as soon as it is known
    handle.remove()
    assert torch.equal(torch.stack(columns, dim=1), generate(model, input_ids, 10)[:, 7:])


def test_model_runs_in_evaluation_mode_and_is_left_as_it_was(config):
    config = dataclasses.replace(config, dropout=0.5, attn_dropout=0.5, initializer_range=0.3)
    model = GPTLMHeadModel(config)
    model.transformer.ln_f.eval()
    input_ids = prompt(model)
    tokens = generate(model, input_ids, 20)
    assert [module for module in model.modules() if not module.training] == [model.transformer.ln_f]
    assert torch.equal(tokens, generate(model.eval(), input_ids, 20))


def test_no_graph_is_kept(model):
    assert torch.is_grad_enabled()
    for column in stream_tokens(model, prompt(model), 3):
        assert torch.is_grad_enabled()
        assert not column.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_generation_under_autocast(model):
    input_ids = prompt(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = generate(model, input_ids, 10)
        with torch.no_grad():
            logits = model(tokens)[:, 6:-1].float()
    chosen = logits.gather(-1, tokens[:, 7:, None])[..., 0]
    assert (
        chosen >= logits.max(-1).values - 0.1 * logits.std()
    ).all()  # bfloat16 may order near-ties differently


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"max_new_tokens": 34},
            r"input_ids: got a prompt of 7 tokens and max_new_tokens=34; expected together at most"
            r" the context of max_seqlen=40. Fix: keep only the prompt's end, input_ids\[:, -6:\]",
        ),
        (
            {"max_new_tokens": 40},
            r"expected together at most the context of max_seqlen=40. Fix: set max_new_tokens below 40",
        ),
        ({"max_new_tokens": 0}, r"max_new_tokens: got 0; expected at least 1"),
        ({"input_ids": torch.zeros(7, dtype=torch.int64)}, r"input_ids: got shape \(7,\)"),
        (
            {"input_ids": torch.zeros(2, 0, dtype=torch.int64)},
            r"input_ids: got shape \(2, 0\).*at least one token",
        ),
        ({"input_ids": torch.zeros(2, 7)}, r"input_ids: got shape \(2, 7\), torch.float32"),
        (
            {"input_ids": torch.full((1, 7), 10**6)},
            r"input_ids: got ids from 1000000 to 1000000; expected ids in \[0, vocab_size=",
        ),
        ({"input_ids": torch.full((1, 7), -1)}, r"input_ids: got ids from -1 to -1"),
        ({"top_k": 5}, r"top_k: got 5; expected to be left out with do_sample=False.*pass do_sample=True"),
        ({"top_p": 0.5}, r"top_p: got 0.5; expected to be left out with do_sample=False"),
        ({"temperature": 0.5}, r"temperature: got 0.5; expected to be left out with do_sample=False"),
        ({"generator": torch.Generator()}, r"generator: got <.*expected to be left out with do_sample=False"),
        ({"do_sample": True, "temperature": 0.0}, r"temperature: got 0.0; expected a positive number"),
        ({"do_sample": True, "top_k": 0}, r"top_k: got 0"),
        ({"do_sample": True, "top_p": 2.0}, r"top_p: got 2.0"),
        ({"eos_token_id": 10**6}, r"eos_token_id: got 1000000; expected a token id in \[0, vocab_size="),
        ({"eos_token_id": [1, -2]}, r"eos_token_id: got -2"),
        ({"pad_token_id": -1}, r"pad_token_id: got -1"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_computed(model, changes, message):
    arguments = {"input_ids": prompt(model), "max_new_tokens": 5, **changes}
    model.register_forward_pre_hook(lambda *_: pytest.fail("computed something"))
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        stream_tokens(model, arguments.pop("input_ids"), arguments.pop("max_new_tokens"), **arguments)
    assert torch.equal(state, torch.get_rng_state())

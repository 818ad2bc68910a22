"""Speculative decoding: greedy tokens equal plain ones, drawn ones have the model's distribution."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from flash_attn_models.generation import generate, generate_output, make_page_pool, stream_tokens
from flash_attn_models.generation.accept import Draft, accept_greedy, accept_sampled
from flash_attn_models.generation.choice import Choice
from flash_attn_models.generation.draft import PromptLookup
from flash_attn_models.gpt import GPTConfig, GPTLMHeadModel

LENGTHS = [7, 3, 5, 1]
OTHERS = {
    "grouped": {"position": "rotary", "n_head_kv": 2, "norm": "rms_norm", "activation": "swiglu"},
    "window": {"position": "rotary", "window": 5},
    "alibi": {"position": "alibi"},
    "parallel": {"position": "rotary", "parallel_block": True},
}


SIZES = {"vocab_size": 61, "max_seqlen": 32, "n_layer": 1, "n_head": 4, "d_model": 32}


def make_model(**changes):
    # fp64, so that passes over one token and over several agree about the most likely one
    config = GPTConfig(**SIZES, initializer_range=0.3, **changes)
    return GPTLMHeadModel(config, dtype=torch.float64).eval()


@pytest.fixture
def model():
    """With learned positions, of which there are none behind the context."""
    return make_model()


def another(model, noise):
    """A draft model that often agrees: the same with noise in its weights."""
    draft = GPTLMHeadModel(model.config, dtype=torch.float64).eval()
    weights = {
        name: w + noise * w.std().nan_to_num() * torch.randn_like(w) for name, w in model.state_dict().items()
    }
    draft.load_state_dict(weights)
    return draft


def prompt(model, batch=4, seqlen=7):
    return torch.randint(model.config.vocab_size, (batch, seqlen))


def check_equals_plain(model, draft, n_new=20, lookahead=None, **options):
    input_ids = prompt(model)
    expected = generate(model, input_ids, n_new, **options)
    output = generate_output(model, input_ids, n_new, draft=draft, lookahead=lookahead, **options)
    assert torch.equal(output.sequences, expected)
    return output.acceptance


@pytest.mark.parametrize("lookahead", [1, 2, 4, 7])
def test_greedy_equals_plain_greedy(model, lookahead):
    acceptance = check_equals_plain(model, another(model, 0.05), lookahead=lookahead)
    assert 0 < acceptance.accepted < acceptance.drafted
    assert acceptance.rate == acceptance.accepted / acceptance.drafted
    itself = check_equals_plain(model, model, lookahead=lookahead)
    assert itself.rate == 1.0
    assert itself.rounds == -(-19 // (lookahead + 1))


@pytest.mark.parametrize("changes", OTHERS.values(), ids=OTHERS.keys())
def test_greedy_equals_plain_greedy_in_other_architectures(changes):
    model = make_model(**changes)
    for cache in ("contiguous", "paged"):
        check_equals_plain(model, another(model, 0.05), prompt_lengths=LENGTHS, cache=cache)


def test_rows_accept_different_numbers_of_tokens(model):
    """Different lengths, ends, penalty, paged cache, and up to the context, where drafts are cut."""
    draft = another(model, 0.05)
    check_equals_plain(model, draft, prompt_lengths=LENGTHS)
    check_equals_plain(model, draft, n_new=25, prompt_lengths=LENGTHS, lookahead=6)
    check_equals_plain(
        model, draft, n_new=25, prompt_lengths=LENGTHS, lookahead=6, cache="paged", page_size=4
    )
    check_equals_plain(model, draft, n_new=1)
    acceptance = check_equals_plain(model, draft, repetition_penalty=1.3, prompt_lengths=LENGTHS)
    assert acceptance.accepted > 0
    input_ids = prompt(model)
    free = generate(model, input_ids, 20)
    ends = free[:, 13].tolist()[:3]
    options = {"eos_token_id": ends, "pad_token_id": 2}
    expected = generate(model, input_ids, 20, **options)
    assert torch.equal(generate(model, input_ids, 20, draft=draft, **options), expected)
    pool = make_page_pool(model, 60, page_size=4)
    assert torch.equal(generate(model, input_ids, 20, draft=draft, cache=pool, **options), expected)
    assert pool.n_free == 60


def test_stop_strings(model):
    def decode(ids):
        return "".join(chr(97 + token % 26) for token in ids)

    input_ids = prompt(model)
    free = generate(model, input_ids, 20)[:, 7:].tolist()
    strings = [decode(free[0][6:9]), decode(free[1][10:12])]
    options = {"stop_strings": strings, "tokenizer": decode, "pad_token_id": 1}
    expected = generate(model, input_ids, 20, **options)
    assert not torch.equal(expected[:, 7:], torch.tensor(free)[:, : expected.shape[1] - 7])
    assert torch.equal(generate(model, input_ids, 20, draft=another(model, 0.05), **options), expected)


def test_prompt_lookup(model):
    acceptance = check_equals_plain(model, "prompt_lookup", prompt_lengths=LENGTHS)
    assert acceptance.rounds > 0
    # A text that repeats itself: the same few tokens again and again.
    config = dataclasses.replace(model.config, initializer_range=0.02)
    repeating = GPTLMHeadModel(config, dtype=torch.float64)
    with torch.no_grad():
        for parameter in repeating.transformer.layers.parameters():
            parameter.zero_()
    acceptance = check_equals_plain(repeating, "prompt_lookup", lookahead=3)
    assert acceptance.accepted > 10
    assert acceptance.rounds < 20


def test_lookup_finds_the_latest_continuation_of_the_longest_match():
    lookup = PromptLookup(3, torch.device("cpu"))
    texts = [[1, 2, 3, 9, 5, 2, 3, 8, 1, 2, 3], [4, 4, 4, 4], [1, 2]]
    draft = lookup.propose(texts, 3, None)
    assert draft.counts.tolist() == [3, 1, 0]
    assert draft.tokens.tolist() == [[9, 5, 2], [4, 0, 0], [0, 0, 0]]
    draft = lookup.propose([[*texts[0], 7, 2, 3], texts[1][:1], [*texts[2], 1, 2]], 2, None)
    assert draft.tokens.tolist() == [[7, 2], [0, 0], [1, 2]]
    assert draft.counts.tolist() == [2, 0, 2]
    assert PromptLookup(1, torch.device("cpu")).propose([[1, 2, 3]], 4, None).tokens.shape == (1, 0)


def test_greedy_acceptance():
    scores = torch.nn.functional.one_hot(torch.tensor([[3, 1, 2], [3, 1, 2], [0, 1, 2]]), 5).float()
    tokens = torch.tensor([[3, 1], [3, 0], [3, 1]])
    accepted, token = accept_greedy(scores, Draft(tokens))
    assert accepted.tolist() == [2, 1, 0]
    assert token.tolist() == [2, 1, 0]
    accepted, token = accept_greedy(scores, Draft(tokens, counts=torch.tensor([1, 2, 0])))
    assert accepted.tolist() == [1, 1, 0]
    assert token.tolist() == [1, 1, 0]


def chi_square_p_value(observed, expected):
    """Cells that expect fewer than 5 count as one."""
    rare = expected < 5
    o = torch.cat([observed[~rare], observed[rare].sum()[None]]).double()
    e = torch.cat([expected[~rare], expected[rare].sum()[None]]).double()
    o, e = o[e > 0], e[e > 0]
    statistic = ((o - e) ** 2 / e).sum()
    return torch.special.gammaincc(torch.tensor((len(e) - 1) / 2).double(), statistic / 2).item()


@pytest.mark.parametrize("kind", ["drawn", "certain"])
def test_sampled_acceptance_keeps_the_distribution(kind):
    """One drafted token: the token that comes first, and the one after an accepted one."""
    n, vocab = 200_000, 5
    p, q = torch.randn(2, vocab).mul(1.5).unbind(0)
    scores = torch.stack([p, torch.randn(vocab)]).expand(n, -1, -1)
    generator = torch.Generator().manual_seed(0)
    if kind == "drawn":
        probabilities = q.softmax(-1).expand(n, -1)
        tokens = probabilities.multinomial(1, generator=generator)
        draft = Draft(tokens, probabilities[:, None])
    else:
        draft = Draft(torch.full((n, 1), 2))
    accepted, token = accept_sampled(scores, draft, generator)
    first = torch.where(accepted == 1, draft.tokens[:, 0], token)
    assert chi_square_p_value(first.bincount(minlength=vocab), n * p.softmax(-1)) > 1e-3
    second = token[accepted == 1]
    expected = len(second) * scores[0, 1].softmax(-1)
    assert chi_square_p_value(second.bincount(minlength=vocab), expected) > 1e-3
    overlap = torch.minimum(p.softmax(-1), q.softmax(-1)).sum() if kind == "drawn" else p.softmax(-1)[2]
    assert abs(accepted.double().mean() - overlap) < 0.01


OPTIONS = {
    "plain": {},
    "filters": {"temperature": 1.3, "top_k": 5, "top_p": 0.9},
    "penalty_min_p": {"repetition_penalty": 1.4, "min_p": 0.1},
}


@pytest.mark.parametrize(
    ("kind", "options"),
    [("model", options) for options in OPTIONS.values()] + [("prompt_lookup", OPTIONS["filters"])],
    ids=[*OPTIONS, "prompt_lookup"],
)
@torch.no_grad()
def test_sampling_keeps_the_distribution_of_the_model(kind, options):
    """Exact probabilities of all sequences of three tokens, against many draws in one batch."""
    n, vocab, n_new = 1_500, 6, 3
    config = GPTConfig(vocab_size=vocab, max_seqlen=16, n_layer=1, n_head=2, d_model=8, initializer_range=0.5)
    model, draft = GPTLMHeadModel(config), GPTLMHeadModel(config)
    start = torch.tensor([[1, 2, 3, 1, 2]])
    sequences = torch.tensor(list(itertools.product(range(vocab), repeat=n_new)))
    whole = torch.cat([start.expand(len(sequences), -1), sequences], dim=1)
    logits = model(whole)
    choice = Choice(do_sample=True, **options)
    exact = torch.ones(len(sequences), dtype=torch.float64)
    for place in range(n_new):
        seen = torch.zeros(len(whole), vocab, dtype=torch.bool).scatter(1, whole[:, : 5 + place], True)
        probabilities = choice.scores(logits[:, 4 + place], seen).softmax(-1).double()
        exact *= probabilities.gather(1, sequences[:, place, None])[:, 0]
    output = generate_output(
        model,
        start.expand(n, -1),
        n_new,
        draft=draft if kind == "model" else kind,
        do_sample=True,
        generator=torch.Generator().manual_seed(0),
        lookahead=2,
        **options,
    )
    new = output.sequences[:, 5:]
    number = (new * torch.tensor([vocab**2, vocab, 1])).sum(-1)
    observed = number.bincount(minlength=vocab**n_new)
    assert observed[exact == 0].sum() == 0
    assert chi_square_p_value(observed, n * exact) > 1e-3
    assert 0 < output.acceptance.accepted < output.acceptance.drafted


def test_sampling_follows_the_seed(model):
    def run(seed, draft):
        generator = torch.Generator().manual_seed(seed)
        return generate(model, input_ids, 20, do_sample=True, generator=generator, draft=draft, top_k=9)

    input_ids = prompt(model)
    for draft in (another(model, 0.05), "prompt_lookup"):
        assert torch.equal(run(1, draft), run(1, draft))
        assert not torch.equal(run(1, draft), run(2, draft))


def test_stream_gives_columns_as_soon_as_every_row_has_them(model):
    input_ids = prompt(model)
    passes = []
    handle = model.register_forward_hook(lambda *_: passes.append(1))
    columns, passes_before = [], []
    for column in stream_tokens(model, input_ids, 20, draft=another(model, 0.02), lookahead=3):
        columns.append(column)
        passes_before.append(len(passes))
    handle.remove()
    assert torch.equal(torch.stack(columns, dim=1), generate(model, input_ids, 20)[:, 7:])
    assert passes_before[0] == 1
    assert passes_before[-1] < 20


def test_model_and_draft_are_left_as_they_were(model):
    draft = another(model, 0.05).train()
    model.train()
    generate(model, prompt(model), 9, draft=draft)
    assert model.training and draft.training
    assert all(module.training for module in [*model.modules(), *draft.modules()])


def test_misuse_is_refused(model):
    model.register_forward_pre_hook(lambda *_: pytest.fail("computed something"))
    config = model.config
    other_words = GPTLMHeadModel(dataclasses.replace(config, vocab_size=config.vocab_size + 1))
    shorter = GPTLMHeadModel(dataclasses.replace(config, max_seqlen=10))
    for options, message in [
        ({"draft": other_words}, r"draft: got a model with vocab_size \d+; expected vocab_size \d+, as the"),
        ({"draft": shorter}, r"draft: got a model with a context of 10 tokens; expected at least the 12"),
        ({"draft": "prompt_lokup"}, r"draft: got 'prompt_lokup' \(did you mean 'prompt_lookup'\?\)"),
        ({"draft": 3}, r"draft: got 3; expected a GPTLMHeadModel or 'prompt_lookup'"),
        ({"lookahead": 3}, r"lookahead: got 3; expected to be left out without draft"),
        ({"lookahead": 0, "draft": "prompt_lookup"}, r"lookahead: got 0; expected at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            stream_tokens(model, prompt(model), 5, **options)


def test_a_draft_with_a_shorter_context_than_the_model(model):
    config = dataclasses.replace(model.config, max_seqlen=27)
    check_equals_plain(model, GPTLMHeadModel(config, dtype=torch.float64), prompt_lengths=LENGTHS)

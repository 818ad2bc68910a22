"""Prompts of different lengths: equal to transformers with left padding, each row as if alone; what is refused."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from flash_attn_models.generation import generate, make_cache, stream_tokens
from flash_attn_models.gpt import GPTConfig, GPTLMHeadModel
from flash_attn_models.gpt.hugging_face import (
    config_from_hugging_face,
    from_hugging_face,
    hugging_face_layout,
)
from flash_attn_models.testing import assert_within_reference_error

LENGTHS = [9, 3, 6, 1]
# Options of the model classes beside CONFIGS of conftest: per row they matter for positions and visibility.
WINDOWED = GPTConfig(
    vocab_size=97, max_seqlen=40, n_layer=2, n_head=4, n_head_kv=2, d_model=32, position="rotary", window=5
)
ALIBI = GPTConfig(vocab_size=97, max_seqlen=40, n_layer=2, n_head=6, d_model=48, position="alibi")
OFFSET = GPTConfig(vocab_size=97, max_seqlen=40, n_layer=2, n_head=2, d_model=32, position_offset=2)
NARROW = dataclasses.replace(OFFSET, d_embedding=24, embedding_scale=3.0)


@pytest.fixture
def model(config):
    return GPTLMHeadModel(dataclasses.replace(config, initializer_range=0.3)).eval()


def random_ids(config, batch=4, seqlen=9):
    return torch.randint(config.vocab_size, (batch, seqlen))


def left_padded(input_ids, lengths, fill=0):
    """The first ids of each row, moved to the right; and the mask."""
    width = input_ids.shape[1]
    mask = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    moved = torch.stack([row.roll(width - n) for row, n in zip(input_ids, lengths, strict=True)])
    return moved.masked_fill(~mask, fill), mask


HUGGING_FACE = {
    "gpt2": ("gpt2", {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "llama_gqa": ("llama", {"num_key_value_heads": 2}),
    "llama3_scaling": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "mistral_window": ("mistral", {"num_key_value_heads": 2, "sliding_window": 7}),
    "falcon_alibi": ("falcon", {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}),
    "gpt_neox": ("gpt_neox", {"num_attention_heads": 3}),
    "opt": ("opt", {"ffn_dim": 72, "word_embed_proj_dim": 48}),
}


@pytest.fixture(params=HUGGING_FACE.values(), ids=HUGGING_FACE.keys())
def pair(request):
    """A tiny random transformers model, and ours with its weights."""
    transformers = pytest.importorskip("transformers")
    model_type, changes = request.param
    sizes = {
        "max_position_embeddings": 64,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    fields = {
        **({} if model_type == "gpt2" else sizes),
        **({"intermediate_size": 88} if model_type in ("llama", "mistral", "gpt_neox") else {}),
        "vocab_size": 131,
        "init_std" if model_type == "opt" else "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    hf_config = transformers.AutoConfig.for_model(model_type, **{**fields, **changes})
    # Falcon's eager attention adds ALiBi twice.
    theirs = transformers.AutoModelForCausalLM.from_config(hf_config, attn_implementation="sdpa").eval()
    read = json.loads(hf_config.to_json_string(use_diff=False))
    config = config_from_hugging_face(read)
    ours = GPTLMHeadModel(config).eval()
    ours.load_state_dict(from_hugging_face(theirs.state_dict(), hugging_face_layout(config, model_type)))
    return theirs, ours


def test_greedy_with_left_padding_equals_transformers_token_for_token(pair):
    theirs, ours = pair
    input_ids, mask = left_padded(random_ids(ours.config), LENGTHS)
    options = {"attention_mask": mask.long(), "max_new_tokens": 40, "pad_token_id": 0}
    expected = theirs.generate(input_ids, **options, do_sample=False)
    assert len(expected[:, 9:].unique()) > 5  # not one token for ever
    assert torch.equal(generate(ours, input_ids, 40, attention_mask=mask), expected)
    assert torch.equal(
        generate(ours, input_ids, 40, attention_mask=mask.long(), cache="paged", page_size=8), expected
    )
    ends = [expected[0, 15].item(), expected[2, 20].item()]
    expected = theirs.generate(input_ids, **options, do_sample=False, eos_token_id=ends)
    assert torch.equal(
        generate(ours, input_ids, 40, attention_mask=mask, eos_token_id=ends, pad_token_id=0), expected
    )


@pytest.mark.parametrize(
    "config", [WINDOWED, ALIBI, OFFSET, NARROW], ids=["window", "alibi", "offset", "narrow"]
)
def test_each_row_is_continued_as_if_alone(config):
    check_rows_as_if_alone(
        GPTLMHeadModel(dataclasses.replace(config, initializer_range=0.3), dtype=torch.float64)
    )


def test_each_row_is_continued_as_if_alone_in_every_architecture(config):
    check_rows_as_if_alone(
        GPTLMHeadModel(dataclasses.replace(config, initializer_range=0.3), dtype=torch.float64)
    )


def check_rows_as_if_alone(model):
    """For padding of any side and any id."""
    input_ids = random_ids(model.config)
    alone = [generate(model, row[None, :n], 25)[0, n:] for row, n in zip(input_ids, LENGTHS, strict=True)]
    padded, mask = left_padded(input_ids, LENGTHS, fill=-100)
    mixed, mixed_mask = padded.clone(), mask.clone()
    mixed[1], mixed_mask[1] = padded[1].roll(4), mask[1].roll(4)
    for given in (
        generate(model, padded, 25, attention_mask=mask),
        generate(model, mixed, 25, attention_mask=mixed_mask),
        generate(model, input_ids, 25, prompt_lengths=LENGTHS),
        generate(model, input_ids, 25, prompt_lengths=torch.tensor(LENGTHS)),
        generate(model, input_ids, 25, prompt_lengths=LENGTHS, cache="paged", page_size=4),
    ):
        assert torch.equal(given[:, 9:], torch.stack(alone))


def test_prompts_come_back_as_they_were(model):
    padded, mask = left_padded(random_ids(model.config), LENGTHS, fill=-100)
    assert torch.equal(generate(model, padded, 3, attention_mask=mask)[:, :9], padded)


def test_padding_of_every_row_costs_no_context(model):
    input_ids = random_ids(model.config, seqlen=39)
    mask = torch.zeros(4, 39, dtype=torch.bool)
    mask[:, 20:30] = True
    padded = generate(model, input_ids, 30, attention_mask=mask)
    assert torch.equal(padded[:, 39:], generate(model, input_ids[:, 20:30], 30)[:, 10:])
    calls = []
    model.register_forward_pre_hook(lambda _, arguments: calls.append(arguments[0].shape[1]))
    generate(model, input_ids, 2, attention_mask=mask)
    assert calls == [10, 1]


def test_a_full_mask_changes_nothing(model):
    input_ids = random_ids(model.config)
    expected = generate(model, input_ids, 5)
    assert torch.equal(generate(model, input_ids, 5, attention_mask=torch.ones_like(input_ids)), expected)
    assert torch.equal(generate(model, input_ids, 5, prompt_lengths=[9] * 4), expected)


def test_ends_of_rows_with_different_prompts(model):
    input_ids = random_ids(model.config)
    free = generate(model, input_ids, 20, prompt_lengths=LENGTHS)[:, 9:]
    end = free[1, 4].item()
    tokens = generate(model, input_ids, 20, prompt_lengths=LENGTHS, eos_token_id=end, pad_token_id=7)[:, 9:]
    for row, free_row in zip(tokens.tolist(), free.tolist(), strict=True):
        stop = free_row.index(end) + 1 if end in free_row else len(row)
        assert row[:stop] == free_row[:stop]
        assert set(row[stop:]) <= {7}


@torch.no_grad()
@pytest.mark.parametrize("config", [WINDOWED, ALIBI, OFFSET], ids=["window", "alibi", "offset"])
def test_pieces_of_different_lengths_equal_one_pass(config):
    model = GPTLMHeadModel(dataclasses.replace(config, initializer_range=0.3), dtype=torch.float64).eval()
    input_ids = random_ids(config, batch=3, seqlen=20)
    expected = model(input_ids)
    cache = make_cache(model, 3, 24)
    done = torch.zeros(3, dtype=torch.int64)
    for seqlens in ([5, 2, 4], [1, 1, 1], [3, 6, 1]):
        width, counts = max(seqlens), torch.tensor(seqlens)
        columns = done[:, None] + torch.arange(width)
        logits = model(input_ids.gather(1, columns), cache=cache, seqlens=counts)
        for row, (start, count) in enumerate(zip(done.tolist(), seqlens, strict=True)):
            torch.testing.assert_close(logits[row, :count], expected[row, start : start + count])
        done += counts
    assert cache.lengths.tolist() == done.tolist() == [9, 9, 6]
    assert cache.length == 12 and not cache.equal_lengths
    with pytest.raises(ValueError, match=r"cache: got sequences of different lengths; expected equal"):
        cache.update(0, cache.k[0][:, :1], cache.v[0][:, :1])


@torch.no_grad()
def test_bfloat16_with_different_lengths_obeys_the_tolerance_law(config, plain_gpt):
    model = GPTLMHeadModel(dataclasses.replace(config, initializer_range=0.2), dtype=torch.bfloat16).eval()
    input_ids = random_ids(config)
    cache = make_cache(model, 4, 10)
    seqlens = torch.tensor(LENGTHS) - 1
    seqlens[3] = 1  # a cache may have as few tokens as one
    model(input_ids[:, :8], cache=cache, seqlens=seqlens)
    columns = seqlens[:, None]
    out = model(input_ids.gather(1, columns), cache=cache)[:, 0]
    weights = model.state_dict()
    double = {name: tensor.double() for name, tensor in weights.items()}
    rows = range(4), columns[:, 0]
    plain, reference = plain_gpt(config, weights, input_ids)[rows], plain_gpt(config, double, input_ids)[rows]
    last_place = torch.finfo(torch.bfloat16).eps * reference.abs().max().item()
    assert_within_reference_error(out, reference, plain, atol=last_place)


@torch.no_grad()
def test_last_logits_of_each_row(model):
    input_ids = random_ids(model.config)
    expected = model(input_ids)
    seqlens = torch.tensor(LENGTHS, dtype=torch.int32)
    last = model(input_ids, seqlens=seqlens, num_last_tokens=1)
    torch.testing.assert_close(last[:, 0], expected[range(4), seqlens.long() - 1])
    two = model(input_ids, seqlens=seqlens, num_last_tokens=2)
    torch.testing.assert_close(two[0], expected[0, 7:9])
    torch.testing.assert_close(two[3], expected[3, [0, 0]])
    for bad in (seqlens[:3], seqlens.float()):
        with pytest.raises(ValueError, match=r"seqlens: got shape .*expected shape \(4,\), int32 or int64"):
            model(input_ids, seqlens=bad)


def test_gradients_with_a_cache_are_refused(config):
    model = GPTLMHeadModel(config)
    with pytest.raises(ValueError, match=r"cache: got a cache with gradients enabled; .*torch.no_grad\(\)"):
        model(random_ids(config), cache=make_cache(model, 4, 9))


def test_repetition_penalty_ignores_padding(model):
    input_ids = random_ids(model.config)
    options = {"repetition_penalty": 5.0, "prompt_lengths": LENGTHS}
    first = generate(model, input_ids, 10, **options)[:, 9:]
    real = torch.arange(9) < torch.tensor(LENGTHS)[:, None]
    other = input_ids.where(real, random_ids(model.config))
    assert torch.equal(generate(model, other, 10, **options)[:, 9:], first)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"attention_mask": torch.ones(4, 9), "prompt_lengths": LENGTHS},
            r"prompt_lengths: got lengths and an attention_mask; expected one of both",
        ),
        ({"attention_mask": torch.ones(4, 9)}, r"attention_mask: got shape \(4, 9\), torch.float32"),
        (
            {"attention_mask": torch.ones(9, dtype=torch.bool)},
            r"attention_mask: got shape \(9,\).*expected the shape of input_ids, \(4, 9\)",
        ),
        (
            {"attention_mask": torch.tensor([[1] * 9, [1] * 9, [0] * 9, [1] * 9])},
            r"attention_mask: got no token in row 2;.*beginning-of-text",
        ),
        (
            {"attention_mask": torch.tensor([[1] * 9, [0, 1, 1, 0, 1, 1, 1, 1, 1], [1] * 9, [1] * 9])},
            r"attention_mask: got padding between tokens of row 1",
        ),
        ({"prompt_lengths": [9, 3]}, r"prompt_lengths: got shape \(2,\).*each of the 4 rows"),
        ({"prompt_lengths": [9.0] * 4}, r"prompt_lengths: got shape \(4,\), torch.float32"),
        ({"prompt_lengths": [9, 3, 0, 1]}, r"prompt_lengths: got 0 for row 2; expected between 1 and the 9"),
        ({"prompt_lengths": [9, 10, 1, 1]}, r"prompt_lengths: got 10 for row 1"),
        (
            {"prompt_lengths": [8, 1, 1, 1], "max_new_tokens": 33},
            r"input_ids: got a prompt of 8 tokens and max_new_tokens=33; expected together at most",
        ),
    ],
)
def test_bad_prompts_are_refused_before_anything_is_computed(changes, message):
    model = GPTLMHeadModel(ALIBI)
    model.register_forward_pre_hook(lambda *_: pytest.fail("computed something"))
    arguments = {"max_new_tokens": 5, **changes}
    with pytest.raises(ValueError, match=message):
        stream_tokens(model, random_ids(ALIBI), arguments.pop("max_new_tokens"), **arguments)


def test_ids_outside_the_vocabulary_are_refused_in_prompts_only():
    model = GPTLMHeadModel(ALIBI).eval()
    input_ids = random_ids(ALIBI)
    input_ids[1, 5] = 10**6
    generate(model, input_ids, 2, prompt_lengths=LENGTHS)
    with pytest.raises(ValueError, match=r"input_ids: got ids from \d+ to 1000000; expected ids in \[0,"):
        generate(model, input_ids, 2, prompt_lengths=[9, 6, 9, 9])

"""Stop strings, repetition penalty and min-p in generation."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from flash_attn_models.generation import generate, stream_tokens
from flash_attn_models.generation.choice import Choice
from flash_attn_models.generation.end_watch import EndWatch
from flash_attn_models.generation.ends import StopStrings
from flash_attn_models.generation.step import DecodingState, StepOptions, take_tokens
from flash_attn_models.gpt import GPTConfig, GPTLMHeadModel
from flash_attn_models.gpt.hugging_face import (
    config_from_hugging_face,
    from_hugging_face,
    hugging_face_layout,
)
from torch.utils._python_dispatch import TorchDispatchMode


class Letters:
    """Id i is the word ``words[i % 29]``: letters, pairs of them, and nothing."""

    words = (*"abcdefghijklmnopqrstuvwxyz", "ab", "é ", "")

    def decode(self, token_ids: list[int]) -> str:
        return "".join(self.words[token % 29] for token in token_ids)


@pytest.fixture
def model(config):
    return GPTLMHeadModel(dataclasses.replace(config, initializer_range=0.3)).eval()


def prompt(model, batch=4, seqlen=7):
    return torch.randint(model.config.vocab_size, (batch, seqlen))


def test_each_row_stops_with_the_token_that_completes_a_string(model):
    input_ids = prompt(model)
    free = generate(model, input_ids, 30)[:, 7:].tolist()
    decode = Letters().decode
    strings = [decode(free[0][6:9]), decode(free[1][14:15]), "not there"]
    strings = [string for string in strings if string]
    rows = generate(model, input_ids, 30, stop_strings=strings, tokenizer=Letters(), pad_token_id=5)[:, 7:]
    lengths = []
    for row, free_row in zip(rows.tolist(), free, strict=True):
        stops = [n for n in range(1, 31) if any(string in decode(free_row[:n]) for string in strings)]
        lengths.append(stops[0] if stops else 30)
        shown = min(lengths[-1], len(row))
        assert row[:shown] == free_row[:shown]
        assert set(row[shown:]) <= {5}
    assert rows.shape[1] == max(lengths)
    assert min(lengths) < 30


def test_strings_and_ids_end_rows_together(model):
    input_ids = prompt(model)
    free = generate(model, input_ids, 30)[:, 7:].tolist()
    end, string = free[0][5], Letters().decode(free[1][3:8])
    tokens = generate(
        model,
        input_ids,
        30,
        eos_token_id=end,
        pad_token_id=2,
        stop_strings=string,
        tokenizer=Letters().decode,
    )
    for row, free_row in zip(tokens[:, 7:].tolist(), free, strict=True):
        stop = 30
        for n in range(30, 0, -1):
            if free_row[n - 1] == end or string in Letters().decode(free_row[:n]):
                stop = n
        assert row[:stop] == free_row[: min(stop, len(row))]
        assert set(row[stop:]) <= {2}


def test_strings_of_the_prompt_stop_nothing(model):
    input_ids = prompt(model, batch=1)
    free = generate(model, input_ids, 5)
    string = Letters().decode(input_ids[0].tolist())
    assert torch.equal(generate(model, input_ids, 5, stop_strings=string, tokenizer=Letters()), free)


def test_a_string_is_found_however_its_tokens_cut_it():
    """Against a search in the whole text, with tokens of one byte."""

    def decode(token_ids):
        return bytes(token_ids).decode(errors="replace")

    text = ("x" * 100 + "é→ü" + "y" * 50).encode()
    stop = StopStrings(("zz", "→ü"), decode)
    seen: list[int] = []
    ended = [stop.ends(seen, token) for token in text]
    assert ended.index(True) == len(("x" * 100 + "é→ü").encode()) - 1
    assert len(seen) <= 5 + 16


def test_a_long_string_is_found_in_tokens_of_one_byte():
    text, string = b"before " + b"0123456789" * 5, "0123456789" * 5
    stop, seen = StopStrings((string,), lambda token_ids: bytes(token_ids).decode()), []
    assert [stop.ends(seen, token) for token in text] == [False] * (len(text) - 1) + [True]


def test_what_decoding_leaves_out_hides_no_string():
    """A tokenizer drops a space in front, and some tokens stand for nothing."""

    def decode(token_ids):
        return bytes(token for token in token_ids if token).decode().removeprefix(" ")

    text = [*b"once upon", 0, *b" a", 0, 0, *b" time"]
    for string, end in ((" a", text.index(0) + 3), ("n a t", len(text) - 3)):
        stop, seen = StopStrings((string,), decode), []
        assert [stop.ends(seen, token) for token in text].index(True) == end - 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop_strings": "a"}, r"tokenizer: got None; expected an object with decode\(ids\) -> str"),
        ({"stop_strings": "a", "tokenizer": 3}, r"tokenizer: got 3;"),
        ({"tokenizer": Letters()}, r"tokenizer: got Letters; expected to be left out without stop_strings"),
        (
            {"stop_strings": [], "tokenizer": Letters()},
            r"stop_strings: got \(\); expected one or more strings",
        ),
        ({"stop_strings": ["a", ""], "tokenizer": Letters()}, r"stop_strings: got \('a', ''\)"),
        ({"stop_strings": [1], "tokenizer": Letters()}, r"stop_strings: got \(1,\)"),
        ({"min_p": 0.5}, r"min_p: got 0.5; expected to be left out with do_sample=False"),
        ({"min_p": 0.0, "do_sample": True}, r"min_p: got 0.0; expected a factor in \(0, 1\]"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty: got 0.0; expected a positive number"),
        ({"repetition_penalty": -2.0, "do_sample": True}, r"repetition_penalty: got -2.0"),
    ],
)
def test_bad_options_are_refused_before_anything_is_computed(options, message):
    model = GPTLMHeadModel(GPTConfig(vocab_size=31, max_seqlen=20, n_layer=1, n_head=2, d_model=16))
    model.register_forward_pre_hook(lambda *_: pytest.fail("computed something"))
    with pytest.raises(ValueError, match=message):
        stream_tokens(model, prompt(model), 5, **options)


def test_repetition_penalty_and_min_p_equal_transformers(hf_model):
    fields = json.loads(hf_model.config.to_json_string(use_diff=False))
    config = config_from_hugging_face(fields)
    model = GPTLMHeadModel(config).eval()
    model.load_state_dict(
        from_hugging_face(hf_model.state_dict(), hugging_face_layout(config, fields["model_type"]))
    )
    input_ids = prompt(model)
    options = {"attention_mask": torch.ones_like(input_ids), "max_new_tokens": 30, "pad_token_id": 0}
    expected = hf_model.generate(input_ids, **options, do_sample=False, repetition_penalty=1.7)
    assert not torch.equal(expected, hf_model.generate(input_ids, **options, do_sample=False))
    assert torch.equal(generate(model, input_ids, 30, repetition_penalty=1.7), expected)
    # Only the most likely token has its own probability: drawing is then greedy.
    drawn = generate(model, input_ids, 30, do_sample=True, min_p=1.0, repetition_penalty=1.7)
    assert torch.equal(drawn, expected)


def test_the_same_tokens_for_the_same_seed(model):
    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        options = {"min_p": 0.05, "repetition_penalty": 1.2, "prompt_lengths": [7, 3, 4, 1]}
        return generate(model, input_ids, 20, do_sample=True, generator=generator, **options)

    input_ids = prompt(model)
    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


class HostReads(TorchDispatchMode):
    """Counts what makes the host wait for numbers of a device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options",
    [{}, {"do_sample": True, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "temperature": 0.7}],
    ids=["greedy", "drawn"],
)
def test_the_host_reads_only_whether_rows_have_ended(options):
    logits = torch.randn(3, 50)
    for eos_ids, reads in (((), 0), ((3, 4), 1)):
        step = StepOptions(Choice(repetition_penalty=1.3, **options), eos_ids)
        state = DecodingState(3, 50, step, "cpu")
        watch = EndWatch(state, step, None, lag=0)
        with HostReads() as host:
            take_tokens(logits, state, step)
            assert host.count == 0
            watch.note(0)
            watch.all_ended(0)
        assert host.count == reads

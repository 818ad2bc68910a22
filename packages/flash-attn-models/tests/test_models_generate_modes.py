"""Generation where modes of torch change between calls, where defaults are others, and when something fails."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from flash_attn_models.generation import generate, generate_output, make_cache, make_page_pool, stream_tokens
from flash_attn_models.gpt import GPTConfig, GPTLMHeadModel

SIZES = {"vocab_size": 31, "max_seqlen": 40, "n_layer": 2, "n_head": 2, "d_model": 16}


@pytest.fixture(params=["learned", "rotary", "alibi"])
def model(request):
    return GPTLMHeadModel(GPTConfig(**SIZES, position=request.param, initializer_range=0.4)).eval()


@pytest.fixture
def draft():
    return GPTLMHeadModel(GPTConfig(**{**SIZES, "n_layer": 1}, initializer_range=0.4)).eval()


@pytest.fixture
def prompt():
    return torch.randint(31, (2, 5))


KINDS = {
    "plain": {},
    "all": {"repetition_penalty": 1.2, "eos_token_id": 3, "prompt_lengths": [5, 3]},
    "stop": {"stop_strings": "not there", "tokenizer": str},
    "paged": {"cache": "paged", "page_size": 4},
    "lookup": {"draft": "prompt_lookup"},
}


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
def test_a_stream_may_go_on_outside_of_inference_mode(model, prompt, options):
    expected = generate(model, prompt, 8, **options)[:, 5:]
    for first, then in ((True, False), (False, True)):
        with torch.inference_mode(first):
            stream = stream_tokens(model, prompt, 8, **options)
            columns = [next(stream).clone()]
        with torch.inference_mode(then):
            columns += [column.clone() for column in stream]
        assert torch.equal(torch.stack(columns, dim=1), expected)


def test_memory_made_in_inference_mode_serves_outside(model, draft, prompt):
    expected = generate(model, prompt, 8)
    with torch.inference_mode():
        pool, cache = make_page_pool(model, 20, 4), make_cache(model, 2, 12)
        stream = stream_tokens(model, prompt, 8, draft=draft)
        next(stream)
    assert torch.equal(generate(model, prompt, 8, cache=pool), expected)
    assert len(list(stream)) == 7
    with torch.no_grad():
        model(prompt, cache=cache)
    model.train()
    model.loss(prompt[:, :-1], prompt[:, 1:]).backward()  # tables made in inference mode serve training


@pytest.mark.parametrize("kind", ["plain", "all", "stop", "paged"])
def test_the_default_device_changes_nothing(model, prompt, kind):
    """Tensors of the host are on the host, and others on the model's device. "meta" stands for any other."""
    expected = generate(model, prompt, 8, **KINDS[kind])
    with torch.device("meta"):
        assert torch.equal(generate(model, prompt, 8, **KINDS[kind]), expected)


def test_the_default_dtype_changes_nothing(model, draft, prompt):
    options = {"do_sample": True, "top_p": 0.9, "repetition_penalty": 1.2, "return_logprobs": True}

    def run(**more):
        generator = torch.Generator().manual_seed(1)
        return generate_output(model, prompt, 8, generator=generator, **options, **more)

    for more in ({}, {"draft": draft}, {"cache": "paged"}):
        expected = run(**more)
        torch.set_default_dtype(torch.float64)
        try:
            output = run(**more)
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(output.sequences, expected.sequences)
        assert output.logprobs.dtype == torch.float32
        assert torch.equal(output.logprobs, expected.logprobs)


class Boom(Exception):
    pass


@pytest.mark.parametrize("kind", ["plain", "draft", "lookup", "draft fails", "tokenizer"])
def test_a_failure_half_way_gives_everything_back(model, draft, prompt, kind):
    pool = make_page_pool(model, 40, 4)
    calls = []

    def fail_later(*_):
        calls.append(1)
        if len(calls) == 3:
            raise Boom

    options = {"draft": {"cache": pool, "draft": draft}, "lookup": {"cache": pool, "draft": "prompt_lookup"}}
    options["draft fails"] = options["draft"]
    options["tokenizer"] = {"cache": pool, "stop_strings": "a", "tokenizer": lambda ids: fail_later() or ""}
    if kind != "tokenizer":
        (draft if kind == "draft fails" else model).register_forward_pre_hook(fail_later)
    model.train(), draft.train()
    with pytest.raises(Boom):
        generate(model, prompt, 20, **options.get(kind, {"cache": pool}))
    assert pool.n_free == 40
    assert all(module.training for module in [*model.modules(), *draft.modules()])


def test_closing_a_stream_gives_its_pages_back(model, draft, prompt):
    pool = make_page_pool(model, 40, 4)
    for options in ({}, {"draft": draft}):
        stream = stream_tokens(model, prompt, 20, cache=pool, **options)
        assert pool.n_free == 40
        next(stream)
        assert pool.n_free < 40
        stream.close()
        assert pool.n_free == 40


def test_pages_are_not_lost_if_there_is_no_memory_for_the_rest(model, prompt, monkeypatch):
    from flash_attn_models.generation import decode

    pool = make_page_pool(model, 40, 4)

    def no_memory(*_):
        raise MemoryError

    monkeypatch.setattr(decode, "DecodingState", no_memory)
    with pytest.raises(MemoryError):
        generate(model, prompt, 20, cache=pool)
    assert pool.n_free == 40


@pytest.mark.parametrize("draft", ["None", "'prompt_lookup'", "model"])
def test_a_stream_that_is_open_at_the_end_of_a_program_says_nothing(draft):
    code = f"""
import torch
from flash_attn_models.generation import stream_tokens
from flash_attn_models.gpt import GPTConfig, GPTLMHeadModel

model = GPTLMHeadModel(GPTConfig(vocab_size=31, max_seqlen=40, n_layer=1, n_head=2, d_model=16))
stream = stream_tokens(model, torch.ones(1, 5, dtype=torch.int64), 20, draft={draft})
assert not next(stream).requires_grad and torch.is_grad_enabled()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")

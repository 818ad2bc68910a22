"""The sample at the end of a run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flash_attn_models.gpt import GPTConfig, GPTLMHeadModel
from flash_attn_train.configs import GenerationConfig
from flash_attn_train.sample import write_sample
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

CONTEXT, END = 16, 0


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A token for each byte, and one for the end of a text."""
    names = ["<|endoftext|>", *sorted(ByteLevel.alphabet())]
    tokenizer = Tokenizer(BPE({name: number for number, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens(names[:1])
    return tokenizer


@pytest.fixture(scope="module")
def model() -> GPTLMHeadModel:
    torch.manual_seed(0)
    shape = {"n_layer": 1, "n_head": 2, "d_model": 16, "initializer_range": 0.5}
    return GPTLMHeadModel(GPTConfig(vocab_size=257, max_seqlen=CONTEXT, **shape))


def sample(model: GPTLMHeadModel, tokenizer: Tokenizer, prompt: str, *, seed: int = 0, **options: Any) -> str:
    return write_sample(model, tokenizer, END, GenerationConfig(**options), prompt=prompt, seed=seed)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": 1.0, "top_k": None, "top_p": 0.9},
        {"max_new_tokens": 10_000},
        {},
    ],
)
def test_continues_the_prompt(model: GPTLMHeadModel, tokenizer: Tokenizer, options: dict[str, Any]) -> None:
    text = sample(model, tokenizer, "the ", **options)
    assert text.startswith("the ") and len(text) > len("the ")
    assert text == sample(model, tokenizer, "the ", **options)  # the same seed
    assert len(tokenizer.encode(text).ids) <= 3 * CONTEXT  # bytes that are no characters become longer ones


def test_length(model: GPTLMHeadModel, tokenizer: Tokenizer) -> None:
    model.train()
    short, long = (sample(model, tokenizer, "a", temperature=0.0, max_new_tokens=n) for n in (2, 10))
    assert long.startswith(short[:1]) and len(short) < len(long)
    assert model.training  # as it was


def test_other_seeds_and_temperatures_write_other_texts(model: GPTLMHeadModel, tokenizer: Tokenizer) -> None:
    assert len({sample(model, tokenizer, "the ", seed=seed) for seed in range(4)}) > 1
    assert len({sample(model, tokenizer, "the ", seed=seed, temperature=0.0) for seed in range(4)}) == 1
    assert len({sample(model, tokenizer, "the ", seed=seed, top_k=1) for seed in range(4)}) == 1


def test_of_a_long_prompt_the_end_is_used(model: GPTLMHeadModel, tokenizer: Tokenizer) -> None:
    text = sample(model, tokenizer, "the dog sees the bird. " * 50)
    assert text.startswith("e bird. ")  # half of the context


def test_empty_prompt_starts_a_text(model: GPTLMHeadModel, tokenizer: Tokenizer) -> None:
    assert sample(model, tokenizer, "")

"""Masks of transformers that need care: chunks behind a cache, windows that are in the mask alone, models that ask for
a mask and attend by themselves."""

from __future__ import annotations

import copy

import pytest
import torch
from flash_attn_models.transformers_integration import ATTENTION_NAME, packing, register_with_transformers
from flash_attn_models.transformers_integration.masks import attention_mask

transformers = pytest.importorskip("transformers")

_SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


@pytest.fixture(scope="module", autouse=True)
def registered():
    return register_with_transformers()


def pair(config):
    """The same model with eager attention and with ours."""
    torch.manual_seed(0)
    make = transformers.AutoModelForCausalLM.from_config
    eager, ours = (
        make(copy.deepcopy(config), attn_implementation=name).eval() for name in ("eager", ATTENTION_NAME)
    )
    ours.load_state_dict(eager.state_dict())
    return eager, ours


@pytest.fixture(scope="module")
def chunked():
    """Llama 4 in chunks of 4, with eager attention and with ours."""
    config = transformers.Llama4TextConfig(
        **_SIZES,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=40,
        intermediate_size_mlp=40,
        num_local_experts=2,
        attention_chunk_size=4,
        max_position_embeddings=64,
    )
    return pair(config)


@torch.no_grad()
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_chunks_behind_a_cache(chunked, compiled):
    """As many keys as a chunk has are not one chunk, if they do not begin where it does."""
    ids = torch.randint(1, 101, (2, 11))
    outputs = []
    for model in chunked:
        call = torch.compile(model, backend="eager") if compiled and model is chunked[1] else model
        cache, parts = None, []
        for start, stop in ((0, 6), (6, 7), (7, 9), (9, 10), (10, 11)):
            out = call(ids[:, start:stop], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
        outputs.append(torch.cat(parts, dim=1))
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(outputs[1], chunked[0](ids).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("cache", [None, "static"])
def test_chunks_in_generation(chunked, cache):
    eager, ours = chunked
    ids, mask = torch.randint(1, 101, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False}
    expected = eager.generate(ids, **options)
    assert torch.equal(ours.generate(ids, **options, cache_implementation=cache), expected)


MIXTURE = {"num_key_value_heads": 2, "intermediate_size": 40, "max_position_embeddings": 64}
WINDOW_IN_MASK_ALONE = {
    "phimoe": lambda: transformers.PhimoeConfig(
        **_SIZES, **MIXTURE, sliding_window=5, num_local_experts=2, num_experts_per_tok=1
    ),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **_SIZES,
        **MIXTURE,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=1,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", WINDOW_IN_MASK_ALONE)
def test_windows_that_layers_do_not_tell_of(kind):
    """Their layers leave the window to the mask."""
    eager, ours = pair(WINDOW_IN_MASK_ALONE[kind]())
    ids, mask = torch.randint(1, 101, (2, 14)), torch.ones(2, 14, dtype=torch.long)
    torch.testing.assert_close(ours(ids).logits, eager(ids).logits, atol=1e-4, rtol=1e-4)
    mask[0, :3] = 0
    real = mask.bool()
    expected, got = (model(ids, attention_mask=mask).logits[real] for model in (eager, ours))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    positions = torch.cat([torch.arange(9), torch.arange(5)])[None]
    expected, got = (
        model(ids[:1], position_ids=positions, use_cache=False).logits for model in (eager, ours)
    )
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(ours.generate(ids, **options), eager.generate(ids, **options))


@pytest.mark.parametrize("kind", ["BloomConfig", "XGLMConfig"])
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_models_that_attend_by_themselves_are_refused(kind, compiled):
    """They would take no mask for nothing to be masked, not even what comes later."""
    sizes = {"vocab_size": 101, "pad_token_id": 0}
    if kind == "BloomConfig":
        sizes |= {"hidden_size": 32, "n_layer": 1, "n_head": 4}
    else:
        sizes |= {"d_model": 32, "ffn_dim": 40, "num_layers": 1, "attention_heads": 4}
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, kind)(**sizes), attn_implementation=ATTENTION_NAME
    )
    with pytest.raises(
        ValueError,
        match=rf"attn_implementation: got 'fa_kernels' for a {kind}; expected .*Fix: use attn_implementation='eager'",
    ):
        (torch.compile(model, backend="eager") if compiled else model)(torch.randint(1, 101, (2, 5)))


def test_what_is_remembered_of_a_tensor_is_of_its_last_numbers_alone():
    """A buffer of positions that every step writes anew would keep what was found in all of them."""
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    for start in (3, 2, 4, 1):
        positions.copy_(torch.arange(5))
        positions[:, start:] -= start
        assert packing.bounds_of_restarts(positions).tolist() == [0, start, 5]
        assert packing.bounds_of_restarts(positions) is packing.bounds_of_restarts(positions)
    assert len(packing._MEMORY[positions][1]) == 1
    mask = torch.tensor([[True, True, False]])
    assert packing.real_tokens(mask) is packing.real_tokens(mask)
    assert packing.real_tokens(mask, 1).indices.tolist() == []
    assert packing.real_tokens(mask).indices.tolist() == [0, 1]


@torch.inference_mode()
def test_positions_written_anew_in_inference_mode_are_read_anew():
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    assert packing.bounds_of_restarts(positions).tolist() == [0, 3, 5]
    positions.copy_(torch.tensor([[0, 1, 0, 1, 2]]))
    assert packing.bounds_of_restarts(positions).tolist() == [0, 2, 5]


def asked(mask_function, length=6, **options):
    """What is returned for a training step on one row."""
    return attention_mask(
        1, length, length, mask_function=mask_function, allow_is_causal_skip=False, **options
    )


def table(mask_function, length=6):
    """The mask that a function is, bool (1,1,S,S)."""
    queries, keys = torch.arange(length)[:, None], torch.arange(length)[None]
    zero = torch.zeros((), dtype=torch.int64)
    return mask_function(zero, zero, queries, keys).expand(length, length)[None, None]


def test_masks_have_the_smallest_form_that_says_all():
    documents = torch.tensor([0, 0, 1, 1, 1, 2])
    image = torch.tensor([-1, -1, 7, 7, 7, -1])

    def causal(batch, head, query, key):
        return key <= query

    def packed(batch, head, query, key):
        return (key <= query) & (documents[query] == documents[key])

    def with_image(batch, head, query, key):  # its tokens see each other, in both directions
        return (key <= query) | ((image[query] == image[key]) & (image[query] >= 0))

    def packed_with_image(batch, head, query, key):
        return with_image(batch, head, query, key) & (documents[query] == documents[key])

    assert asked(causal) is None
    assert asked(packed).tolist() == [[1, 1, 2, 2, 2, 3]]
    for other in (with_image, packed_with_image):
        assert torch.equal(asked(other), table(other))
    assert asked(causal, attention_mask=torch.ones(1, 6, dtype=torch.bool)).shape == (1, 1, 6, 6)

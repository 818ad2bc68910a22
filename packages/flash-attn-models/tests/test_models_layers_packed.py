"""Packed documents: the same as each by itself, whatever the model."""

from __future__ import annotations

import pytest
import torch
from flash_attn_models.gpt import GPTConfig, GPTLMHeadModel
from flash_attn_models.layers import Block, CausalDepthwiseConv, Documents, KVCache, StochasticDepth
from flash_attn_models.layers.packed import real_tokens
from flash_attn_models.loss import cross_entropy
from flash_attn_ops.norm import LayerNorm
from torch import nn

COMMON = {
    "vocab_size": 61,
    "max_seqlen": 24,
    "n_layer": 2,
    "n_head": 4,
    "d_model": 32,
    "initializer_range": 0.3,
}
CONFIGS = {
    "learned": GPTConfig(**COMMON, position_offset=2),
    "rotary_gqa": GPTConfig(**COMMON, n_head_kv=2, position="rotary", rotary_dim=6, norm="rms_norm"),
    "interleaved_window": GPTConfig(**COMMON, position="rotary", rotary_interleaved=True, window=4),
    "alibi_sinks": GPTConfig(**COMMON, n_head_kv=1, position="alibi", sinks=True, softcap=3.0),
    "conv": GPTConfig(**COMMON, position="rotary", conv_width=3, qk_norm=True),
    "parallel": GPTConfig(**COMMON, parallel_block=True),
    "post_norm_narrow": GPTConfig(**COMMON, prenorm=False, d_embedding=20),
    "swiglu_residual_in_fp32": GPTConfig(**COMMON, activation="swiglu", residual_in_fp32=True),
}
LENGTHS = [5, 1, 0, 9, 2]


def packed(lengths=LENGTHS):
    ends = torch.tensor([0, *lengths]).cumsum(0)
    return torch.randint(61, (int(ends[-1]),)), ends.int()


def randomized(model):
    for module in model.modules():
        if isinstance(module, CausalDepthwiseConv):
            nn.init.normal_(module.weight)
    return model


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_documents_equal_separate_ones(name, given):
    model = randomized(GPTLMHeadModel(CONFIGS[name], dtype=torch.float64))
    input_ids, cu_seqlens = packed()
    logits = model(input_ids, cu_seqlens=cu_seqlens, max_seqlen=9 if given else None)
    apart = [model(document[None])[0] for document in input_ids.split(LENGTHS) if len(document)]
    torch.testing.assert_close(logits, torch.cat(apart))
    weights = torch.randn_like(logits)
    expected = torch.autograd.grad((torch.cat(apart) * weights).sum(), list(model.parameters()))
    ours = torch.autograd.grad((logits * weights).sum(), list(model.parameters()))
    for grad, want in zip(ours, expected, strict=True):
        torch.testing.assert_close(grad, want)


def test_the_loss_is_that_of_the_documents_alone():
    model = GPTLMHeadModel(CONFIGS["rotary_gqa"], dtype=torch.float64)
    input_ids, cu_seqlens = packed([7, 3, 6])
    labels = input_ids.roll(-1)
    labels[cu_seqlens[1:].long() - 1] = -100  # the next document is not what a document's last token predicts
    loss = cross_entropy(model(input_ids, cu_seqlens=cu_seqlens), labels)
    documents = input_ids.split([7, 3, 6])
    logits = torch.cat([model(document[None, :-1])[0] for document in documents])
    apart = cross_entropy(logits, torch.cat([document[1:] for document in documents]))
    torch.testing.assert_close(loss, apart)


@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_behind_the_last_document_are_padding(name):
    """Batches of a fixed number of tokens: what is behind the last document changes nothing."""
    model = randomized(GPTLMHeadModel(CONFIGS[name], dtype=torch.float64))
    input_ids, cu_seqlens = packed()
    longer = torch.cat([input_ids, torch.randint(61, (30,))])
    logits = model(longer, cu_seqlens=cu_seqlens, max_seqlen=9)
    assert logits.shape == (47, 61) and logits.isfinite().all()
    torch.testing.assert_close(logits[:17], model(input_ids, cu_seqlens=cu_seqlens))


@pytest.mark.parametrize("choice", [True, 2, "attention", "mlp"])
@pytest.mark.parametrize("name", CONFIGS)
def test_checkpointing_changes_no_gradient(name, choice):
    model = GPTLMHeadModel(CONFIGS[name], dtype=torch.float64)
    input_ids, cu_seqlens = packed()
    parameters = list(model.parameters())
    expected = torch.autograd.grad(model(input_ids, cu_seqlens=cu_seqlens).square().sum(), parameters)
    model.transformer.activation_checkpointing = choice
    grads = torch.autograd.grad(model(input_ids, cu_seqlens=cu_seqlens).square().sum(), parameters)
    for ours, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_documents_know_number_and_position_of_each_token():
    documents = Documents.of(torch.tensor([0, 0, 3, 4, 4], dtype=torch.int32), 5, 6, torch.device("cpu"))
    assert documents.numbers.tolist() == [1, 1, 1, 2, 4, 4]
    assert documents.positions.tolist() == [0, 1, 2, 0, 0, 0]


def test_a_sequence_skips_a_branch_as_a_whole_in_any_number_of_dimensions():
    for shape in ((400,), (400, 3), (400, 2, 3), (400, 2, 2, 3)):
        kept = StochasticDepth(0.25)(torch.ones(shape))
        assert kept.shape == shape
        assert (kept.flatten(1) == kept.reshape(400, -1)[:, :1]).all() if len(shape) > 1 else True
        assert set(kept.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}


def test_a_document_skips_a_branch_as_a_whole():
    documents = Documents.of(torch.arange(0, 401, 4, dtype=torch.int32), None, 400, torch.device("cpu"))
    kept = StochasticDepth(0.25)(torch.ones(400, 3), documents).unflatten(0, (100, 4))
    assert (kept == kept[:, :1, :1]).all()
    assert kept.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert 0.55 < (kept[:, 0, 0] != 0).float().mean() < 0.95

    class Mixer(nn.Linear):
        def forward(self, x, cache=None, documents=None):
            return super().forward(x)

    block = Block(LayerNorm(3), Mixer(3, 3), LayerNorm(3), nn.Linear(3, 3), drop_path=0.5)
    x = torch.randn(400, 3)
    branch, residual = block(x, documents=documents)
    for skipped in (branch, residual - x):
        by_document = (skipped.unflatten(0, (100, 4)) == 0).flatten(1)
        assert (by_document.all(1) == by_document.any(1)).all()
        assert 0.3 < by_document.all(1).float().mean() < 0.7
    block.eval()
    assert all((part != 0).all() for part in block(x, documents=documents))


CU = torch.tensor([0, 5, 8], dtype=torch.int32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cu_seqlens": CU.long()}, r"cu_seqlens: got shape \(3,\), torch.int64; expected int32"),
        ({"cu_seqlens": CU[:1]}, r"cu_seqlens: got shape \(1,\)"),
        ({"cu_seqlens": CU.to("meta")}, "cu_seqlens: got device meta; expected the model's device cpu"),
        ({"cu_seqlens": CU[:2]}, "a last of 5"),
        ({"cu_seqlens": CU + 1}, "a first value of 1"),
        ({"cu_seqlens": CU.flip(0)}, "a shortest sequence of -5 tokens"),
        (
            {"cu_seqlens": CU, "max_seqlen": 25},
            "max_seqlen: got a document of 25 tokens; expected at most the",
        ),
        ({"max_seqlen": 5}, "max_seqlen: got 5; expected None without cu_seqlens"),
        (
            {"cu_seqlens": CU, "input_ids": torch.zeros(1, 8, dtype=torch.long)},
            r"input_ids: got shape \(1, 8\)",
        ),
        ({"cu_seqlens": CU, "input_ids": torch.zeros(8)}, "input_ids: got shape .* torch.float32"),
        ({"cu_seqlens": CU, "num_last_tokens": 1}, "num_last_tokens: got 1; expected None with cu_seqlens"),
        ({"cu_seqlens": CU, "seqlens": torch.tensor([8])}, "seqlens: got a Tensor beside cu_seqlens"),
        ({"cu_seqlens": CU, "cache": KVCache(2, 1, 8, 4, 8)}, "cache: got a KVCache beside cu_seqlens"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    model = GPTLMHeadModel(CONFIGS["learned"])
    with pytest.raises(ValueError, match=message):
        model(**{"input_ids": torch.zeros(8, dtype=torch.long), **arguments})


def test_a_document_longer_than_the_context_is_refused():
    model = GPTLMHeadModel(CONFIGS["learned"])
    cu_seqlens = torch.tensor([0, 25, 30], dtype=torch.int32)
    with pytest.raises(
        ValueError, match=r"cu_seqlens: got a document of 25 tokens; expected at most the context"
    ):
        model(torch.zeros(30, dtype=torch.long), cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("rows", [[[1, 1, 0], [0, 1, 0]], [[0, 0, 0], [1, 0, 1]], [[0, 0, 0], [0, 0, 0]]])
def test_real_tokens_of_a_mask(rows):
    mask = torch.tensor(rows, dtype=torch.bool)
    real = real_tokens(mask)
    assert torch.equal(real.indices, mask.flatten().nonzero().flatten())
    assert real.cu_seqlens.diff().tolist() == mask.sum(1).tolist() and real.cu_seqlens.dtype == torch.int32
    assert real.max_seqlen == mask.sum(1).max()
    assert real_tokens(torch.ones_like(mask)) is None

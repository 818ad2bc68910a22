"""Decoders spread over several ranks against the same in one process: logits, loss, all gradients, tokens.

In float64, where what differs is the order of sums. Run by test_models_tensor_parallel_launch.py.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from flash_attn_models.generation import generate
from flash_attn_models.gpt import GPTConfig, GPTLMHeadModel
from flash_attn_models.loss import cross_entropy
from flash_attn_models.tensor_parallel import reduce_gradients, shard_state_dict
from flash_attn_models.testing import assert_within_reference_error
from whole_and_part import (
    FP64,
    SEQUENCE_PARALLEL,
    all_ranks,
    check_gradients,
    close,
    draw_ids,
    pair,
)

# One for each structure; every family's state dicts are in test_models_tensor_parallel.py.
DECODERS = [
    "gpt2",
    "tinyllama-1.1b",
    "gpt-j-6b",
    "pythia-160m",
    "opt-350m",
    "falcon-7b",
    "falcon-40b",
    "baichuan2-13b",
]
GENERATING = ["gpt2", "tinyllama-1.1b", "falcon-7b", "baichuan2-13b"]
OPTIONS: dict[str, dict[str, Any]] = {
    "sinks": {"sinks": True, "window": 4},
    "depthwise_conv": {"conv_width": 3, "position": "rotary"},
    "shared_conv_qk_norm": {"conv_width": 3, "n_head_kv": 1, "qk_norm": True, "norm": "rms_norm"},
    "head_bias": {"tie_embeddings": False, "head_bias": True, "logit_scale": 0.5},
    "tied_head_bias": {"head_bias": True, "softmax_scale_by_layer": True},
    "alibi_one_head_kv": {"position": "alibi", "n_head_kv": 1, "softcap": 5.0},
}


def check_decoder(config: GPTConfig, group: dist.ProcessGroup, sequence_parallel: bool, device: Any) -> None:
    whole, model = pair(GPTLMHeadModel, config, group, sequence_parallel, device)
    ids, labels = draw_ids(config.vocab_size, 2, 2, 12, device=device)
    expected = cross_entropy(whole(ids), labels)
    expected.backward()
    logits = model(ids)
    part = model.parallel.vocabulary(config.vocab_size).local_size(group.rank())
    assert logits.shape == (2, 12, part)
    loss = cross_entropy(logits, labels, **model.cross_entropy_options)
    loss.backward()
    close(loss, expected, "loss")
    check_gradients(whole, model, config, group)

    whole.eval(), model.eval()
    with torch.no_grad():
        close(model(ids[:, :11]), whole(ids[:, :11]), "logits")


def check_generation(config: GPTConfig, group: dist.ProcessGroup, device: Any) -> None:
    whole, model = pair(GPTLMHeadModel, config, group, False, device)
    ids = draw_ids(config.vocab_size, 2, 12, device=device)
    mask = torch.ones_like(ids).index_fill(1, torch.tensor([0, 1], device=device), 0)
    mask[1] = 1
    options: dict[str, Any] = {"max_new_tokens": 6, "attention_mask": mask}
    tokens = generate(whole, ids, **options)
    assert torch.equal(generate(model, ids, **options), tokens)
    if config.conv_width is None:
        assert torch.equal(generate(model, ids, **options, cache="paged", page_size=4), tokens)


@SEQUENCE_PARALLEL
@pytest.mark.parametrize("name", DECODERS)
def test_decoder(name, sequence_parallel, group, device, tiny_decoder) -> None:
    check_decoder(tiny_decoder(name, group.size()), group, sequence_parallel, device)


@pytest.mark.parametrize("name", GENERATING)
def test_generation(name, group, device, tiny_decoder) -> None:
    check_generation(tiny_decoder(name, group.size()), group, device)


@SEQUENCE_PARALLEL
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, sequence_parallel, group, device) -> None:
    sizes = {"vocab_size": 61, "max_seqlen": 48, "n_layer": 2, "n_head": 6, "d_model": 36, "d_inner": 42}
    check_decoder(GPTConfig(**{**sizes, **OPTIONS[name]}), group, sequence_parallel, device)


@pytest.mark.parametrize("name", ["sinks", "depthwise_conv"])
def test_generation_with_options(name, group, device) -> None:
    sizes = {"vocab_size": 61, "max_seqlen": 48, "n_layer": 2, "n_head": 6, "d_model": 36, "d_inner": 42}
    check_generation(GPTConfig(**{**sizes, **OPTIONS[name]}), group, device)


@SEQUENCE_PARALLEL
@pytest.mark.parametrize("choice", [True, "attention", "mlp"])
def test_activation_checkpointing(choice, sequence_parallel, group, device, tiny_decoder) -> None:
    config = tiny_decoder("llama-2-7b", group.size())
    config = GPTConfig(**{**config.to_dict(), "dropout": 0.2, "attn_dropout": 0.2})
    model = GPTLMHeadModel(
        config, device=device, dtype=FP64, process_group=group, sequence_parallel=sequence_parallel
    )
    again = copy.deepcopy(model)
    again.transformer.activation_checkpointing = choice
    ids = draw_ids(config.vocab_size, 2, 12, device=device)
    for one in (model, again):
        torch.manual_seed(5)
        cross_entropy(one(ids), ids, **one.cross_entropy_options).backward()
    for name, parameter in again.named_parameters():
        close(parameter.grad, dict(model.named_parameters())[name].grad, name)


def test_dropout_is_alike_where_ranks_hold_the_same(group, device) -> None:
    sizes = {"vocab_size": 61, "max_seqlen": 48, "n_layer": 1, "n_head": 2 * group.size(), "d_model": 48}
    config = GPTConfig(**sizes, dropout=0.3, attn_dropout=0.3)
    torch.manual_seed(2)
    model = GPTLMHeadModel(config, device=device, dtype=FP64, process_group=group)
    hidden = model.transformer(draw_ids(61, 2, 12, device=device))
    for other in all_ranks(hidden, group):
        assert torch.equal(other, hidden)
    # Attention of each rank's heads: weights and input alike on all ranks, and only what is dropped differs.
    mixer = model.transformer.layers[0].mixer
    with torch.no_grad():
        for parameter in (mixer.Wqkv.weight, mixer.Wqkv.bias):
            parameter.copy_(all_ranks(parameter, group)[0])
    heads = torch.randn(1, 12, 3 * 2, mixer.d_head, device=device, dtype=FP64)
    outs = all_ranks(mixer._attend(heads, None), group)
    assert not any(torch.equal(outs[0], other) for other in outs[1:])
    draws = all_ranks(torch.rand(4, device=device), group)
    assert all(torch.equal(draws[0], other) for other in draws[1:])


def test_dropout_of_cut_tokens_differs(group, device) -> None:
    sizes = {
        "vocab_size": 61,
        "max_seqlen": 48,
        "n_layer": 1,
        "n_head": 6,
        "d_model": 48,
        "position": "rotary",
    }
    config = GPTConfig(**sizes, embedding_dropout=0.5)
    torch.manual_seed(2)
    options = {"process_group": group, "sequence_parallel": True}
    model = GPTLMHeadModel(config, device=device, dtype=FP64, **options)
    with torch.no_grad():
        for layer in model.transformer.layers:
            layer.mixer.out_proj.weight.zero_()
            layer.mlp.fc2.weight.zero_()
    ids = torch.full((1, 12), 3, device=device)  # alike everywhere, but for what is dropped
    parts = all_ranks(model.transformer(ids), group)
    assert not any(torch.equal(parts[0], other) for other in parts[1:])
    draws = all_ranks(torch.rand(4, device=device), group)
    assert all(torch.equal(draws[0], other) for other in draws[1:])


@SEQUENCE_PARALLEL
@pytest.mark.parametrize("position", ["learned", "rotary", "alibi"])
def test_packed_documents(position, sequence_parallel, group, device) -> None:
    sizes = {"vocab_size": 61, "max_seqlen": 48, "n_layer": 2, "n_head": 6, "d_model": 36}
    config = GPTConfig(**sizes, position=position)
    whole, model = pair(GPTLMHeadModel, config, group, sequence_parallel, device)
    ids, labels = draw_ids(61, 2, 24, device=device)
    cu_seqlens = torch.tensor([0, 5, 5, 17, 24], device=device, dtype=torch.int32)
    cross_entropy(whole(ids, cu_seqlens=cu_seqlens), labels).backward()
    loss = cross_entropy(model(ids, cu_seqlens=cu_seqlens), labels, **model.cross_entropy_options)
    loss.backward()
    check_gradients(whole, model, config, group)


@SEQUENCE_PARALLEL
def test_bfloat16(sequence_parallel, group, device, tiny_decoder) -> None:
    config = tiny_decoder("llama-2-7b", group.size())
    whole, _ = pair(GPTLMHeadModel, config, group, sequence_parallel, device)
    state, ids = whole.state_dict(), draw_ids(config.vocab_size, 2, 12, device=device)
    half = copy.deepcopy(whole).bfloat16()
    model = GPTLMHeadModel(
        config,
        device=device,
        dtype=torch.bfloat16,
        process_group=group,
        sequence_parallel=sequence_parallel,
    )
    model.load_state_dict(shard_state_dict(state, config, group.rank(), group.size()))
    with torch.no_grad():
        whole.load_state_dict(half.state_dict())
        actual, plain = model.eval()(ids), half.eval()(ids)
        assert_within_reference_error(actual, whole.eval()(ids), plain)


@SEQUENCE_PARALLEL
def test_gradients_under_autocast(sequence_parallel, group, device) -> None:
    """In bf16, of so many tokens that products overlap communication: as near to float64 as one process is."""
    config = GPTConfig(vocab_size=512, max_seqlen=128, n_layer=2, n_head=4, d_model=64)
    torch.manual_seed(3)
    whole = GPTLMHeadModel(config, device=device)
    state = shard_state_dict(whole.state_dict(), config, group.rank(), group.size())
    model = GPTLMHeadModel(config, device=device, process_group=group, sequence_parallel=sequence_parallel)
    model.load_state_dict(state)
    exact = copy.deepcopy(whole).double()
    ids, labels = draw_ids(config.vocab_size, 2, 64, 128, device=device)
    exact.loss(ids, labels).backward()
    for one in (whole, model):
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            loss = one.loss(ids, labels)
        loss.backward()
    reduce_gradients(model)

    def gradients(one: torch.nn.Module) -> dict[str, Any]:
        of_all = {name: parameter.grad for name, parameter in one.named_parameters()}
        return of_all if one is model else shard_state_dict(of_all, config, group.rank(), group.size())

    expected, plain = gradients(exact), gradients(whole)
    for name, actual in gradients(model).items():
        errors = [(one.double() - expected[name]).norm().item() for one in (actual, plain[name])]
        size = expected[name].norm().item()
        assert errors[0] <= 2 * errors[1] + 1e-3 * size, f"{name}: {errors}, of {size}"


def test_bad_input(group, device, tiny_decoder) -> None:
    config = tiny_decoder("gpt2", group.size())
    options = {"device": device, "process_group": group, "sequence_parallel": True}
    model = GPTLMHeadModel(config, **options)
    ids = draw_ids(config.vocab_size, 2, group.size() * 2 + 1, device=device)
    with pytest.raises(ValueError, match=r"input_ids: got .* positions.*pad them to a multiple"):
        model(ids)
    with pytest.raises(ValueError, match=r"num_last_tokens: .*training mode"):
        model(ids[:, :-1], num_last_tokens=1)
    with pytest.raises(ValueError, match="sequence_parallel: got evaluation mode with gradients"):
        model.eval()(ids)
    with pytest.raises(ValueError, match=r"process_group: got .* ranks for 1 query heads"):
        GPTLMHeadModel(GPTConfig(vocab_size=61, max_seqlen=8, n_layer=1, n_head=1, d_model=8), **options)
    with pytest.raises(ValueError, match=r"process_group: got .* ranks for 1 features"):
        sizes = {"vocab_size": 61, "max_seqlen": 8, "n_layer": 1, "n_head": 4, "d_model": 8, "d_inner": 1}
        GPTLMHeadModel(GPTConfig(**sizes), **options)
    with pytest.raises(ValueError, match="num_embeddings"):
        GPTLMHeadModel(GPTConfig(vocab_size=1, max_seqlen=8, n_layer=1, n_head=4, d_model=8), **options)

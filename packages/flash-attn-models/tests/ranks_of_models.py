"""Models spread over several ranks against the same model in one process: weights, logits, loss, all gradients, tokens.

In float64, where what differs is the order of sums. Run by test_models_tensor_parallel_launch.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from flash_attn_models import load_pretrained, save_pretrained
from flash_attn_models.bert import BertForMaskedLM, BertForPreTraining, BertModel, encode
from flash_attn_models.generation import generate
from flash_attn_models.gpt import GPTConfig, GPTLMHeadModel
from flash_attn_models.layers import CrossAttention
from flash_attn_models.loss import cross_entropy
from flash_attn_models.tensor_parallel import gather_state_dict, reduce_gradients, shard_state_dict
from flash_attn_models.tensor_parallel.initial import count_parameters
from flash_attn_models.tensor_parallel.plan import TensorParallel
from flash_attn_models.testing import assert_within_reference_error
from flash_attn_models.vit import ViTForImageClassification, ViTModel
from flash_attn_ops import tensor_parallel as ops
from flash_attn_ops.rotary import RotaryEmbedding
from torch import Tensor, nn

FP64 = torch.float64
SEQUENCE_PARALLEL = pytest.mark.parametrize(
    "sequence_parallel", [False, True], ids=["replicated", "sequence_parallel"]
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


def close(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """Equal but for the order of some hundred sums."""
    bound = 4096 * torch.finfo(FP64).eps * max(1.0, expected.abs().max().item())
    error = (actual - expected).abs().max().item() if actual.numel() else 0.0
    assert actual.shape == expected.shape and error <= bound, f"{what}: {error}"


def with_other_weights(model: nn.Module) -> nn.Module:
    """Norms, biases and sinks too, so that wrong parts show."""
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, dtype=FP64).to(parameter), alpha=0.2)
    return model


def pair(
    build: Callable[..., nn.Module],
    config: Any,
    group: dist.ProcessGroup,
    sequence_parallel: bool,
    device: Any,
) -> tuple[nn.Module, nn.Module]:
    """The model of one process and this rank's, with the same weights."""
    factory = {"device": device, "dtype": FP64}
    torch.manual_seed(3)
    whole, next_draw = build(config, **factory), torch.rand(3)
    torch.manual_seed(3)
    model = build(config, **factory, process_group=group, sequence_parallel=sequence_parallel)
    assert torch.equal(torch.rand(3), next_draw)
    for name, expected in shard_state_dict(whole.state_dict(), config, group.rank(), group.size()).items():
        assert torch.equal(model.state_dict()[name], expected), f"{name} starts differently"
    with_other_weights(whole)
    model.load_state_dict(shard_state_dict(whole.state_dict(), config, group.rank(), group.size()))
    assert count_parameters(model) == count_parameters(whole)
    return whole.train(), model.train()


def check_gradients(whole: nn.Module, model: nn.Module, config: Any, group: dist.ProcessGroup) -> None:
    """After backward of both."""
    reduce_gradients(model)
    gradients = {name: parameter.grad for name, parameter in whole.named_parameters()}
    expected = shard_state_dict(gradients, config, group.rank(), group.size())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        close(parameter.grad, expected[name], name)


def draw_ids(vocab_size: int, *shape: int, device: Any) -> Tensor:
    torch.manual_seed(7)
    return torch.randint(1, vocab_size, shape, device=device)


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


def all_ranks(x: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    parts = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(parts, x.detach().contiguous(), group=group)
    return parts


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
    q, k, v = torch.randn(3, 1, 12, 2, mixer.d_head, device=device, dtype=FP64)
    outs = all_ranks(mixer._attend(q, k, v, None), group)
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


def bert_batch(device: Any) -> dict[str, Tensor]:
    ids = draw_ids(53, 3, 13, device=device)
    mask = torch.arange(13, device=device) < torch.tensor([[13], [4], [9]], device=device)
    types = (torch.arange(13, device=device) > 5).long().expand(3, -1)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


@SEQUENCE_PARALLEL
@pytest.mark.parametrize("n_labels", [1, 7])
def test_bert_pretraining(n_labels, sequence_parallel, group, device, tiny_bert) -> None:
    config = tiny_bert()
    whole, model = pair(BertForPreTraining, config, group, sequence_parallel, device)
    batch = bert_batch(device)
    labels = torch.full((3, 13), -100, device=device)
    labels.view(-1)[torch.arange(n_labels, device=device) * 5] = 17
    targets = {"labels": labels, "next_sentence_labels": torch.tensor([0, 1, 1], device=device)}
    expected, actual = whole(**batch, **targets).loss, model(**batch, **targets).loss
    close(actual, expected, "loss")
    expected.backward()
    actual.backward()
    check_gradients(whole, model, config, group)


@SEQUENCE_PARALLEL
def test_bert_masked_lm(sequence_parallel, group, device, tiny_bert) -> None:
    config = tiny_bert(activation="relu")
    whole, model = pair(BertForMaskedLM, config, group, sequence_parallel, device)
    batch = bert_batch(device)
    part = model.parallel.vocabulary(53)
    expected, logits = whole(**batch).logits, model(**batch).logits
    close(logits, part.shard(expected, group.rank(), -1), "logits in training")
    weights = torch.randn(expected.shape, device=device, dtype=FP64)
    (expected * weights).sum().backward()
    (logits * part.shard(weights, group.rank(), -1)).sum().backward()
    check_gradients(whole, model, config, group)
    packed = {"input_ids": draw_ids(53, 11, device=device)}
    packed["cu_seqlens"] = torch.tensor([0, 4, 11], device=device, dtype=torch.int32)
    marks = torch.zeros_like(packed["input_ids"], dtype=torch.bool).index_fill(
        0, packed["input_ids"][:3] % 11, 1
    )
    marked = model(**packed, masked_tokens_mask=marks).logits
    close(marked, part.shard(whole(**packed, masked_tokens_mask=marks).logits, group.rank(), -1))
    whole.eval(), model.eval()
    with torch.no_grad():
        for options in ({}, {"padding_free": False}, {"masked_tokens_mask": batch["input_ids"] % 3 == 0}):
            actual, expected = model(**batch, **options).logits, whole(**batch, **options).logits
            if options.get("padding_free") is False:  # others mean nothing
                actual, expected = actual[batch["attention_mask"]], expected[batch["attention_mask"]]
            close(actual, expected, str(options))
        close(encode(model, **batch), encode(whole, **batch))


def test_bert_without_heads(group, device, tiny_bert) -> None:
    config = tiny_bert()
    whole, model = pair(BertModel, config, group, True, device)
    ids = draw_ids(53, 2, 7, device=device)  # no mask: taken as packed tokens all the same
    weights = torch.randn(2, 7, 40, device=device, dtype=FP64)
    for one in (whole, model):
        hidden, pooled = one(ids)
        ((hidden * weights).sum() + pooled.sum()).backward()
    check_gradients(whole, model, config, group)
    with pytest.raises(ValueError, match="padding_free: got a bool in training mode"):
        model(ids, padding_free=False)


@SEQUENCE_PARALLEL
@pytest.mark.parametrize("changes", [{}, {"pooling": "avg"}, {"pooling": "avg", "norm_after_pooling": False}])
def test_vit(changes, sequence_parallel, group, device, tiny_vit) -> None:
    config = tiny_vit(**changes, qkv_bias=not changes)
    whole, model = pair(ViTForImageClassification, config, group, sequence_parallel, device)
    torch.manual_seed(4)
    images = torch.randn(group.size() * 2, 3, 12, 12, device=device, dtype=FP64)
    labels = torch.arange(len(images), device=device) % 7
    for one in (whole, model):
        one(images, labels).loss.backward()
    check_gradients(whole, model, config, group)
    whole.eval(), model.eval()
    with torch.no_grad():
        close(model(images[:1]).logits, whole(images[:1]).logits, "logits")
        close(model.vit(images[:1]).hidden, whole.vit(images[:1]).hidden, "hidden")
    dropping = ViTModel(
        tiny_vit(drop_path=0.3, dropout=0.2),
        device=device,
        dtype=FP64,
        process_group=group,
        sequence_parallel=sequence_parallel,
    )
    features = dropping.features(images)
    features.sum().backward()
    for other in all_ranks(features, group):
        assert torch.equal(other, features)


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


def test_gather_state_dict(group, device, tiny_decoder) -> None:
    config = tiny_decoder("opt-350m", group.size())
    whole, model = pair(GPTLMHeadModel, config, group, False, device)
    gathered = gather_state_dict(model)
    if group.rank() > 0:
        assert gathered is None
        return
    assert gathered is not None and gathered.keys() == whole.state_dict().keys()
    for name, expected in whole.state_dict().items():
        assert torch.equal(gathered[name], expected.cpu()), name


@pytest.mark.parametrize("kind", ["gpt", "bert", "masked_lm", "vit"])
def test_files(kind, group, device, shared_folder, tiny_decoder, tiny_bert, tiny_vit) -> None:
    kinds: dict[str, tuple[type[nn.Module], Any]] = {
        "gpt": (GPTLMHeadModel, tiny_decoder("tinyllama-1.1b", group.size())),
        "bert": (BertForPreTraining, tiny_bert()),
        "masked_lm": (BertForMaskedLM, tiny_bert()),
        "vit": (ViTForImageClassification, tiny_vit()),
    }
    build, config = kinds[kind]
    whole, model = pair(build, config, group, False, device)
    save_pretrained(model, shared_folder)
    with pytest.raises(ValueError, match="a folder that is empty"):
        save_pretrained(model, shared_folder)
    loaded = load_pretrained(shared_folder, device)
    assert type(loaded) is build
    for name, expected in whole.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], expected), name
    parallel = load_pretrained(shared_folder, device, process_group=group, sequence_parallel=True)
    assert not parallel.training and parallel.parallel.sequence_parallel
    assert parallel.state_dict().keys() == model.state_dict().keys()
    for name, expected in model.state_dict().items():
        assert torch.equal(parallel.state_dict()[name], expected), name


def own_rows(x: Tensor, group: dist.ProcessGroup, cut: bool) -> Tensor:
    return x.chunk(group.size())[group.rank()] if cut else x


def cross_attention_pair(
    group: dist.ProcessGroup, sequence_parallel: bool, device: Any, **options: Any
) -> tuple[CrossAttention, CrossAttention]:
    """The layer of one process, and this rank's with the same weights."""
    if options.pop("rotary", False):
        options["rotary"] = RotaryEmbedding(6, device=device)
    options |= {"d_context": 20, "d_head": 6, "device": device, "dtype": FP64}
    whole = CrossAttention(24, 12, **options)
    layer = CrossAttention(24, 12, **options, parallel=TensorParallel.of(group, sequence_parallel))
    with_other_weights(whole)
    layer.load_state_dict(ops.shard_state_dict(layer, whole.state_dict(), group.rank()))
    return whole.train(), layer.train()


CROSS_ATTENTION: dict[str, dict[str, Any]] = {
    "all_heads": {"n_head_kv": 12, "causal": True, "rotary": True},
    "grouped": {"sinks": True, "softcap": 5.0},
    "one_head_kv": {"n_head_kv": 1, "sinks": True, "qkv_bias": False, "rotary": True},
}


@SEQUENCE_PARALLEL
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", CROSS_ATTENTION)
def test_cross_attention(name, packed, sequence_parallel, group, device) -> None:
    # On two and three ranks some have more heads; on four, two share each.
    options = {"n_head_kv": {4: 2}.get(group.size(), 3), **CROSS_ATTENTION[name]}
    whole, layer = cross_attention_pair(group, sequence_parallel, device, **options)
    torch.manual_seed(7)
    if packed:
        x, context = torch.randn(12, 24), torch.randn(9, 20)
        lengths = {"cu_seqlens": [0, 5, 12], "cu_seqlens_context": [0, 2, 9]}
        where: dict[str, Any] = {
            name: torch.tensor(values, dtype=torch.int32, device=device) for name, values in lengths.items()
        }
        where |= {"max_seqlen": 7, "max_seqlen_context": 7}
    else:
        x, context = torch.randn(12, 2, 24), torch.randn(2, 7, 20)
        where = {"key_padding_mask": torch.arange(7, device=device) < torch.tensor([[7], [4]], device=device)}
    x, context = (t.to(device, FP64).requires_grad_() for t in (x, context))
    # In one process the batch is first; over ranks that share the tokens, positions are.
    swapped = not packed
    expected = whole(x.transpose(0, 1) if swapped else x, context, **where)
    expected = expected.transpose(0, 1) if swapped else expected
    weights = torch.randn(expected.shape, device=device, dtype=FP64)
    wanted = torch.autograd.grad((expected * weights).sum(), [x, context], retain_graph=True)
    (expected * weights).sum().backward()

    own = own_rows(x.detach(), group, sequence_parallel).requires_grad_()
    same = context.detach().requires_grad_()
    swapped = swapped and not sequence_parallel
    out = layer(own.transpose(0, 1) if swapped else own, same, **where)
    out = out.transpose(0, 1) if swapped else out
    close(out, own_rows(expected, group, sequence_parallel), "output")
    (out * own_rows(weights, group, sequence_parallel)).sum().backward()
    close(own.grad, own_rows(wanted[0], group, sequence_parallel), "gradient of x")
    close(same.grad, wanted[1], "gradient of the context")
    reduce_gradients(layer)
    gradients = {name: parameter.grad for name, parameter in whole.named_parameters()}
    for name, gradient in ops.shard_state_dict(layer, gradients, group.rank()).items():
        close(layer.get_parameter(name).grad, gradient, name)
    gathered = gather_state_dict(layer)
    if group.rank() == 0:
        assert gathered is not None and gathered.keys() == whole.state_dict().keys()
        for name, tensor in whole.state_dict().items():
            assert torch.equal(gathered[name], tensor.cpu()), name
    if "causal" not in options and not packed:  # as in generation
        whole.eval(), layer.eval()
        with torch.no_grad():
            projected, expected = layer.project(context, **where), whole(x.transpose(0, 1), context, **where)
            close(layer(x.transpose(0, 1), projected), expected, "with a projected context")


def test_dropout_of_cross_attention_differs(group, device) -> None:
    _, layer = cross_attention_pair(group, False, device, n_head_kv=12, dropout=0.5)
    with torch.no_grad():
        for parameter in (layer.Wq.weight, layer.Wq.bias, layer.Wkv.weight, layer.Wkv.bias):
            parameter.copy_(torch.arange(parameter.numel()).view(parameter.shape) % 7)
        layer.out_proj.weight.copy_(torch.eye(24, layer.out_proj.weight.shape[1]))
    parts: list[Tensor] = []
    layer.out_proj.register_forward_pre_hook(lambda module, args: parts.append(args[0]))
    torch.manual_seed(5)
    x = torch.randn(2, 6, 24, dtype=FP64, device=device)
    layer(x, torch.ones(2, 5, 20, dtype=FP64, device=device))
    if group.size() == 2:  # heads are as many on both
        outs = all_ranks(parts[0], group)
        assert not torch.equal(outs[0], outs[1])


def test_bad_input(group, device, tiny_decoder, tiny_vit) -> None:
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
    vit = ViTModel(tiny_vit(), **options)
    with pytest.raises(ValueError, match=r"images: got .*a multiple of"):
        vit(torch.randn(group.size() + 1, 3, 12, 12, device=device))

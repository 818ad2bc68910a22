"""BERT: outputs, losses and gradients are transformers'; padded, padding-free and packed input agree."""

from __future__ import annotations

import json

import pytest
import torch
from flash_attn_models.bert import BertConfig, BertForMaskedLM, BertForPreTraining, BertModel
from flash_attn_models.bert.hugging_face import (
    Form,
    config_from_hugging_face,
    from_hugging_face,
    hugging_face_layout,
    to_hugging_face,
)
from flash_attn_models.testing import assert_within_reference_error

# Odd vocabularies and widths, kinds of segments, activations, no padding token, one layer.
CONFIGS = {
    "plain": {},
    "odd_vocab_types": {"vocab_size": 257, "type_vocab_size": 5, "num_attention_heads": 6},
    "gelu_new_wide": {"hidden_act": "gelu_new", "intermediate_size": 200, "pad_token_id": 7},
    "relu_one_layer": {"hidden_act": "relu", "num_hidden_layers": 1, "layer_norm_eps": 1e-3},
    "silu_no_pad": {"hidden_act": "silu", "pad_token_id": None, "num_attention_heads": 1},
}
CLASSES = ["BertModel", "BertForMaskedLM", "BertForPreTraining"]


def make_hugging_face(architecture, changes):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 131, "max_position_embeddings": 40, "hidden_size": 48, "intermediate_size": 88}
    depth = {"num_hidden_layers": 3, "num_attention_heads": 4, "initializer_range": 0.3}
    config = transformers.BertConfig(**{**sizes, **depth, **changes}, attn_implementation="eager")
    model = getattr(transformers, architecture)(config)
    with torch.no_grad():  # norms and biases too, so that swapped or lost ones show
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


def convert(hf_model):
    """Our model with the weights of a transformers one, and the layout that relates the two."""
    config = config_from_hugging_face(json.loads(hf_model.config.to_json_string(use_diff=False)))
    form = Form.of_names(list(hf_model.state_dict()))
    layout = hugging_face_layout(config, form)
    model = form.build(config).eval()
    assert type(model).__name__ == type(hf_model).__name__
    model.load_state_dict(from_hugging_face(hf_model.state_dict(), layout))
    return model, layout


def example(vocab_size=131, types=2):
    """Ids, mask, token types (6,19): full, padded right, in the middle, left, all padding, one token."""
    mask = torch.ones(6, 19, dtype=torch.int64)
    mask[1, 12:] = 0
    mask[2, 4:9] = 0
    mask[3, :5] = 0
    mask[4] = 0
    mask[5, 1:] = 0
    return torch.randint(vocab_size, (6, 19)), mask, torch.randint(types, (6, 19))


def outputs(result):
    """The tensors of a model's result, ours or transformers'."""
    if hasattr(result, "hidden"):
        return [tensor for tensor in (result.hidden, result.pooled) if tensor is not None]
    if hasattr(result, "last_hidden_state"):
        return [result.last_hidden_state, result.pooler_output]
    names = ("logits", "prediction_logits", "seq_relationship_logits")
    return [getattr(result, name) for name in names if getattr(result, name, None) is not None]


def compared(tensors, mask):
    """What both sides define: real tokens, and what is pooled of rows that begin with a real token."""
    return [tensor[mask.bool() if tensor.ndim == 3 else mask[:, 0].bool()] for tensor in tensors]


def gradients(model, tensors, directions):
    model.zero_grad()
    sum((tensor * direction).mean() for tensor, direction in zip(tensors, directions, strict=True)).backward()
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }


def assert_gradients_equal(ours, theirs, layout):
    ours = to_hugging_face(ours, layout)
    assert ours.keys() == theirs.keys()
    # A key's bias changes no softmax: its gradient is 0, and on both sides rounding errors.
    scale = max(grad.abs().max() for grad in theirs.values())
    for name, grad in theirs.items():
        assert (ours[name] - grad).abs().max() < 1e-4 * grad.abs().max() + 1e-6 * scale, name


@pytest.mark.parametrize("padding_free", [None, False])
@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("architecture", CLASSES)
def test_float32_outputs_and_gradients_equal_transformers(architecture, changes, padding_free):
    hf_model = make_hugging_face(architecture, changes)
    model, layout = convert(hf_model)
    ids, mask, types = example(model.config.vocab_size, model.config.n_token_types)
    ours = compared(outputs(model(ids, mask, types, padding_free=padding_free)), mask)
    result = hf_model(ids, attention_mask=mask, token_type_ids=types)
    theirs = compared(outputs(result), mask)
    assert theirs[0].std() > 0.5  # large enough for 1e-4 to mean something
    for actual, expected in zip(ours, theirs, strict=True):
        assert (actual - expected).abs().max() < 1e-4
    directions = [torch.randn_like(tensor) for tensor in theirs]
    assert_gradients_equal(
        gradients(model, ours, directions), gradients(hf_model, theirs, directions), layout
    )


@pytest.mark.parametrize("architecture", CLASSES)
def test_without_mask_and_types_outputs_equal_transformers(architecture):
    hf_model = make_hugging_face(architecture, {})
    model, _ = convert(hf_model)
    ids = torch.randint(131, (2, 40))
    expected = outputs(hf_model(ids))
    for options in ({}, {"padding_free": True}, {"attention_mask": torch.ones_like(ids)}):
        for actual, theirs in zip(outputs(model(ids, **options)), expected, strict=True):
            assert (actual - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("architecture", CLASSES)
def test_padded_and_padding_free_agree(architecture):
    model, _ = convert(make_hugging_face(architecture, {}))
    ids, mask, types = example()
    free, padded = (outputs(model(ids, mask.bool(), types, padding_free=way)) for way in (True, False))
    directions = []
    for a, b in zip(free, padded, strict=True):
        if a.ndim == 3:
            assert a[~mask.bool()].eq(0).all()  # what was taken out comes back as zeros
            b = b.masked_fill(~mask.bool()[..., None], 0.0)
        assert (a - b).abs().max() < 2e-5
        directions.append(torch.randn_like(a) * (mask[..., None] if a.ndim == 3 else 1))
    grads_free = gradients(model, free, directions)
    for name, grad in gradients(model, padded, directions).items():
        assert (grads_free[name] - grad).abs().max() < 1e-4 * grad.abs().max() + 1e-6, name


def pack(ids, mask):
    """The real tokens of a padded batch, and cu_seqlens."""
    cu_seqlens = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).int()
    return ids[mask.bool()], cu_seqlens


def right_padded(vocab_size=131, types=2):
    """Lengths 11, 0, 19, 1, 0: also empty sequences, the last one among them."""
    mask = (torch.arange(19) < torch.tensor([[11], [0], [19], [1], [0]])).long()
    return torch.randint(vocab_size, (5, 19)), mask, torch.randint(types, (5, 19))


@pytest.mark.parametrize("max_seqlen", [None, 19, 40])
@pytest.mark.parametrize("architecture", CLASSES)
def test_packed_input_equals_padded(architecture, max_seqlen):
    model, _ = convert(make_hugging_face(architecture, {}))
    ids, mask, types = right_padded()
    packed_ids, cu_seqlens = pack(ids, mask)
    packed_types = types[mask.bool()].int()
    packed = outputs(
        model(packed_ids, token_type_ids=packed_types, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
    )
    padded = outputs(model(ids, mask, types))
    assert packed[0].shape == (31, padded[0].shape[-1])
    assert (packed[0] - padded[0][mask.bool()]).abs().max() < 2e-5
    for a, b in zip(packed[1:], padded[1:], strict=True):
        assert (a - b).abs().max() < 2e-5


def test_a_batch_of_padding_only():
    model, _ = convert(make_hugging_face("BertForPreTraining", {}))
    ids, mask = torch.randint(131, (2, 7)), torch.zeros(2, 7, dtype=torch.long)
    free, padded = model(ids, mask), model(ids, mask, padding_free=False)
    assert free.logits.eq(0).all() and free.logits.shape == (2, 7, 131)
    torch.testing.assert_close(free.seq_relationship_logits, padded.seq_relationship_logits)
    (free.logits.sum() + free.seq_relationship_logits.sum()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("padding_free", [True, False])
def test_padding_is_never_read(padding_free):
    model, _ = convert(make_hugging_face("BertModel", {"pad_token_id": 7}))
    ids, mask, types = example()
    ids = ids.masked_fill(ids == 7, 8).masked_fill(mask == 0, 7)
    expected = compared(model(ids, mask, types, padding_free=padding_free), mask)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[7] = torch.nan
    for a, b in zip(
        compared(model(ids, mask, types, padding_free=padding_free), mask), expected, strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("form", ["no mask", "mask", "packed"])
@pytest.mark.parametrize("architecture", CLASSES[1:])
def test_masked_subset_equals_full(architecture, form):
    model, _ = convert(make_hugging_face(architecture, {}))
    ids, mask, types = right_padded()
    chosen = torch.rand(ids.shape) < 0.3
    where = {"attention_mask": mask, "token_type_ids": types}
    counted = chosen & mask.bool()
    if form == "no mask":
        where, counted = {"token_type_ids": types}, chosen
    if form == "packed":
        chosen = counted = chosen[mask.bool()]
        ids, cu_seqlens = pack(ids, mask)
        where = {"token_type_ids": types[mask.bool()], "cu_seqlens": cu_seqlens}
    full = outputs(model(ids, **where))
    full[0] = full[0][counted]
    subset = outputs(model(ids, **where, masked_tokens_mask=chosen))
    directions = [torch.randn_like(tensor) for tensor in full]
    for a, b in zip(subset, full, strict=True):
        assert a.shape == b.shape and a.numel() > 0
        assert (a - b).abs().max() < 2e-5
    grads = gradients(model, subset, directions)
    for name, grad in gradients(model, full, directions).items():
        assert (grads[name] - grad).abs().max() < 1e-4 * grad.abs().max() + 1e-6, name


def test_the_last_layer_computes_only_what_is_masked():
    model, _ = convert(make_hugging_face("BertForMaskedLM", {}))
    seen = []
    model.bert.layers[-1].mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[0]))
    model.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[0]))
    chosen = torch.zeros(2, 9, dtype=torch.bool)
    chosen[0, 4] = chosen[1, 2] = chosen[1, 3] = True
    model(torch.randint(131, (2, 9)), masked_tokens_mask=chosen)
    assert seen == [3, 3]


@pytest.mark.parametrize("architecture", CLASSES[1:])
def test_loss_and_its_gradients_equal_transformers(architecture):
    hf_model = make_hugging_face(architecture, {"vocab_size": 129})
    model, layout = convert(hf_model)
    ids, mask, types = example(129)
    ids, mask, types = ids[:3], mask[:3], types[:3]
    labels = torch.where((torch.rand(ids.shape) < 0.4) & mask.bool(), torch.randint(129, ids.shape), -100)
    ours, theirs = {"labels": labels}, {"labels": labels}
    if architecture == "BertForPreTraining":
        sentence = torch.tensor([0, 1, 1])
        ours["next_sentence_labels"] = theirs["next_sentence_label"] = sentence
    result = model(ids, mask, types, **ours)
    assert result.logits is None
    expected = hf_model(ids, attention_mask=mask, token_type_ids=types, **theirs).loss
    assert (result.loss - expected).abs() < 1e-4
    one = torch.ones(())
    assert_gradients_equal(
        gradients(model, [result.loss], [one]), gradients(hf_model, [expected], [one]), layout
    )


def test_each_kind_of_labels_counts_for_itself():
    model, _ = convert(make_hugging_face("BertForPreTraining", {}))
    ids, sentence = torch.randint(131, (3, 8)), torch.tensor([0, 1, -100])
    labels = torch.where(torch.rand(ids.shape) < 0.5, ids, -100)
    words, sentences = model(ids, labels=labels), model(ids, next_sentence_labels=sentence)
    assert words.logits is None and sentences.logits.shape == (3, 8, 131)
    torch.testing.assert_close(
        model(ids, labels=labels, next_sentence_labels=sentence).loss, words.loss + sentences.loss
    )
    assert model(ids).loss is None
    # A label at padding does not count.
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    torch.testing.assert_close(
        model(ids, mask, labels=labels).loss,
        model(ids, mask, labels=labels.masked_fill(mask == 0, -100)).loss,
    )


@pytest.mark.parametrize("architecture", CLASSES[1:])
def test_nothing_masked(architecture):
    model, _ = convert(make_hugging_face(architecture, {}))
    ids = torch.randint(131, (3, 8))
    assert model(ids, masked_tokens_mask=torch.zeros_like(ids, dtype=torch.bool)).logits.shape == (0, 131)
    assert model(ids, labels=torch.full_like(ids, -100)).loss.isnan()  # the mean over nothing, as torch's


@pytest.mark.parametrize("padding_free", [True, False])
@pytest.mark.parametrize("architecture", CLASSES)
def test_bfloat16_is_as_close_as_transformers(architecture, padding_free):
    hf_model = make_hugging_face(architecture, {"hidden_size": 96, "initializer_range": 0.1})
    model, layout = convert(hf_model)
    ids, mask, types = example()

    def run(a_model, *inputs, **options):
        tensors = compared(outputs(a_model(*inputs, **options)), mask)
        generator = torch.Generator().manual_seed(1)
        directions = [torch.randn(tensor.shape, generator=generator) for tensor in tensors]
        return tensors, gradients(a_model, tensors, [d.to(tensors[0].dtype) for d in directions])

    theirs = {"attention_mask": mask, "token_type_ids": types}
    actual, actual_grads = run(model.bfloat16(), ids, mask, types, padding_free=padding_free)
    plain, plain_grads = run(hf_model.bfloat16(), ids, **theirs)
    reference, reference_grads = run(hf_model.double(), ids, **theirs)
    for tensors in zip(actual, reference, plain, strict=True):
        assert tensors[0].dtype == torch.bfloat16
        assert_within_reference_error(*tensors)
    actual_grads = to_hugging_face(actual_grads, layout)
    for name, grad in reference_grads.items():
        assert_within_reference_error(actual_grads[name], grad, plain_grads[name], factor=3.0, name=name)


SMALL = {"vocab_size": 101, "max_seqlen": 32, "n_layer": 2, "n_head": 2, "d_model": 32}


def test_autocast_and_activation_checkpointing():
    model = BertForPreTraining(BertConfig(**SMALL, initializer_range=0.2, dropout=0.0, attn_dropout=0.0))
    ids = torch.randint(101, (3, 20))
    mask = (torch.arange(20) < torch.tensor([[20], [13], [6]])).long()
    labels = {"labels": torch.where(torch.rand(ids.shape) < 0.3, ids, -100)}
    labels["next_sentence_labels"] = torch.tensor([1, 0, 1])
    expected = model(ids, mask, **labels).loss
    expected.backward()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(ids, mask).logits.dtype == torch.bfloat16
        loss = model(ids, mask, **labels).loss
    assert loss.dtype == torch.float32
    assert (loss - expected).abs() < 0.05 * expected
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.bert.activation_checkpointing = True
    model(ids, mask, **labels).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name], msg=name)


def test_the_padded_way_compiles_to_one_graph():
    model = BertForPreTraining(BertConfig(**SMALL)).eval()
    ids, mask, types = right_padded(101)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    actual = compiled(ids, mask, types, padding_free=False)
    expected = model(ids, mask, types, padding_free=False)
    torch.testing.assert_close(actual.logits, expected.logits)
    torch.testing.assert_close(actual.seq_relationship_logits, expected.seq_relationship_logits)


@pytest.mark.parametrize("field", ["dropout", "attn_dropout"])
@pytest.mark.parametrize("way", ["padded", "padding free", "subset"])
def test_dropout_acts_in_training_and_repeats_with_the_seed(field, way):
    rates = {"dropout": 0.0, "attn_dropout": 0.0, field: 0.3}
    model = BertForMaskedLM(BertConfig(**{**SMALL, "n_layer": 1}, **rates))
    options = {"padding_free": way == "padding free"}
    if way == "subset":
        options = {"masked_tokens_mask": torch.ones(2, 20, dtype=torch.bool)}
    ids = torch.randint(101, (2, 20))

    def run(seed):
        torch.manual_seed(seed)
        return model(ids, **options).logits

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    model.eval()
    assert torch.equal(run(1), run(2))


def test_dropout_keeps_the_share_and_the_places_of_transformers():
    rate = 0.25
    model = BertModel(BertConfig(**SMALL, dropout=rate, attn_dropout=0.0))
    ids = torch.randint(101, (8, 32))
    dropped = model.embeddings(ids, torch.arange(32))
    kept = model.embeddings.eval()(ids, torch.arange(32))
    is_zero = dropped == 0
    assert abs(is_zero.float().mean() - rate) < 0.03
    torch.testing.assert_close(dropped[~is_zero], kept[~is_zero] / (1 - rate))
    assert all(layer.norm1.dropout_p == rate == layer.norm2.dropout_p for layer in model.layers)
    # Without a branch, what the norm gets is the residual, which is never dropped.
    layer = model.layers[0]
    with torch.no_grad():
        for projection in (layer.mixer.out_proj, layer.mlp.fc2):
            projection.weight.zero_()
    x = torch.randn(4, 32)
    torch.testing.assert_close(layer(x[None])[0], layer.norm2.eval()(layer.norm1.eval()(x)))


def test_initial_weights():
    config = BertConfig.bert("mini", pad_token_id=3, initializer_range=0.05)
    model = BertForPreTraining(config)
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            assert parameter.eq(1).all(), name
        elif parameter.ndim == 1:
            assert parameter.eq(0).all(), name
        else:
            assert abs(parameter.std() - 0.05) < 0.006, name
    words = model.bert.embeddings.word_embeddings.weight
    assert words[3].eq(0).all() and not words[2].eq(0).any()


def test_sizes():
    def count(size, **options):
        return BertModel(BertConfig.bert(size), device="meta", **options).num_parameters()

    assert (count("base"), count("large")) == (109_482_240, 335_141_888)  # of the published checkpoints
    assert (count("tiny"), count("mini"), count("small")) == (4_385_920, 11_170_560, 28_763_648)
    model = BertModel(BertConfig(**SMALL), with_pooler=False)
    assert model.pooler is None and model(torch.zeros(1, 2, dtype=torch.long)).pooled is None
    tables = sum(p.numel() for name, p in model.named_parameters() if "embeddings.weight" in name)
    assert model.num_parameters(embeddings=False) == model.num_parameters() - tables


IDS = torch.zeros(2, 5, dtype=torch.long)
MASK = torch.ones(2, 5, dtype=torch.long)
PACKED = torch.zeros(10, dtype=torch.long)
CU = torch.tensor([0, 4, 10], dtype=torch.int32)


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ((PACKED,), {}, r"input_ids: got shape \(10,\), torch.int64; expected .*\(batch, seqlen\)"),
        ((IDS.float(),), {}, r"input_ids: got shape \(2, 5\), torch.float32"),
        ((IDS[:, :0],), {}, r"input_ids: got shape \(2, 0\); expected at least one token"),
        ((IDS.repeat(1, 9),), {}, r"input_ids: got a sequence of 45 tokens; expected at most max_seqlen=32"),
        ((IDS.to("meta"),), {}, r"input_ids: got device meta; expected the model's device cpu"),
        ((IDS, MASK[:, :4]), {}, r"attention_mask: got shape \(2, 4\); expected the shape of input_ids"),
        ((IDS, MASK.float()), {}, r"attention_mask: got torch.float32; expected a bool or integer dtype"),
        ((IDS, None, MASK[:1]), {}, r"token_type_ids: got shape \(1, 5\); expected the shape of input_ids"),
        ((IDS,), {"max_seqlen": 5}, r"max_seqlen: got 5; expected None without cu_seqlens"),
        ((IDS,), {"cu_seqlens": CU}, r"input_ids: got shape \(2, 5\).*\(tokens,\), since cu_seqlens"),
        ((PACKED, PACKED), {"cu_seqlens": CU}, r"attention_mask: got a value beside cu_seqlens"),
        (
            (PACKED,),
            {"cu_seqlens": CU, "padding_free": False},
            r"padding_free: got a value beside cu_seqlens",
        ),
        ((PACKED,), {"cu_seqlens": CU.long()}, r"cu_seqlens: got shape \(3,\), torch.int64; expected int32"),
        ((PACKED,), {"cu_seqlens": CU - 1}, r"cu_seqlens: got a first value of -1, a last of 9"),
        ((PACKED,), {"cu_seqlens": CU[[0, 2, 1, 2]]}, r"cu_seqlens: .* a shortest sequence of -6 tokens"),
        ((PACKED,), {"cu_seqlens": CU, "max_seqlen": 33}, r"input_ids: got a sequence of 33 tokens"),
        ((IDS,), {"labels": IDS[:1]}, r"labels: got shape \(1, 5\); expected the shape of input_ids"),
        ((IDS,), {"labels": IDS.int()}, r"labels: got torch.int32; expected torch.int64"),
        ((IDS,), {"masked_tokens_mask": IDS}, r"masked_tokens_mask: got torch.int64; expected torch.bool"),
        ((IDS,), {"masked_tokens_mask": IDS.bool(), "labels": IDS}, r"masked_tokens_mask: got a mask beside"),
        ((IDS,), {"labels": IDS, "padding_free": False}, r"padding_free: got False; expected True or None"),
        ((IDS,), {"labels": IDS + 101}, r"labels: .*101"),
    ],
)
def test_bad_input_is_refused(inputs, options, message):
    model = BertForMaskedLM(BertConfig(**SMALL))
    with pytest.raises(ValueError, match=message):
        model(*inputs, **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layer": 0}, r"BertConfig.n_layer: got 0; expected a positive integer"),
        ({"d_inner": 1.5}, r"BertConfig.d_inner: got 1.5"),
        ({"d_model": 33}, r"BertConfig.d_model: got 33; expected a multiple of n_head=2"),
        ({"activation": "gelu_tan"}, r"BertConfig.activation: got 'gelu_tan'.*did you mean 'gelu_tanh'"),
        ({"dropout": 1.0}, r"BertConfig.dropout: got 1.0; expected a probability"),
        ({"attn_dropout": "much"}, r"BertConfig.attn_dropout: got 'much'"),
        ({"norm_eps": 0}, r"BertConfig.norm_eps: got 0; expected a positive"),
        (
            {"pad_token_id": 101},
            r"BertConfig.pad_token_id: got 101; expected a token id in \[0, vocab_size=101\)",
        ),
        (
            {"n_token_type": 2},
            r"BertConfig: got unknown field 'n_token_type' \(did you mean 'n_token_types'\?\)",
        ),
    ],
)
def test_bad_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message + r".*Fix: "):
        BertConfig.from_dict({**SMALL, **changes})


def test_configs_as_dicts():
    config = BertConfig(**SMALL, eos_token_id=[1, 2], activation="relu")
    assert BertConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(config) == hash(BertConfig.from_dict(config.to_dict()))
    with pytest.raises(ValueError, match=r"BertConfig: got no vocab_size; expected at least the fields"):
        BertConfig.from_dict({name: value for name, value in SMALL.items() if name != "vocab_size"})
    with pytest.raises(ValueError, match=r"size: got 'huge'; expected one of 'tiny'"):
        BertConfig.bert("huge")
    assert BertConfig.bert("tiny", vocab_size=50).pad_token_id is None

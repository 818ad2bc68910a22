"""ViT: outputs and gradients are transformers'; class-token-only last layer, pooling, stochastic depth, dropout."""

from __future__ import annotations

import json

import pytest
import torch
from flash_attn_models.testing import assert_within_reference_error
from flash_attn_models.vit import ViTConfig, ViTForImageClassification, ViTModel
from flash_attn_models.vit.block import Branch, draw_keep
from flash_attn_models.vit.hugging_face import (
    Form,
    config_from_hugging_face,
    from_hugging_face,
    hugging_face_layout,
    to_hugging_face,
)
from torch.nn import functional as F

# Odd numbers of classes and channels, images and patches that are not square, activations, no biases, one layer.
CONFIGS = {
    "plain": {},
    "gelu_new_no_bias": {"hidden_act": "gelu_new", "qkv_bias": False, "num_labels": 7, "num_channels": 1},
    "oblong": {"image_size": [12, 20], "patch_size": [4, 2], "num_attention_heads": 6, "num_labels": 1},
    "relu_one_layer": {"hidden_act": "relu", "num_hidden_layers": 1, "layer_norm_eps": 1e-3},
    "silu_one_head": {"hidden_act": "silu", "num_attention_heads": 1, "intermediate_size": 200},
}
CLASSES = ["ViTModel", "ViTForImageClassification"]


def make_hugging_face(architecture, changes):
    transformers = pytest.importorskip("transformers")
    sizes = {"image_size": 16, "patch_size": 4, "hidden_size": 48, "intermediate_size": 88, "num_labels": 11}
    depth = {"num_hidden_layers": 3, "num_attention_heads": 4, "initializer_range": 0.3}
    config = transformers.ViTConfig(**{**sizes, **depth, **changes}, attn_implementation="eager")
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


def in_memory(state_dict, layout):
    """With the names that transformers has in memory instead of those in files."""
    return {layout.other_names.get(name, name): tensor for name, tensor in state_dict.items()}


def example(config, batch=3):
    return torch.randn(batch, config.n_channels, *config.image_pair)


def outputs(result):
    """The tensors of a model's result, ours or transformers'."""
    names = ("hidden", "pooled", "last_hidden_state", "pooler_output", "logits")
    return [getattr(result, name) for name in names if getattr(result, name, None) is not None]


def gradients(model, tensors, directions):
    model.zero_grad()
    sum((tensor * direction).mean() for tensor, direction in zip(tensors, directions, strict=True)).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("architecture", CLASSES)
def test_float32_outputs_and_gradients_equal_transformers(architecture, changes):
    hf_model = make_hugging_face(architecture, changes)
    model, layout = convert(hf_model)
    images = example(model.config)
    ours, theirs = outputs(model(images)), outputs(hf_model(images))
    assert theirs[0].std() > 0.5  # large enough for 1e-4 to mean something
    for actual, expected in zip(ours, theirs, strict=True):
        assert actual.shape == expected.shape
        assert (actual - expected).abs().max() < 1e-4
    directions = [torch.randn_like(tensor) for tensor in theirs]
    expected_grads = gradients(hf_model, theirs, directions)
    grads = in_memory(to_hugging_face(gradients(model, ours, directions), layout), layout)
    assert grads.keys() == expected_grads.keys()
    # A key's bias changes no softmax: its gradient is 0, and on both sides rounding errors.
    scale = max(grad.abs().max() for grad in expected_grads.values())
    for name, grad in expected_grads.items():
        assert (grads[name] - grad).abs().max() < 1e-4 * grad.abs().max() + 1e-6 * scale, name


@pytest.mark.parametrize("architecture", CLASSES)
def test_bfloat16_by_the_tolerance_law(architecture):
    hf_model = make_hugging_face(architecture, {})
    model, layout = convert(hf_model)
    images = example(model.config, 5).bfloat16()

    def run(a_model):
        dtype = next(a_model.parameters()).dtype
        tensors = outputs(a_model(images.to(dtype)))
        generator = torch.Generator().manual_seed(1)
        directions = [torch.randn(tensor.shape, generator=generator).to(dtype) for tensor in tensors]
        return tensors, gradients(a_model, tensors, directions)

    actual, actual_grads = run(model.bfloat16())
    plain, plain_grads = run(hf_model.bfloat16())
    reference, reference_grads = run(hf_model.double())
    for tensors in zip(actual, reference, plain, strict=True):
        assert tensors[0].dtype == torch.bfloat16
        assert_within_reference_error(*tensors)
    actual_grads = in_memory(to_hugging_face(actual_grads, layout), layout)
    for name, grad in reference_grads.items():
        assert_within_reference_error(actual_grads[name], grad, plain_grads[name], factor=3.0, name=name)


SMALL = {"image_size": 16, "patch_size": 4, "n_layer": 3, "n_head": 2, "d_model": 32, "n_classes": 5}
POOLINGS = [
    {},
    {"norm_after_pooling": True},
    {"pooling": "avg"},
    {"pooling": "avg", "norm_after_pooling": False},
    {"pooling": "avg", "class_token": False},
]


def varied(model):
    """The model with larger weights, and biases and norms that differ."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("changes", POOLINGS)
def test_features_are_pooled_hidden_states(changes, qkv_bias):
    # With "token" the last layer of features computes the class token alone, of forward all tokens.
    config = ViTConfig(**SMALL, **changes, qkv_bias=qkv_bias)
    model = varied(ViTModel(config))
    assert (model.layers[0].mixer.Wqkv.bias is not None) == qkv_bias
    images = example(config)
    hidden = model(images).hidden
    assert hidden.shape == (3, config.n_tokens, 32) and config.n_tokens == 16 + config.class_token
    pooled = hidden[:, 0] if config.pooling == "token" else hidden[:, config.n_prefix :].mean(1)
    expected = model.norm(pooled) if config.norms_features else pooled
    features = model.features(images)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
    direction = torch.randn_like(features)
    grads = gradients(model, [features], [direction])
    for name, grad in gradients(model, [expected], [direction]).items():
        assert (grads[name] - grad).abs().max() < 1e-5 * grad.abs().max() + 1e-6, name


def test_last_layer_computes_the_class_token_alone():
    model = varied(ViTForImageClassification(ViTConfig(**SMALL)))
    rows = []
    for module in (model.vit.layers[1].mlp, model.vit.layers[2].mlp, model.vit.layers[2].mixer.out_proj):
        module.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[1]))
    model(example(model.config))
    assert rows == [17, 1, 1]


def test_drop_path_rates_grow_with_depth_and_samples_are_kept_or_dropped():
    config = ViTConfig(**{**SMALL, "n_layer": 5}, drop_path=0.4)
    assert [layer.drop_path for layer in ViTModel(config).layers] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert ViTModel(ViTConfig(**{**SMALL, "n_layer": 1}, drop_path=0.4)).layers[0].drop_path == 0
    keep = draw_keep(torch.empty(20_000, 3, 2), 0.4)
    assert keep.dtype == torch.float32 and keep.shape == (20_000,)
    assert keep.unique().tolist() == [0.0, pytest.approx(1 / 0.6)]
    assert abs(keep.mean() - 1) < 0.03  # standard deviation 0.006
    assert draw_keep(torch.empty(2, 3), 0.0) is None


@pytest.mark.parametrize("changes", POOLINGS)
def test_drop_path_in_a_model(changes):
    """A sample's output in training is that of a model whose branches are scaled by what was drawn for it."""
    config = ViTConfig(**SMALL, **changes, drop_path=0.5)
    model = varied(ViTModel(config)).train()
    images = example(config, 64)

    drawn = []
    with torch.random.fork_rng():
        torch.manual_seed(3)
        features = model.features(images)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for layer in model.layers:
            drawn += [draw_keep(images, layer.drop_path) for _ in range(2)]
    assert drawn[:2] == [None, None] and all(not keep.all() and keep.any() for keep in drawn[2:])

    x = model.embeddings(images)
    for number, layer in enumerate(model.layers):
        for norm, branch, keep in (
            (layer.norm1, layer.mixer, drawn[2 * number]),
            (layer.norm2, layer.mlp, drawn[2 * number + 1]),
        ):
            x = x + branch(norm(x)) * (1 if keep is None else keep[:, None, None])
    if not config.norms_features:
        x = model.norm(x)
    x = x[:, 0] if config.pooling == "token" else x[:, config.n_prefix :].mean(1)
    torch.testing.assert_close(features, model.norm(x) if config.norms_features else x, atol=2e-5, rtol=1e-5)


def test_dropout_and_drop_path_do_nothing_in_evaluation():
    options = {"dropout": 0.3, "attn_dropout": 0.3, "head_dropout": 0.3, "drop_path": 0.3}
    model = varied(ViTForImageClassification(ViTConfig(**SMALL, **options)))
    plain = ViTForImageClassification(ViTConfig(**SMALL)).eval()
    plain.load_state_dict(model.state_dict())
    images = example(model.config)
    assert torch.equal(model(images).logits, plain(images).logits)
    assert not torch.equal(model.train()(images).logits, model(images).logits)
    assert torch.equal(plain.train()(images).logits, plain.eval()(images).logits)


@pytest.mark.parametrize(
    "name", ["dropout", "embedding_dropout", "attn_dropout", "head_dropout", "drop_path"]
)
def test_each_rate_acts_by_itself(name):
    config = ViTConfig(**SMALL, **{name: 0.5})
    model = varied(ViTForImageClassification(config)).train()
    images = example(config, 4)
    assert not torch.equal(model(images).logits, model(images).logits)
    logits = model(images).logits
    logits.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    with torch.random.fork_rng():
        torch.manual_seed(5)
        first = model(images).logits
        torch.manual_seed(5)
        assert torch.equal(model(images).logits, first)


def test_embedding_dropout_rate_and_scale():
    seen = []
    config = ViTConfig(**{**SMALL, "d_model": 64}, dropout=0.1, embedding_dropout=0.4)
    model = ViTModel(config).train()
    model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(example(config, 8))
    (branch,) = seen
    _, total = branch.norm(model.norm, False)
    is_zero = total == 0
    assert abs(is_zero.float().mean() - 0.4) < 0.03
    torch.testing.assert_close(total[~is_zero], branch.x[~is_zero] / 0.6)
    assert ViTConfig(**SMALL, dropout=0.1).embedding_dropout_p == 0.1


def test_a_branch_sums_alike_with_and_without_norm():
    norm = ViTModel(ViTConfig(**SMALL)).norm
    x, residual, keep = torch.randn(4, 3, 32), torch.randn(4, 3, 32), torch.tensor([0.0, 2.0, 1.0, 0.0])
    for branch in (Branch(x, residual, keep=keep), Branch(x, residual), Branch(x)):
        torch.testing.assert_close(branch.norm(norm, False)[1], branch.sum())


def test_residual_in_fp32():
    config = ViTConfig(**SMALL, residual_in_fp32=True)
    model = varied(ViTModel(config))
    images = example(config)
    expected = model(images).hidden
    seen = []
    model.layers[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    hidden = model.bfloat16()(images.bfloat16()).hidden
    assert (seen[0].x.dtype, seen[0].residual.dtype) == (torch.bfloat16, torch.float32)
    assert hidden.dtype == torch.bfloat16
    assert (hidden - expected).abs().max() < 0.3
    averaging = ViTModel(ViTConfig(**SMALL, residual_in_fp32=True, pooling="avg"), dtype=torch.bfloat16)
    assert averaging.features(images.bfloat16()).dtype == torch.bfloat16


def test_autocast_and_activation_checkpointing():
    model = varied(ViTForImageClassification(ViTConfig(**SMALL)))
    images = example(model.config)
    labels = torch.tensor([0, 4, 2])
    expected = model(images, labels)
    expected.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.vit.activation_checkpointing = True
    again = model(images, labels)
    assert torch.equal(again.logits, expected.logits)
    again.loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, grads[name])
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images.bfloat16()).logits
    assert logits.dtype == torch.bfloat16
    assert (logits - expected.logits).abs().max() < 0.1 * expected.logits.abs().max()


def test_activation_checkpointing_repeats_what_was_dropped():
    options = {"dropout": 0.2, "attn_dropout": 0.2, "drop_path": 0.5}
    model = varied(ViTForImageClassification(ViTConfig(**SMALL, **options))).double().train()
    images = example(model.config, 4).double()
    results = []
    for model.vit.activation_checkpointing in (False, True):
        torch.manual_seed(1)
        logits = model(images).logits
        results.append((logits, gradients(model, [logits], [torch.ones_like(logits)])))
    (logits, grads), (logits_again, grads_again) = results
    assert torch.equal(logits, logits_again)
    torch.testing.assert_close(grads_again, grads)


def test_compiled_model_equals_eager():
    model = varied(ViTForImageClassification(ViTConfig(**SMALL)))
    images, labels = example(model.config), torch.tensor([0, 4, 2])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images, labels).loss, model(images, labels).loss)


def test_loss_is_the_mean_cross_entropy():
    model = varied(ViTForImageClassification(ViTConfig(**SMALL)))
    labels = torch.tensor([3, -100, 0])
    logits, loss = model(example(model.config), labels)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels))
    assert loss.dtype == torch.float32


def test_batch_of_nothing_and_of_one():
    model = varied(ViTForImageClassification(ViTConfig(**SMALL)))
    images = example(model.config)
    assert model(images[:0]).logits.shape == (0, 5)
    torch.testing.assert_close(model(images[1:2]).logits, model(images).logits[1:2], atol=1e-5, rtol=1e-5)
    channels_last = images.to(memory_format=torch.channels_last)
    assert torch.equal(model(channels_last).logits, model(images).logits)


def test_initial_weights():
    model = ViTForImageClassification(ViTConfig.vit("tiny", initializer_range=0.05, n_layer=2))
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            assert parameter.eq(1).all(), name
        elif parameter.ndim == 1:
            assert parameter.eq(0).all(), name
        else:
            assert abs(parameter.std() - 0.05) < 0.012, name
    model.reset_parameters()


def test_sizes():
    def count(size, **changes):
        return ViTForImageClassification(ViTConfig.vit(size, **changes), device="meta").num_parameters()

    # Of the published models.
    assert (count("tiny"), count("small")) == (5_717_416, 22_050_664)
    assert (count("base"), count("base", patch_size=32)) == (86_567_656, 88_224_232)
    assert (count("large"), count("base", image_size=384)) == (304_326_632, 86_859_496)
    assert ViTModel(ViTConfig.vit(), device="meta").num_parameters() == 85_798_656


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (
            torch.zeros(3, 16, 16),
            {},
            r"images: got shape \(3, 16, 16\); expected \(batch, 3, height, width\)",
        ),
        (torch.zeros(2, 16, 16, 3), {}, r"images: got shape \(2, 16, 16, 3\); expected"),
        (torch.zeros(2, 1, 16, 16), {}, r"images: got shape \(2, 1, 16, 16\)"),
        (torch.zeros(2, 3, 16, 20), {}, r"images: .*expected \(batch, 3, 16, 16\), the model's image_size"),
        (torch.zeros(2, 3, 0, 16), {"interpolate_positions": True}, r"images: got shape \(2, 3, 0, 16\)"),
        (torch.zeros(2, 3, 16, 18), {"interpolate_positions": True}, r"images: .*whole patches of 4 x 4"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), {}, r"images: got torch.uint8; expected normalised"),
        (torch.zeros(2, 3, 16, 16).half(), {}, r"images: got torch.float16; expected the model's dtype"),
        (torch.zeros(2, 3, 16, 16, device="meta"), {}, r"images: got device meta; expected the model's"),
        (
            torch.zeros(2, 3, 16, 16),
            {"labels": torch.zeros(3).long()},
            r"labels: got shape \(3,\); expected \(2,\)",
        ),
        (torch.zeros(2, 3, 16, 16), {"labels": torch.tensor([0, 5])}, r"labels: .*5"),
        (torch.zeros(2, 3, 16, 16), {"labels": torch.zeros(2)}, r"labels: .*float32"),
    ],
)
def test_bad_input_is_refused(images, options, message):
    model = ViTForImageClassification(ViTConfig(**SMALL))
    with pytest.raises(ValueError, match=message + r".*Fix: "):
        model(images, **options)


def test_models_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"n_classes: got 0; expected at least one class.*ViTModel"):
        ViTForImageClassification(ViTConfig(**{**SMALL, "n_classes": 0}))
    for changes in POOLINGS[1:3]:
        with pytest.raises(ValueError, match=r"with_pooler: got True .* norm after pooling.*Fix: "):
            ViTModel(ViTConfig(**SMALL, **changes), with_pooler=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layer": 0}, r"ViTConfig.n_layer: got 0; expected a positive integer"),
        ({"d_inner": 1.5}, r"ViTConfig.d_inner: got 1.5"),
        ({"n_classes": -1}, r"ViTConfig.n_classes: got -1; expected an integer of at least 0"),
        ({"d_model": 33}, r"ViTConfig.d_model: got 33; expected a multiple of n_head=2"),
        ({"image_size": 18}, r"ViTConfig.image_size: got 18; expected whole patches of 4 x 4"),
        ({"image_size": (16, 4, 4)}, r"ViTConfig.image_size: got \(16, 4, 4\); expected a positive integer"),
        ({"patch_size": 0}, r"ViTConfig.patch_size: got 0"),
        ({"activation": "gelu_tan"}, r"ViTConfig.activation: got 'gelu_tan'.*did you mean 'gelu_tanh'"),
        ({"pooling": "mean"}, r"ViTConfig.pooling: got 'mean'; expected one of 'token', 'avg'"),
        ({"pooling": ["avg"]}, r"ViTConfig.pooling: got \['avg'\]"),
        ({"class_token": False}, r"ViTConfig.pooling: got 'token'; expected 'avg' without a class token"),
        ({"qkv_bias": 1}, r"ViTConfig.qkv_bias: got 1; expected True or False"),
        ({"norm_after_pooling": 0}, r"ViTConfig.norm_after_pooling: got 0"),
        ({"drop_path": 1.0}, r"ViTConfig.drop_path: got 1.0; expected a probability"),
        ({"embedding_dropout": "much"}, r"ViTConfig.embedding_dropout: got 'much'"),
        ({"norm_eps": 0}, r"ViTConfig.norm_eps: got 0; expected a positive"),
        (
            {"class_names": ["cat"]},
            r"ViTConfig.class_names: got 1 names; expected one for each of n_classes=5",
        ),
        ({"class_names": "abcde"}, r"ViTConfig.class_names: got 'abcde'; expected strings"),
        ({"n_class": 2}, r"ViTConfig: got unknown field 'n_class' \(did you mean 'n_classes'\?\)"),
    ],
)
def test_bad_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message + r".*Fix: "):
        ViTConfig.from_dict({**SMALL, **changes})


def test_configs_as_dicts():
    config = ViTConfig(**{**SMALL, "image_size": (16, 8)}, class_names=list("abcde"), activation="relu")
    assert ViTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(config) == hash(ViTConfig.from_dict(config.to_dict()))
    assert ViTConfig(**{**SMALL, "image_size": [16, 16]}) == ViTConfig(**SMALL)
    assert (config.grid, config.n_tokens, config.head_dim, config.inner_dim) == ((4, 2), 9, 16, 128)
    with pytest.raises(ValueError, match=r"ViTConfig: got no image_size; expected at least the fields"):
        ViTConfig.from_dict({name: value for name, value in SMALL.items() if name != "image_size"})
    with pytest.raises(ValueError, match=r"size: got 'huge'; expected one of 'tiny'"):
        ViTConfig.vit("huge")

"""ViT checkpoints: Hugging Face folders and timm's state dicts both ways, and other image sizes."""

from __future__ import annotations

import json

import pytest
import torch
from flash_attn_models import load_pretrained, save_pretrained
from flash_attn_models.vit import (
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
    from_timm,
    interpolate_positions,
    to_timm,
    with_image_size,
)
from flash_attn_models.vit.hugging_face import (
    Form,
    config_from_hugging_face,
    config_to_hugging_face,
    from_hugging_face,
    hugging_face_layout,
    to_hugging_face,
)
from flash_attn_ops.distributed import Group
from flash_attn_ops.distributed.parameters import sequence_parallel_parameters
from torch import nn
from torch.nn import functional as F

safetensors_torch = pytest.importorskip("safetensors.torch")

SIZES = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
VIT = {"model_type": "vit", **SIZES}
CLASSES = ["ViTModel", "ViTForImageClassification"]


def make_hugging_face(architecture, config=None, **options):
    transformers = pytest.importorskip("transformers")
    config = {"num_labels": 7, **SIZES, **(config or {})}
    model = getattr(transformers, architecture)(
        transformers.ViTConfig(**config, initializer_range=0.3), **options
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


def write(hf_model, folder, max_shard_size="1GB"):
    folder.mkdir()
    hf_model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def rewrite(folder, change):
    """Change the tensors of model.safetensors."""
    weights = safetensors_torch.load_file(folder / "model.safetensors")
    change(weights)
    safetensors_torch.save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"])
@pytest.mark.parametrize("architecture", CLASSES)
def test_folders_load(tmp_path, architecture, max_shard_size):
    hf_model = make_hugging_face(architecture)
    folder = write(hf_model, tmp_path / "model", max_shard_size)
    assert (max_shard_size == "20KB") == any(folder.glob("*.index.json"))
    model = load_pretrained(folder)
    assert type(model).__name__ == architecture
    assert not model.training
    assert all(parameter.requires_grad and parameter.is_contiguous() for parameter in model.parameters())
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert (model(images)[0] - hf_model(images)[0]).abs().max() < 1e-4


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 20_000])
@pytest.mark.parametrize("changes", [{}, {"qkv_bias": False, "image_size": [8, 16], "num_channels": 1}])
@pytest.mark.parametrize("architecture", CLASSES)
def test_saved_folder_loads_in_transformers_bit_for_bit(tmp_path, architecture, changes, max_shard_bytes):
    transformers = pytest.importorskip("transformers")
    hf_model = make_hugging_face(architecture, changes)
    model = load_pretrained(write(hf_model, tmp_path / "theirs"))
    save_pretrained(model, tmp_path / "ours", max_shard_bytes=max_shard_bytes)
    back, info = getattr(transformers, architecture).from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert back.state_dict().keys() == hf_model.state_dict().keys()
    for name, tensor in hf_model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    again = load_pretrained(tmp_path / "ours")
    assert again.config == model.config
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(again.state_dict()[name], t) for name, t in model.state_dict().items())


def test_the_names_of_saved_files_are_those_of_transformers(tmp_path):
    for architecture in CLASSES:
        folder = write(make_hugging_face(architecture), tmp_path / f"their {architecture}")
        save_pretrained(load_pretrained(folder), tmp_path / f"our {architecture}")
        theirs, ours = (
            safetensors_torch.load_file(tmp_path / f"{whose} {architecture}" / "model.safetensors")
            for whose in ("their", "our")
        )
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
        config = json.loads((tmp_path / f"our {architecture}" / "config.json").read_text())
        assert (config["architectures"], config["dtype"]) == ([architecture], "float32")


@pytest.mark.parametrize("architecture", CLASSES)
def test_state_dict_round_trip_is_exact_in_both_directions(architecture):
    hf_model = make_hugging_face(architecture)
    config = config_from_hugging_face(hf_model.config.to_dict())
    theirs = dict(hf_model.state_dict())  # with the names that transformers has in memory
    layout = hugging_face_layout(config, Form.of_names(list(theirs)))
    ours = from_hugging_face(theirs, layout)
    back = to_hugging_face(ours, layout)
    assert {layout.other_names.get(name, name) for name in back} == theirs.keys()
    for name, tensor in back.items():
        assert torch.equal(tensor, theirs[layout.other_names.get(name, name)]) and tensor.is_contiguous()
    again = from_hugging_face(back, layout)
    assert all(torch.equal(again[name], tensor) for name, tensor in ours.items())


def test_dtype_and_device_arguments(tmp_path):
    folder = write(make_hugging_face("ViTForImageClassification").bfloat16(), tmp_path / "model")
    assert load_pretrained(folder).head.weight.dtype == torch.bfloat16
    assert load_pretrained(folder, dtype=torch.float64).head.bias.dtype == torch.float64
    assert load_pretrained(folder, device="meta").head.weight.is_meta


def test_encoders_with_and_without_prefix_and_pooler(tmp_path):
    folder = write(make_hugging_face("ViTModel", add_pooling_layer=False), tmp_path / "model")
    model = load_pretrained(folder)
    assert isinstance(model, ViTModel) and model.pooler is None
    save_pretrained(model, tmp_path / "saved")
    assert load_pretrained(tmp_path / "saved").pooler is None
    rewrite(folder, lambda weights: [weights.update({f"vit.{n}": weights.pop(n)}) for n in list(weights)])
    prefixed = load_pretrained(folder)
    assert all(torch.equal(prefixed.state_dict()[name], t) for name, t in model.state_dict().items())


def test_missing_unexpected_and_wrong_tensors_are_listed(tmp_path):
    folder = write(make_hugging_face("ViTModel"), tmp_path / "model")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"missing encoder.layer.2.layernorm_before.weight, .*and 8 more"):
        load_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({**fields, "patch_size": 8}))
    with pytest.raises(
        ValueError,
        match=r"projection.weight \(32, 3, 4, 4\) instead of \(32, 3, 8, 8\), .*position_embeddings",
    ):
        load_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(fields))
    rewrite(folder, lambda weights: weights.update({"embeddings.mask_token": torch.ones(1, 1, 32)}))
    with pytest.raises(ValueError, match=r"unexpected embeddings.mask_token; expected exactly the tensors"):
        load_pretrained(folder)


def test_class_names_arrive_and_return(tmp_path):
    names = {0: "cat", 1: "dog", 2: "newt"}
    labels = {"id2label": names, "label2id": {name: number for number, name in names.items()}}
    folder = write(
        make_hugging_face("ViTForImageClassification", {**labels, "num_labels": 3}), tmp_path / "a"
    )
    model = load_pretrained(folder)
    assert model.config.class_names == ("cat", "dog", "newt")
    save_pretrained(model, tmp_path / "b")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["id2label"] == {"0": "cat", "1": "dog", "2": "newt"}
    assert config["label2id"] == labels["label2id"]


def test_config_round_trip_and_defaults():
    transformers = pytest.importorskip("transformers")
    complete = config_from_hugging_face(transformers.ViTConfig().to_dict())
    assert complete == config_from_hugging_face({"model_type": "vit"})
    assert complete == ViTConfig.vit("base", d_inner=3072, norm_eps=1e-12, n_classes=2)
    assert config_from_hugging_face(json.loads(json.dumps(config_to_hugging_face(complete)))) == complete
    assert config_from_hugging_face({**VIT, "num_labels": 9}).n_classes == 9
    assert config_from_hugging_face({**VIT, "id2label": {}}).n_classes == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"image_size": 32},
        {"image_size": [16, 32]},
        {"patch_size": 8},
        {"num_channels": 1},
        {"num_hidden_layers": 3},
        {"num_attention_heads": 8},
        {"hidden_size": 64},
        {"intermediate_size": 64},
        {"hidden_act": "gelu_new"},
        {"hidden_act": "relu"},
        {"hidden_act": "silu"},
        {"qkv_bias": False},
        {"layer_norm_eps": 1e-5},
        {"hidden_dropout_prob": 0.3},
        {"attention_probs_dropout_prob": 0.1},
        {"initializer_range": 0.1},
        {"id2label": {"0": "a", "1": "b", "2": "c"}},
    ],
)
def test_every_field_arrives_and_returns(changes):
    config = config_from_hugging_face({**VIT, **changes})
    assert config != config_from_hugging_face(VIT)
    back = config_to_hugging_face(config)
    assert {name: back[name] for name in changes} == changes


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "deit"}, r"config field 'model_type': got 'deit'; expected 'vit'"),
        ({**VIT, "hidden_sizes": 2}, r"config field 'hidden_sizes': got 2;.*did you mean 'hidden_size'"),
        ({**VIT, "hidden_act": "quick_gelu"}, r"'hidden_act': got 'quick_gelu'; expected one of gelu"),
        ({**VIT, "pooler_act": "relu"}, r"config field 'pooler_act': got 'relu'; expected 'tanh', because"),
        (
            {**VIT, "pooler_output_size": 8},
            r"config field 'pooler_output_size': got 8; expected hidden_size=32",
        ),
        ({**VIT, "id2label": {"1": "a"}}, r"config field 'id2label': .*a name for each of the classes"),
        ({**VIT, "id2label": ["a"]}, r"config field 'id2label': got \['a'\]; expected an object"),
        ({**VIT, "quantization_config": {}}, r"config field 'quantization_config'.*not quantised"),
        ({**VIT, "hidden_size": 33}, r"ViTConfig.d_model: got 33; expected a multiple of n_head=4"),
    ],
)
def test_unsupported_configs_are_refused_by_field(fields, message):
    with pytest.raises(ValueError, match=message + r".*Fix: "):
        config_from_hugging_face(fields)


# timm's layout, from its documented names: this is its VisionTransformer, in plain PyTorch.


class TimmAttention(nn.Module):
    def __init__(self, dim, heads, qkv_bias):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        weights = ((q * (dim // self.heads) ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, dim))


class TimmMlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class TimmBlock(nn.Module):
    def __init__(self, dim, heads, hidden, qkv_bias):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = TimmAttention(dim, heads, qkv_bias), TimmMlp(dim, hidden)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TimmVisionTransformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        dim = config.d_model
        self.config = config
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(config.n_channels, dim, config.patch_pair, config.patch_pair)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim)) if config.class_token else None
        self.pos_embed = nn.Parameter(torch.randn(1, config.n_tokens, dim))
        self.blocks = nn.Sequential(
            *(TimmBlock(dim, config.n_head, config.inner_dim, config.qkv_bias) for _ in range(config.n_layer))
        )
        self.norm = nn.Identity() if config.norms_features else nn.LayerNorm(dim, eps=1e-6)
        self.fc_norm = nn.LayerNorm(dim, eps=1e-6) if config.norms_features else nn.Identity()
        self.head = nn.Linear(dim, config.n_classes) if config.n_classes else nn.Identity()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.2)

    def forward(self, images):
        x = self.patch_embed.proj(images).flatten(2).transpose(1, 2)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = self.norm(self.blocks(x + self.pos_embed))
        x = x[:, 0] if self.config.pooling == "token" else x[:, self.config.n_prefix :].mean(dim=1)
        return self.head(self.fc_norm(x))


SMALL = {"image_size": 16, "patch_size": 4, "n_layer": 2, "n_head": 2, "d_model": 32, "n_classes": 5}
TIMM = [
    {},
    {"qkv_bias": False, "d_inner": 40},
    {"pooling": "avg"},
    {"pooling": "avg", "class_token": False, "n_channels": 1},
    {"pooling": "avg", "norm_after_pooling": False, "image_size": (8, 20)},
    {"norm_after_pooling": True, "n_classes": 0},
]


@pytest.mark.parametrize("changes", TIMM)
def test_timm_state_dicts_both_ways(changes):
    config = ViTConfig(**{**SMALL, **changes})
    timm_model = TimmVisionTransformer(config)
    model = from_timm(timm_model.state_dict(), config)
    assert not model.training and all(parameter.requires_grad for parameter in model.parameters())
    images = torch.randn(3, config.n_channels, *config.image_pair)
    ours = model(images).logits if config.n_classes else model.features(images)
    theirs = timm_model(images)
    assert theirs.std() > 0.3
    assert (ours - theirs).abs().max() < 1e-4
    direction = torch.randn_like(theirs)
    (ours * direction).sum().backward()
    (theirs * direction).sum().backward()
    grads = {name: parameter.grad for name, parameter in timm_model.named_parameters()}
    with torch.no_grad():  # through the layout, as the weights
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    scale = max(grad.abs().max() for grad in grads.values())
    for name, grad in to_timm(model).items():
        assert (grad - grads[name]).abs().max() < 1e-4 * grads[name].abs().max() + 1e-6 * scale, name


def test_timm_state_dicts_round_trip_exactly():
    config = ViTConfig(**SMALL)
    theirs = TimmVisionTransformer(config).state_dict()
    model = from_timm(theirs, config)
    back = to_timm(model)
    assert back.keys() == theirs.keys()
    assert all(
        torch.equal(back[name], tensor) and back[name].is_contiguous() for name, tensor in theirs.items()
    )
    before = theirs["head.bias"].clone()
    with torch.no_grad():  # weights are copies
        model.head.bias.add_(1)
    assert torch.equal(theirs["head.bias"], before)
    half = from_timm(theirs, config, dtype=torch.bfloat16, device="cpu")
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_wrong_timm_state_dicts_are_refused_by_name():
    config = ViTConfig(**SMALL)
    weights = TimmVisionTransformer(config).state_dict()
    renamed = {name.replace("pos_embed", "pos_embedding"): tensor for name, tensor in weights.items()}
    with pytest.raises(
        ValueError, match=r"missing pos_embed \(did you mean 'pos_embedding'\?\); unexpected pos_embedding"
    ):
        from_timm(renamed, config)
    with pytest.raises(ValueError, match=r"unexpected blocks.0.ls1.gamma; expected exactly"):
        from_timm({**weights, "blocks.0.ls1.gamma": torch.ones(32)}, config)
    with pytest.raises(
        ValueError, match=r"pos_embed \(1, 17, 32\) instead of \(1, 65, 32\).*with_image_size"
    ):
        from_timm(weights, ViTConfig(**{**SMALL, "image_size": 32}))
    with pytest.raises(ValueError, match=r"missing fc_norm.weight .*unexpected cls_token, norm.weight"):
        from_timm(weights, ViTConfig(**SMALL, pooling="avg", class_token=False))
    with pytest.raises(ValueError, match=r"model: got a pooler; expected none.*Fix: "):
        to_timm(ViTModel(config, with_pooler=True))
    with pytest.raises(ValueError, match=r"model: got a Linear; expected a ViT model"):
        to_timm(nn.Linear(2, 2))


@pytest.mark.parametrize("changes", TIMM[2:])
def test_models_that_hugging_face_lacks_are_refused(tmp_path, changes):
    model = ViTModel(ViTConfig(**{**SMALL, **changes}))
    with pytest.raises(
        ValueError, match=r"ViTConfig.(class_token|pooling|norm_after_pooling): got .*to_timm"
    ):
        save_pretrained(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())


# Images of other sizes.


@pytest.mark.parametrize("size", [(16, 16), (24, 24), (8, 20)])
def test_interpolated_positions_equal_transformers(size):
    hf_model = make_hugging_face("ViTForImageClassification")
    config = config_from_hugging_face(hf_model.config.to_dict())
    form = Form.of_model(ViTForImageClassification(config))
    model = form.build(config).eval()
    model.load_state_dict(from_hugging_face(hf_model.state_dict(), hugging_face_layout(config, form)))
    images = torch.randn(2, 3, *size)
    expected = hf_model(images, interpolate_pos_encoding=True).logits
    actual = model(images, interpolate_positions=True).logits
    assert (actual - expected).abs().max() < 1e-4
    model.zero_grad()
    actual.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(
        model.vit.embeddings.position_embeddings.grad,
        hf_model.vit.embeddings.position_embeddings.grad,
        atol=1e-4,
        rtol=1e-4,
    )

    resized = with_image_size(model, size)
    assert resized.config.image_pair == size and resized.vit.config == resized.config
    assert torch.equal(resized(images).logits, actual)
    assert model.config == config


@pytest.mark.parametrize("antialias", [True, False])
def test_interpolate_positions(antialias):
    positions = torch.randn(1, 2 + 6 * 4, 8)
    assert interpolate_positions(positions, (6, 4), (6, 4), n_prefix=2) is positions
    result = interpolate_positions(positions, (6, 4), (3, 5), n_prefix=2, antialias=antialias)
    assert result.shape == (1, 2 + 15, 8)
    assert torch.equal(result[:, :2], positions[:, :2])
    image = positions[:, 2:].reshape(1, 6, 4, 8).permute(0, 3, 1, 2)
    expected = F.interpolate(image, size=(3, 5), mode="bicubic", antialias=antialias)
    torch.testing.assert_close(result[:, 2:], expected.permute(0, 2, 3, 1).reshape(1, 15, 8))
    # 16 bits are interpolated in float32.
    half = interpolate_positions(positions.bfloat16(), (6, 4), (3, 5), n_prefix=2, antialias=antialias)
    wide = interpolate_positions(
        positions.bfloat16().float(), (6, 4), (3, 5), n_prefix=2, antialias=antialias
    )
    assert torch.equal(half, wide.bfloat16())


def test_with_image_size_keeps_what_the_model_is():
    model = ViTModel(ViTConfig(**SMALL), with_pooler=True, dtype=torch.bfloat16).train()
    model.activation_checkpointing = True
    model.embeddings.position_embeddings.requires_grad_(False)
    resized = with_image_size(model, (24, 8), antialias=True)
    assert resized.training and resized.activation_checkpointing and resized.embeddings.training
    assert not resized.embeddings.position_embeddings.requires_grad
    assert resized.embeddings.cls_token.requires_grad
    assert resized.embeddings.position_embeddings.shape == (1, 13, 32)
    assert {parameter.dtype for parameter in resized.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        resized.embeddings.cls_token.add_(1)
        resized.norm.weight.add_(1)
    assert model.norm.weight.eq(1).all()
    assert not torch.equal(model.embeddings.cls_token, resized.embeddings.cls_token)
    resized(torch.randn(2, 3, 24, 8).bfloat16()).pooled.sum().backward()


def test_with_image_size_keeps_how_a_model_is_spread():
    group = Group("", 2, 1)
    model = ViTForImageClassification(ViTConfig(**SMALL), process_group=group, sequence_parallel=True)
    resized = with_image_size(model, 32)
    assert resized.vit.embeddings.parallel == model.parallel and model.parallel.is_parallel
    counts = [len(list(sequence_parallel_parameters(of))) for of in (model, resized)]
    assert counts[0] == counts[1] > 0


def test_bad_sizes_are_refused():
    positions = torch.zeros(1, 17, 8)
    with pytest.raises(ValueError, match=r"positions: got shape \(1, 17, 8\); expected \(1, 16, d_model\)"):
        interpolate_positions(positions, (3, 5), (2, 2))
    with pytest.raises(ValueError, match=r"new_grid: got \(0, 2\); expected .*Fix: "):
        interpolate_positions(positions, (4, 4), (0, 2))
    model = ViTModel(ViTConfig(**SMALL))
    with pytest.raises(ValueError, match=r"ViTConfig.image_size: got 18; expected whole patches of 4 x 4"):
        with_image_size(model, 18)
    with pytest.raises(ValueError, match=r"model: got a Linear; expected a ViT model"):
        with_image_size(nn.Linear(2, 2), 16)

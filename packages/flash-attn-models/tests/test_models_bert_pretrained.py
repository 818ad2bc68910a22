"""BERT folders: every form loads, what is saved loads in transformers bit for bit, configs are read strictly."""

from __future__ import annotations

import json

import pytest
import torch
from flash_attn_models import load_pretrained, save_pretrained
from flash_attn_models.bert import BertConfig, BertForMaskedLM, BertForPreTraining, BertModel
from flash_attn_models.bert.hugging_face import (
    Form,
    config_from_hugging_face,
    config_to_hugging_face,
    from_hugging_face,
    hugging_face_layout,
    to_hugging_face,
)

safetensors_torch = pytest.importorskip("safetensors.torch")

SIZES = {
    "vocab_size": 101,
    "max_position_embeddings": 24,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
BERT = {"model_type": "bert", **SIZES}
CLASSES = ["BertModel", "BertForMaskedLM", "BertForPreTraining"]


def make_hugging_face(architecture, **options):
    transformers = pytest.importorskip("transformers")
    model = getattr(transformers, architecture)(
        transformers.BertConfig(**SIZES, type_vocab_size=3, initializer_range=0.3), **options
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


def write(hf_model, folder, form="safetensors"):
    folder.mkdir()
    if "safetensors" in form:
        hf_model.save_pretrained(folder, max_shard_size="20KB" if "sharded" in form else "1GB")
        return folder
    hf_model.config.save_pretrained(folder)
    weights = dict(hf_model.state_dict())
    if "sharded" not in form:
        torch.save(weights, folder / "pytorch_model.bin")
        return folder
    names = list(weights)
    weight_map = {}
    for number, part in enumerate([names[::2], names[1::2]], start=1):
        file_name = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: weights[name] for name in part}, folder / file_name)
        weight_map |= dict.fromkeys(part, file_name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def rewrite(folder, change):
    """Change the tensors of model.safetensors."""
    weights = safetensors_torch.load_file(folder / "model.safetensors")
    change(weights)
    safetensors_torch.save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize("form", ["safetensors", "sharded safetensors", "bin", "sharded bin"])
@pytest.mark.parametrize("architecture", CLASSES)
def test_every_form_of_weights_loads(tmp_path, architecture, form):
    hf_model = make_hugging_face(architecture)
    folder = write(hf_model, tmp_path / "model", form)
    assert ("sharded" in form) == any(folder.glob("*.index.json"))
    model = load_pretrained(folder)
    assert type(model).__name__ == architecture
    assert not model.training
    assert all(parameter.requires_grad and parameter.is_contiguous() for parameter in model.parameters())
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    ids = torch.randint(101, (2, 17))
    with torch.no_grad():
        assert (model(ids)[0] - hf_model(ids)[0]).abs().max() < 1e-4


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 20_000])
@pytest.mark.parametrize("architecture", CLASSES)
def test_saved_folder_loads_in_transformers_bit_for_bit(tmp_path, architecture, max_shard_bytes):
    transformers = pytest.importorskip("transformers")
    hf_model = make_hugging_face(architecture)
    model = load_pretrained(write(hf_model, tmp_path / "theirs"))
    save_pretrained(model, tmp_path / "ours", max_shard_bytes=max_shard_bytes)
    assert (max_shard_bytes == 20_000) == any((tmp_path / "ours").glob("*.index.json"))
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
        config = json.loads((tmp_path / f"our {architecture}" / "config.json").read_text())
        assert (config["architectures"], config["dtype"]) == ([architecture], "float32")


@pytest.mark.parametrize("architecture", CLASSES)
def test_state_dict_round_trip_is_exact_in_both_directions(architecture):
    hf_model = make_hugging_face(architecture)
    config = config_from_hugging_face(hf_model.config.to_dict())
    layout = hugging_face_layout(config, Form.of_names(list(hf_model.state_dict())))
    theirs = dict(hf_model.state_dict())
    ours = from_hugging_face(theirs, layout)
    back = to_hugging_face(ours, layout)
    tied = {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    assert back.keys() == theirs.keys() - tied
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in back.items())
    again = from_hugging_face(back, layout)
    assert all(torch.equal(again[name], tensor) for name, tensor in ours.items())


def test_dtype_and_device_arguments(tmp_path):
    folder = write(make_hugging_face("BertForMaskedLM").bfloat16(), tmp_path / "model")
    assert load_pretrained(folder).head_weight.dtype == torch.bfloat16
    assert load_pretrained(folder, dtype=torch.float64).head.bias.dtype == torch.float64
    assert load_pretrained(folder, device="meta").head_weight.is_meta


def test_encoders_with_and_without_prefix_and_pooler(tmp_path):
    hf_model = make_hugging_face("BertModel", add_pooling_layer=False)
    folder = write(hf_model, tmp_path / "model")
    model = load_pretrained(folder)
    assert isinstance(model, BertModel) and model.pooler is None
    save_pretrained(model, tmp_path / "saved")
    assert load_pretrained(tmp_path / "saved").pooler is None
    rewrite(folder, lambda weights: [weights.update({f"bert.{n}": weights.pop(n)}) for n in list(weights)])
    prefixed = load_pretrained(folder)
    assert all(torch.equal(prefixed.state_dict()[name], t) for name, t in model.state_dict().items())


def test_a_masked_lm_file_with_a_pooler_keeps_it(tmp_path):
    folder = write(make_hugging_face("BertForPreTraining"), tmp_path / "model")
    expected = load_pretrained(folder)
    rewrite(
        folder,
        lambda weights: [weights.pop(f"cls.seq_relationship.{kind}") for kind in ("weight", "bias")],
    )
    model = load_pretrained(folder)
    assert isinstance(model, BertForMaskedLM)
    ids = torch.randint(101, (2, 9))
    assert torch.equal(model.bert(ids).pooled, expected.bert(ids).pooled)


def test_names_and_buffers_of_old_checkpoints(tmp_path):
    folder = write(make_hugging_face("BertForPreTraining"), tmp_path / "model")
    expected = load_pretrained(folder).state_dict()

    def age(weights):
        for name in list(weights):
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            )
            weights[old] = weights.pop(name)
        weights["bert.embeddings.position_ids"] = torch.arange(24)[None]
        weights["cls.predictions.decoder.weight"] = weights["bert.embeddings.word_embeddings.weight"].clone()
        weights["cls.predictions.decoder.bias"] = weights["cls.predictions.bias"].clone()

    rewrite(folder, age)
    loaded = load_pretrained(folder)
    assert isinstance(loaded, BertForPreTraining)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in expected.items())

    rewrite(folder, lambda weights: weights["cls.predictions.decoder.weight"].add_(1))
    with pytest.raises(ValueError, match=r"cls.predictions.decoder.weight that differs from bert.embeddings"):
        load_pretrained(folder)


def test_missing_unexpected_and_wrong_tensors_are_listed(tmp_path):
    folder = write(make_hugging_face("BertModel"), tmp_path / "model")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "num_hidden_layers": 3}))
    with pytest.raises(
        ValueError, match=r"missing encoder.layer.2.attention.self.query.weight, .*and 8 more"
    ):
        load_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({**fields, "intermediate_size": 40}))
    with pytest.raises(ValueError, match=r"encoder.layer.0.intermediate.dense.weight \(48, 32\) instead of"):
        load_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(fields))
    rewrite(folder, lambda weights: weights.update({"classifier.weight": torch.ones(2, 32)}))
    with pytest.raises(ValueError, match=r"unexpected classifier.weight; expected exactly the tensors"):
        load_pretrained(folder)


def test_a_folder_of_an_unknown_type_is_refused(tmp_path):
    folder = write(make_hugging_face("BertModel"), tmp_path / "model")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "model_type": "roberta"}))
    with pytest.raises(ValueError, match=r"'model_type': got 'roberta'; expected one of 'gpt2', .*'bert'"):
        load_pretrained(folder)


def test_config_round_trip_and_defaults():
    transformers = pytest.importorskip("transformers")
    complete = config_from_hugging_face(transformers.BertConfig().to_dict())
    assert (
        complete == config_from_hugging_face({"model_type": "bert"}) == BertConfig.bert("base", d_inner=3072)
    )
    assert config_from_hugging_face(json.loads(json.dumps(config_to_hugging_face(complete)))) == complete
    # As published, with fields that shape nothing.
    published = {
        **BERT,
        "architectures": ["BertForMaskedLM"],
        "directionality": "bidi",
        "language": "english",
        "name": "Bert",
        "output_past": True,
        "_num_labels": 2,
        "xla_device": True,
        "gradient_checkpointing": False,
        "pooler_fc_size": 768,
        "pooler_num_attention_heads": 12,
        "pooler_num_fc_layers": 3,
        "pooler_size_per_head": 128,
        "pooler_type": "first_token_transform",
        "position_embedding_type": "absolute",
        "classifier_dropout": None,
    }
    assert config_from_hugging_face(published) == config_from_hugging_face(BERT)


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 128},
        {"max_position_embeddings": 48},
        {"num_hidden_layers": 3},
        {"num_attention_heads": 8},
        {"hidden_size": 64},
        {"intermediate_size": 64},
        {"type_vocab_size": 1},
        {"hidden_act": "gelu_new"},
        {"hidden_act": "relu"},
        {"hidden_act": "silu"},
        {"layer_norm_eps": 1e-5},
        {"hidden_dropout_prob": 0.3},
        {"attention_probs_dropout_prob": 0.0},
        {"initializer_range": 0.1},
        {"pad_token_id": 5},
        {"bos_token_id": 5},
        {"eos_token_id": [5, 6]},
    ],
)
def test_every_field_arrives_and_returns(changes):
    config = config_from_hugging_face({**BERT, **changes})
    assert config != config_from_hugging_face(BERT)
    back = config_to_hugging_face(config)
    assert {name: back[name] for name in changes} == changes


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "roberta"}, r"config field 'model_type': got 'roberta'; expected 'bert'"),
        ({**BERT, "hidden_sizes": 2}, r"config field 'hidden_sizes': got 2;.*did you mean 'hidden_size'"),
        ({**BERT, "hidden_act": "mish"}, r"config field 'hidden_act': got 'mish'; expected one of gelu"),
        ({**BERT, "is_decoder": True}, r"config field 'is_decoder': got True; expected False, because"),
        ({**BERT, "add_cross_attention": True}, r"config field 'add_cross_attention': got True"),
        ({**BERT, "tie_word_embeddings": False}, r"config field 'tie_word_embeddings': got False"),
        (
            {**BERT, "position_embedding_type": "relative_key"},
            r"'position_embedding_type': got 'relative_key'",
        ),
        ({**BERT, "quantization_config": {}}, r"config field 'quantization_config'.*not quantised"),
        ({**BERT, "hidden_size": 33}, r"BertConfig.d_model: got 33; expected a multiple of n_head=4"),
    ],
)
def test_unsupported_configs_are_refused_by_field(fields, message):
    with pytest.raises(ValueError, match=message + r".*Fix: "):
        config_from_hugging_face(fields)

"""From the model group to models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flash_attn_models.bert import BertForMaskedLM
from flash_attn_models.gpt import GPTLMHeadModel
from flash_attn_models.vit import ViTForImageClassification
from flash_attn_train.configs import (
    BertModelConfig,
    GPTModelConfig,
    HuggingFaceModelConfig,
    ModelConfig,
    TrainConfig,
    ViTModelConfig,
)
from flash_attn_train.errors import ConfigError
from flash_attn_train.models import DataSizes, build_model, gpt_config
from flash_attn_train.sequence_classifier import BertForSequenceClassification
from flash_attn_train.tasks.initial_model import initial_model

SMALL: dict[str, Any] = {"n_layer": 1, "n_head": 2, "d_model": 32}
TEXT, LABELS = DataSizes(vocab_size=41), DataSizes(vocab_size=41, num_classes=3)


@pytest.mark.parametrize(
    ("config", "sizes", "kind"),
    [
        (GPTModelConfig(**SMALL), TEXT, GPTLMHeadModel),
        (BertModelConfig(**SMALL), TEXT, BertForMaskedLM),
        (BertModelConfig(**SMALL), LABELS, BertForSequenceClassification),
        (ViTModelConfig(**SMALL), LABELS, ViTForImageClassification),
    ],
)
def test_kinds(config: ModelConfig, sizes: DataSizes, kind: type) -> None:
    torch.manual_seed(0)
    model, again = build_model(config, sizes, device="meta"), build_model(config, sizes)
    assert type(model) is type(again) is kind
    assert all(parameter.is_meta for parameter in model.parameters())
    assert [p.shape for p in model.parameters()] == [p.shape for p in again.parameters()]


def test_vocabulary_is_padded() -> None:
    assert gpt_config(GPTModelConfig(), TEXT).vocab_size == 41
    assert gpt_config(GPTModelConfig(pad_vocab_multiple=128), TEXT).vocab_size == 128
    assert gpt_config(GPTModelConfig(pad_vocab_multiple=41), TEXT).vocab_size == 41


def test_share_of_a_head_that_is_rotated() -> None:
    model = GPTModelConfig(position="rotary", rotary_fraction=0.25, n_head=4, d_model=256)
    assert gpt_config(model, TEXT).num_rotary_dims == 16
    model.d_head = 128
    assert gpt_config(model, TEXT).num_rotary_dims == 32
    model.rotary_fraction = 1.0
    assert gpt_config(model, TEXT).num_rotary_dims == 128


def test_rescaled_frequencies() -> None:
    model = GPTModelConfig(position="rotary", rotary_scaling={"kind": "linear", "factor": 4.0})
    scaling = gpt_config(model, TEXT).rotary_scaling
    assert scaling is not None and scaling.kind == "linear"
    model.rotary_scaling["kind"] = "cubic"
    with pytest.raises(ConfigError, match="cubic"):
        gpt_config(model, TEXT)


class TestHuggingFace:
    def test_sizes(self) -> None:
        transformers = pytest.importorskip("transformers")
        for kind, name in (("gpt2", "n_layer"), ("llama", "num_hidden_layers")):
            shape = {name: 1, "hidden_size": 64, "num_attention_heads": 2}
            config = HuggingFaceModelConfig(model_type=kind, config=shape, max_seqlen=32)
            with torch.device("meta"):
                model = build_model(config, TEXT)
            assert isinstance(model, transformers.PreTrainedModel)
            assert (model.config.vocab_size, model.config.max_position_embeddings) == (41, 32)
            assert model.config.num_hidden_layers == 1

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"model_type": "gtp2"}, "model.model_type: got 'gtp2', .* the nearest is 'gpt2'"),
            (
                {"model_type": "vit"},
                "model.model_type: got 'vit', expected one that transformers has a causal",
            ),
            (
                {"config": {"n_layr": 2}},
                "model.config.n_layr: GPT2Config .* no such field; the nearest is 'n_layer'",
            ),
            (
                {"config": {"n_layer": "x"}},
                "model: transformers makes no gpt2 of model.config={'n_layer': 'x'}",
            ),
            ({"config": {"n_head": 5}}, "must be divisible by num_heads"),
            ({"attn_implementation": "flash9"}, "model.attn_implementation='flash9'"),
        ],
    )
    def test_bad_options(self, options: dict[str, Any], message: str) -> None:
        pytest.importorskip("transformers")
        with torch.device("meta"), pytest.raises(ConfigError, match=message) as error:
            build_model(HuggingFaceModelConfig(**options), TEXT)
        assert len(str(error.value)) < 1000

    def test_cannot_be_cut_for_tensor_parallelism(self) -> None:
        with pytest.raises(ConfigError, match="cannot be made with process_group"):
            build_model(HuggingFaceModelConfig(), TEXT, process_group=object())


def test_initial_weights_are_the_same_whatever_device_is_the_default() -> None:
    """On a GPU, Lightning makes the device the default for some strategies, and random numbers are others there."""
    config = TrainConfig(model=GPTModelConfig(max_seqlen=16, n_layer=1, n_head=2, d_model=16))
    expected = initial_model(config, DataSizes(vocab_size=50), None).state_dict()
    with torch.device("meta"):
        weights = initial_model(config, DataSizes(vocab_size=50), None).state_dict()
    for name, weight in weights.items():
        assert weight.device.type == "cpu" and torch.equal(weight, expected[name])

"""The tensors of Hugging Face's ViT checkpoints: with the head or without."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from flash_attn_models.gpt.hugging_face.state_dict import Entry, Layout, linear_entries
from flash_attn_models.vit.config import ViTConfig
from flash_attn_models.vit.entries import projection_entries
from flash_attn_models.vit.head import ViTForImageClassification
from flash_attn_models.vit.hugging_face.config import config_from_hugging_face, config_to_hugging_face
from flash_attn_models.vit.model import ViTModel

AnyViT = ViTModel | ViTForImageClassification
MODELS = (ViTModel, ViTForImageClassification)

# Modules of a layer in files (transformers renames them when it loads), and in transformers' own state dicts.
_NAMES_IN_MEMORY = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "layernorm_before": "layernorm_before",
    "layernorm_after": "layernorm_after",
}


@dataclass(frozen=True)
class Form:
    """Which of the forms of a ViT checkpoint one has.

    Attributes:
        architecture: "ViTModel" or "ViTForImageClassification".
        with_pooler: whether there is a pooler.
        prefix: of the encoder's names: "vit.", or nothing (in files of "ViTModel" alone).
    """

    architecture: str = "ViTModel"
    with_pooler: bool = False
    prefix: str = ""

    @classmethod
    def of_names(cls, names: Collection[str]) -> Form:
        """The form of a checkpoint that has tensors of these names."""
        with_head = any(name.startswith("classifier.") for name in names)
        prefix = "vit." if with_head or any(name.startswith("vit.") for name in names) else ""
        with_pooler = not with_head and any(name.startswith(f"{prefix}pooler.") for name in names)
        return cls("ViTForImageClassification" if with_head else "ViTModel", with_pooler, prefix)

    @classmethod
    def of_model(cls, model: AnyViT) -> Form:
        """The form in which transformers saves this model."""
        if isinstance(model, ViTModel):
            return cls("ViTModel", model.pooler is not None)
        return cls("ViTForImageClassification", False, "vit.")

    def build(self, config: ViTConfig, device: torch.device | str | None = None) -> AnyViT:
        """A new model of this form."""
        if self.architecture == "ViTForImageClassification":
            return ViTForImageClassification(config, device=device)
        return ViTModel(config, with_pooler=self.with_pooler, device=device)


def hugging_face_layout(config: ViTConfig, form: Form) -> Layout:
    """The tensors of a checkpoint of this config and form. Our ``Wqkv`` holds three of theirs, one below another."""
    with_head = form.architecture != "ViTModel"
    ours, theirs = "vit." if with_head else "", form.prefix
    entries = [
        *projection_entries(
            config, f"{ours}embeddings.patch_embed.proj", f"{theirs}embeddings.patch_embeddings.projection"
        ),
        Entry(f"{ours}embeddings.cls_token", (f"{theirs}embeddings.cls_token",)),
        Entry(f"{ours}embeddings.position_embeddings", (f"{theirs}embeddings.position_embeddings",)),
    ]
    other_names: dict[str, str] = {}
    for layer in range(config.n_layer):
        entries += _layer(config, f"{ours}layers.{layer}", f"{theirs}encoder.layer.{layer}")
        for module, in_memory in _NAMES_IN_MEMORY.items():
            for kind in ("weight", "bias"):
                in_files = f"{theirs}encoder.layer.{layer}.{module}.{kind}"
                other_names[in_files] = f"{theirs}layers.{layer}.{in_memory}.{kind}"
    entries += linear_entries(f"{ours}norm", f"{theirs}layernorm", True)
    if form.with_pooler:
        entries += linear_entries(f"{ours}pooler.dense", f"{theirs}pooler.dense", True)
    if with_head:
        entries += linear_entries("head", "classifier", True)
    return Layout(
        entries=tuple(entries),
        base_prefix="",  # the form says what the names are
        buffers=re.compile(r"(?!)"),  # there are none
        tied_head=None,
        embedding=entries[0].theirs[0],
        other_names=other_names,
    )


def empty_model(fields: Mapping[str, Any], names: Collection[str]) -> tuple[AnyViT, Layout]:
    """The model that this config.json and tensors of these names ask for, without memory, and its layout."""
    config, form = config_from_hugging_face(fields), Form.of_names(names)
    return form.build(config, device="meta"), hugging_face_layout(config, form)


def description(model: AnyViT) -> tuple[dict[str, Any], Layout]:
    """The contents of config.json for this model, and the layout of its checkpoint."""
    form = Form.of_model(model)
    return config_to_hugging_face(model.config, form.architecture), hugging_face_layout(model.config, form)


def _layer(config: ViTConfig, ours: str, theirs: str) -> list[Entry]:
    return [
        *linear_entries(f"{ours}.norm1", f"{theirs}.layernorm_before", True),
        *linear_entries(
            f"{ours}.mixer.Wqkv",
            tuple(f"{theirs}.attention.attention.{name}" for name in ("query", "key", "value")),
            config.qkv_bias,
            rows=(config.d_model,) * 3,
        ),
        *linear_entries(f"{ours}.mixer.out_proj", f"{theirs}.attention.output.dense", True),
        *linear_entries(f"{ours}.norm2", f"{theirs}.layernorm_after", True),
        *linear_entries(f"{ours}.mlp.fc1", f"{theirs}.intermediate.dense", True),
        *linear_entries(f"{ours}.mlp.fc2", f"{theirs}.output.dense", True),
    ]

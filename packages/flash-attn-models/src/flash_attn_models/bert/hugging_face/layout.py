"""The tensors of Hugging Face's BERT checkpoints: with heads or without, with the names of all their ages."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

import torch

from flash_attn_models.bert.config import BertConfig
from flash_attn_models.bert.heads import BertForMaskedLM, BertForPreTraining
from flash_attn_models.bert.model import BertModel
from flash_attn_models.gpt.hugging_face.state_dict import Entry, Layout

AnyBert = BertModel | BertForMaskedLM | BertForPreTraining

# Tables of positions and of token types, and a second name of the head's bias, which transformers ties to the first.
_BUFFERS = re.compile(r"(bert\.)?embeddings\.(position_ids|token_type_ids)|cls\.predictions\.decoder\.bias")


@dataclass(frozen=True)
class Form:
    """Which of the forms of a BERT checkpoint one has.

    Attributes:
        architecture: "BertModel", "BertForMaskedLM" or "BertForPreTraining".
        with_pooler: whether there is a pooler.
        prefix: of the encoder's names: "bert.", or nothing (in files of "BertModel" alone).
        norm_names: how norms call their parameters: ("weight", "bias"), or ("gamma", "beta") in files of Google's.
    """

    architecture: str = "BertModel"
    with_pooler: bool = True
    prefix: str = ""
    norm_names: tuple[str, str] = ("weight", "bias")

    @classmethod
    def of_names(cls, names: Collection[str]) -> Form:
        """The form of a checkpoint that has tensors of these names."""
        with_heads = any(name.startswith("cls.") for name in names)
        prefix = "bert." if with_heads or any(name.startswith("bert.") for name in names) else ""
        architecture = "BertModel"
        if with_heads:
            both = any(name.startswith("cls.seq_relationship.") for name in names)
            architecture = "BertForPreTraining" if both else "BertForMaskedLM"
        with_pooler = any(name.startswith(f"{prefix}pooler.") for name in names)
        of_google = any(name.endswith(".LayerNorm.gamma") for name in names)
        return cls(
            architecture,
            with_pooler or architecture == "BertForPreTraining",
            prefix,
            ("gamma", "beta") if of_google else ("weight", "bias"),
        )

    @classmethod
    def of_model(cls, model: AnyBert) -> Form:
        """The form in which transformers saves this model."""
        if isinstance(model, BertModel):
            return cls("BertModel", model.pooler is not None)
        return cls(type(model).__name__, model.bert.pooler is not None, "bert.")

    def build(self, config: BertConfig, device: torch.device | str | None = None) -> AnyBert:
        """A new model of this form."""
        if self.architecture == "BertForPreTraining":
            return BertForPreTraining(config, device=device)
        kind = BertModel if self.architecture == "BertModel" else BertForMaskedLM
        return kind(config, with_pooler=self.with_pooler, device=device)


def hugging_face_layout(config: BertConfig, form: Form) -> Layout:
    """The tensors of a checkpoint of this config and form. Our ``Wqkv`` holds three of theirs, one below another."""
    ours = "" if form.architecture == "BertModel" else "bert."
    entries = [
        Entry(f"{ours}embeddings.{name}.weight", (f"{form.prefix}embeddings.{name}.weight",))
        for name in ("word_embeddings", "position_embeddings", "token_type_embeddings")
    ]
    entries += _norm(form, f"{ours}embeddings.norm", f"{form.prefix}embeddings.LayerNorm")
    for layer in range(config.n_layer):
        entries += _layer(config, form, f"{ours}layers.{layer}", f"{form.prefix}encoder.layer.{layer}")
    if form.with_pooler:
        entries += _linear(f"{ours}pooler.dense", f"{form.prefix}pooler.dense")
    if form.architecture != "BertModel":
        entries += [
            *_linear("head.dense", "cls.predictions.transform.dense"),
            *_norm(form, "head.norm", "cls.predictions.transform.LayerNorm"),
            Entry("head.bias", ("cls.predictions.bias",)),
        ]
    if form.architecture == "BertForPreTraining":
        entries += _linear("seq_relationship", "cls.seq_relationship")
    return Layout(
        entries=tuple(entries),
        base_prefix="",  # the form says what the names are
        buffers=_BUFFERS,
        tied_head=None if form.architecture == "BertModel" else "cls.predictions.decoder.weight",
        embedding=entries[0].theirs[0],
    )


def _layer(config: BertConfig, form: Form, ours: str, theirs: str) -> list[Entry]:
    rows = (config.d_model,) * 3
    return [
        *(
            Entry(
                f"{ours}.mixer.Wqkv.{kind}",
                tuple(f"{theirs}.attention.self.{name}.{kind}" for name in ("query", "key", "value")),
                rows=rows,
            )
            for kind in ("weight", "bias")
        ),
        *_linear(f"{ours}.mixer.out_proj", f"{theirs}.attention.output.dense"),
        *_norm(form, f"{ours}.norm1", f"{theirs}.attention.output.LayerNorm"),
        *_linear(f"{ours}.mlp.fc1", f"{theirs}.intermediate.dense"),
        *_linear(f"{ours}.mlp.fc2", f"{theirs}.output.dense"),
        *_norm(form, f"{ours}.norm2", f"{theirs}.output.LayerNorm"),
    ]


def _linear(ours: str, theirs: str) -> list[Entry]:
    return [Entry(f"{ours}.{kind}", (f"{theirs}.{kind}",)) for kind in ("weight", "bias")]


def _norm(form: Form, ours: str, theirs: str) -> list[Entry]:
    return [
        Entry(f"{ours}.{kind}", (f"{theirs}.{name}",))
        for kind, name in zip(("weight", "bias"), form.norm_names, strict=True)
    ]

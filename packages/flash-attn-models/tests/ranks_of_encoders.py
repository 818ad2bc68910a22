"""BERT and ViT spread over several ranks against the same in one process: outputs, losses, all gradients.

In float64, where what differs is the order of sums. Run by test_models_tensor_parallel_launch.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flash_attn_models.bert import BertForMaskedLM, BertForPreTraining, BertModel, encode
from flash_attn_models.vit import ViTForImageClassification, ViTModel
from torch import Tensor
from whole_and_part import (
    FP64,
    SEQUENCE_PARALLEL,
    all_ranks,
    check_gradients,
    close,
    draw_ids,
    pair,
)


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


def test_bad_input_of_vit(group, device, tiny_vit) -> None:
    vit = ViTModel(tiny_vit(), device=device, process_group=group, sequence_parallel=True)
    with pytest.raises(ValueError, match=r"images: got .*a multiple of"):
        vit(torch.randn(group.size() + 1, 3, 12, 12, device=device))

"""Models whose layers are cut by torch's fully_shard: a layer is whole when, and only when, it is called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from flash_attn_models.bert import BertConfig, BertForMaskedLM, BertForPreTraining
from flash_attn_models.generation import generate
from flash_attn_models.generation.cuda_graph import why_no_graph
from flash_attn_models.gpt import GPTConfig, GPTLMHeadModel
from flash_attn_models.vit import ViTConfig, ViTForImageClassification
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

SHAPE = {"n_layer": 2, "n_head": 2, "d_model": 32}


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def masked_lm(model_class: type[nn.Module]) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    ids = torch.randint(101, (3, 20))
    mask = (torch.arange(20) < torch.tensor([[20], [13], [6]])).long()
    labels = torch.where((torch.rand(ids.shape) < 0.3) & (mask > 0), ids, -100)
    config = BertConfig(vocab_size=101, max_seqlen=32, dropout=0.0, attn_dropout=0.0, **SHAPE)
    more = {"next_sentence_labels": torch.tensor([1, 0, 1])} if model_class is BertForPreTraining else {}
    return model_class(config), lambda model: model(ids, mask, labels=labels, **more).loss


def image_classes(pooling: str) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    images, labels = torch.randn(3, 3, 16, 16), torch.tensor([1, 0, 4])
    config = ViTConfig(image_size=16, patch_size=4, n_classes=5, pooling=pooling, **SHAPE)
    return ViTForImageClassification(config), lambda model: model(images, labels=labels).loss


def next_tokens() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    ids, labels = torch.randint(101, (3, 20)), torch.randint(101, (3, 20))
    return GPTLMHeadModel(GPTConfig(vocab_size=101, max_seqlen=32, **SHAPE)), lambda model: model.loss(
        ids, labels
    )


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    layers = next(part for part in model.modules() if isinstance(part, nn.ModuleList))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if hasattr(model, "loss"):
        register_fsdp_forward_method(model, "loss")


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: masked_lm(BertForMaskedLM), id="masked_lm"),
        pytest.param(lambda: masked_lm(BertForPreTraining), id="pre_training"),
        pytest.param(lambda: image_classes("token"), id="class_token"),
        pytest.param(lambda: image_classes("avg"), id="mean_of_patches"),
        pytest.param(next_tokens, id="gpt"),
    ],
)
def test_loss_and_gradients_are_those_of_the_whole_model(
    mesh: DeviceMesh, make: Callable[[], tuple[nn.Module, Callable[[nn.Module], Tensor]]]
) -> None:
    model, loss_of = make()
    expected = loss_of(model)
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()

    shard(model, mesh)
    loss = loss_of(model)
    loss.backward()
    assert torch.equal(loss, expected)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad.full_tensor(), gradients[name]), name


def test_generation_is_that_of_the_whole_model(mesh: DeviceMesh) -> None:
    model, _ = next_tokens()
    ids = torch.randint(101, (2, 5))
    expected = generate(model, ids, 8)
    shard(model, mesh)
    assert torch.equal(generate(model, ids, 8), expected)


def test_steps_that_gather_weights_are_not_captured(
    mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = next_tokens()
    shard(model, mesh)

    class OnGPU:
        device = torch.device("cuda")

    monkeypatch.setattr(GPTLMHeadModel, "head_weight", OnGPU)
    assert why_no_graph(model) == "a model over several devices"

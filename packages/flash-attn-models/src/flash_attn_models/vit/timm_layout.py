"""The state dicts of timm's ``VisionTransformer``, both ways. timm itself is not needed."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from flash_attn_models.errors import bad_argument, listed
from flash_attn_models.gpt.hugging_face.state_dict import (
    Entry,
    Layout,
    from_hugging_face,
    linear_entries,
    to_hugging_face,
)
from flash_attn_models.vit.config import ViTConfig
from flash_attn_models.vit.entries import projection_entries
from flash_attn_models.vit.head import ViTForImageClassification
from flash_attn_models.vit.model import ViTModel


def from_timm(
    state_dict: Mapping[str, Tensor],
    config: ViTConfig,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> ViTModel | ViTForImageClassification:
    """The model with the weights of one of timm's, in evaluation mode. The weights are copied.

    Args:
        state_dict: of a ``VisionTransformer``, with the head or without.
        config: of the same architecture. timm's ``global_pool`` is our pooling, ``num_classes`` n_classes,
            ``drop_path_rate`` drop_path, ``proj_drop_rate`` dropout, ``pos_drop_rate`` embedding_dropout, ``drop_rate``
            head_dropout, ``fc_norm`` norm_after_pooling.
        device, dtype: of the model; None are the weights' own.

    Raises:
        ValueError: missing, unexpected or wrongly shaped tensors, by name with the closest match.
    """
    with_head = any(name.startswith("head.") for name in state_dict)
    model = (ViTForImageClassification if with_head else ViTModel)(config, device="meta")
    layout = timm_layout(config, with_head)
    _check(state_dict, layout, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})
    weights = {
        name: tensor.detach().to(device, dtype, copy=True, memory_format=torch.contiguous_format)
        for name, tensor in from_hugging_face(state_dict, layout).items()
    }
    model.load_state_dict(weights, assign=True)
    return model.eval()


def to_timm(model: ViTModel | ViTForImageClassification) -> dict[str, Tensor]:
    """The state dict that timm's ``VisionTransformer`` loads; the exact inverse of ``from_timm``.

    Raises:
        ValueError: a model with a pooler, which timm lacks; a model of another kind.
    """
    if not isinstance(model, (ViTModel, ViTForImageClassification)):
        raise bad_argument("model", f"a {type(model).__name__}", "a ViT model", "unwrap it, or load one")
    with_head = isinstance(model, ViTForImageClassification)
    if isinstance(model, ViTModel) and model.pooler is not None:
        raise bad_argument("model", "a pooler", "none, as in timm's models", "set model.pooler = None")
    return to_hugging_face(model.state_dict(), timm_layout(model.config, with_head))


def timm_layout(config: ViTConfig, with_head: bool) -> Layout:
    """The tensors of timm's model of this config. Its packed projection has our order of rows."""
    ours = "vit." if with_head else ""
    entries = projection_entries(config, f"{ours}embeddings.patch_embed.proj", "patch_embed.proj")
    if config.class_token:
        entries.append(Entry(f"{ours}embeddings.cls_token", ("cls_token",)))
    entries.append(Entry(f"{ours}embeddings.position_embeddings", ("pos_embed",)))
    for layer in range(config.n_layer):
        mine, theirs = f"{ours}layers.{layer}", f"blocks.{layer}"
        entries += [
            *linear_entries(f"{mine}.norm1", f"{theirs}.norm1", True),
            *linear_entries(f"{mine}.mixer.Wqkv", f"{theirs}.attn.qkv", config.qkv_bias),
            *linear_entries(f"{mine}.mixer.out_proj", f"{theirs}.attn.proj", True),
            *linear_entries(f"{mine}.norm2", f"{theirs}.norm2", True),
            *linear_entries(f"{mine}.mlp.fc1", f"{theirs}.mlp.fc1", True),
            *linear_entries(f"{mine}.mlp.fc2", f"{theirs}.mlp.fc2", True),
        ]
    entries += linear_entries(f"{ours}norm", "fc_norm" if config.norms_features else "norm", True)
    if with_head:
        entries += linear_entries("head", "head", True)
    return Layout(
        entries=tuple(entries),
        base_prefix="",
        buffers=re.compile(r"(?!)"),  # there are none
        tied_head=None,
        embedding=entries[0].theirs[0],
    )


def _check(state_dict: Mapping[str, Tensor], layout: Layout, shapes: Mapping[str, tuple[int, ...]]) -> None:
    expected = {
        name: shape
        for entry in layout.entries
        for name, shape in zip(entry.theirs, entry.split_shapes(shapes[entry.ours]), strict=True)
    }
    missing = [name for name in expected if name not in state_dict]
    unexpected = [name for name in state_dict if name not in expected]
    wrong = [
        f"{name} {tuple(state_dict[name].shape)} instead of {shape}"
        for name, shape in expected.items()
        if name in state_dict and state_dict[name].shape != shape
    ]
    problems = [
        *([f"missing {listed(missing, unexpected)}"] if missing else []),
        *([f"unexpected {listed(unexpected, missing)}"] if unexpected else []),
        *([listed(wrong)] if wrong else []),
    ]
    if problems:
        raise bad_argument(
            "state_dict",
            "; ".join(problems),
            "exactly the tensors of a timm VisionTransformer of this config",
            "give the config of this state dict (for other images than it was trained with: its own image_size, "
            "and then with_image_size)",
        )

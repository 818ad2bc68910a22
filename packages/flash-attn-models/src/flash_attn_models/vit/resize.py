"""A model for images of another size."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TypeVar

from flash_attn_models.errors import bad_argument
from flash_attn_models.vit.config import Size
from flash_attn_models.vit.embeddings import ViTEmbeddings
from flash_attn_models.vit.head import ViTForImageClassification
from flash_attn_models.vit.model import ViTModel
from flash_attn_models.vit.positions import interpolate_positions

AViT = TypeVar("AViT", ViTModel, ViTForImageClassification)


def with_image_size(model: AViT, image_size: Size, *, antialias: bool = False) -> AViT:
    """A copy of the model with interpolated positions, to train or use at another image size.

    Args:
        model: stays as it is.
        image_size: in pixels, one number or (height, width); whole patches.
        antialias: see ``interpolate_positions``.

    Raises:
        ValueError: an image size that is not whole patches; a model of another kind.
    """
    if not isinstance(model, (ViTModel, ViTForImageClassification)):
        raise bad_argument("model", f"a {type(model).__name__}", "a ViT model", "unwrap it, or load one")
    old, new = model.config, replace(model.config, image_size=image_size)
    other = copy.deepcopy(model)
    encoder = other if isinstance(other, ViTModel) else other.vit
    weights = encoder.embeddings.state_dict()
    weights["position_embeddings"] = interpolate_positions(
        weights["position_embeddings"], old.grid, new.grid, n_prefix=old.n_prefix, antialias=antialias
    ).contiguous()
    embeddings = ViTEmbeddings(new, device="meta", parallel=encoder.parallel)
    embeddings.load_state_dict(weights, assign=True)
    for mine, its in zip(embeddings.parameters(), encoder.embeddings.parameters(), strict=True):
        mine.requires_grad_(its.requires_grad)
    encoder.embeddings = embeddings.train(encoder.embeddings.training)
    other.config = encoder.config = new
    return other

"""ViT: images to features and classes."""

from flash_attn_models.vit.config import ViTConfig
from flash_attn_models.vit.head import ViTClassifierOutput, ViTForImageClassification
from flash_attn_models.vit.model import ViTModel, ViTOutput
from flash_attn_models.vit.positions import interpolate_positions
from flash_attn_models.vit.resize import with_image_size
from flash_attn_models.vit.timm_layout import from_timm, to_timm

__all__ = [
    "ViTClassifierOutput",
    "ViTConfig",
    "ViTForImageClassification",
    "ViTModel",
    "ViTOutput",
    "from_timm",
    "interpolate_positions",
    "to_timm",
    "with_image_size",
]

"""What the layouts of ViT checkpoints have in common: entries of convolutions, layers and norms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flash_attn_ops.patch_embed import conv_weight_of_linear, linear_weight_of_conv
from torch import Tensor

from flash_attn_models.gpt.hugging_face.state_dict import Entry
from flash_attn_models.vit.config import ViTConfig


@dataclass(frozen=True)
class ConvEntry(Entry):
    """Our linear weight over patches, (N, C P1 P2), of their convolution's, (N, C, P1, P2)."""

    n_channels: int = 3
    patch: tuple[int, int] = (16, 16)

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Our tensor from theirs."""
        return linear_weight_of_conv(tensors[0])

    def split(self, tensor: Tensor) -> list[Tensor]:
        """Their tensor from ours; the inverse of ``join``. Contiguous."""
        return [conv_weight_of_linear(tensor, self.patch, self.n_channels).contiguous()]

    def split_shapes(self, shape: Sequence[int]) -> list[tuple[int, ...]]:
        """The shape of their tensor when ours has this shape."""
        return [(shape[0], self.n_channels, *self.patch)]


def projection_entries(config: ViTConfig, ours: str, theirs: str) -> list[Entry]:
    """The entries of the projection of patches."""
    return [
        ConvEntry(
            f"{ours}.weight", (f"{theirs}.weight",), n_channels=config.n_channels, patch=config.patch_pair
        ),
        Entry(f"{ours}.bias", (f"{theirs}.bias",)),
    ]

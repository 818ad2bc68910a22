"""Images to tokens with positions."""

from __future__ import annotations

from typing import Any

import torch
from flash_attn_ops.patch_embed import PatchEmbed, patches_of
from torch import Tensor, nn

from flash_attn_models.errors import bad_argument
from flash_attn_models.tensor_parallel.plan import SINGLE_PROCESS, TensorParallel
from flash_attn_models.vit.config import ViTConfig
from flash_attn_models.vit.positions import interpolate_positions


class ViTEmbeddings(nn.Module):
    """[class token | patches W^T + b] + positions.

    Parameters: ``patch_embed.proj``, ``cls_token`` (1,1,N) or None, ``position_embeddings`` (1,S,N).
    """

    cls_token: nn.Parameter | None

    def __init__(
        self,
        config: ViTConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        parallel: TensorParallel = SINGLE_PROCESS,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.config = config
        self.parallel = parallel
        self.patch_embed = PatchEmbed(
            config.image_size, config.patch_size, config.n_channels, config.d_model, **factory
        )
        cls_token = nn.Parameter(torch.empty(1, 1, config.d_model, **factory)) if config.class_token else None
        self.register_parameter("cls_token", cls_token)
        self.position_embeddings = nn.Parameter(torch.empty(1, config.n_tokens, config.d_model, **factory))
        parallel.mark(self)
        self.reset_parameters()

    def forward(self, images: Tensor, interpolate: bool = False) -> Tensor:
        """images (B,C,height,width) -> (B,S,N), or of this rank's images. See ``ViTModel.forward``."""
        self._check(images, interpolate)
        images = self.parallel.own_part(images, self.training)
        positions: Tensor = self.position_embeddings
        if images.shape[2:] != self.config.image_pair:
            rows, columns = self.config.patch_pair
            grid = (images.shape[2] // rows, images.shape[3] // columns)
            positions = interpolate_positions(
                positions, self.config.grid, grid, n_prefix=self.config.n_prefix
            )
        tokens = self.patch_embed.proj(patches_of(images, self.config.patch_size).flatten(1, 2))
        if self.cls_token is not None:
            tokens = torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        return tokens + positions

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the class token and the positions anew. The projection is a layer of its own."""
        for parameter in (self.cls_token, self.position_embeddings):
            if parameter is not None:
                nn.init.normal_(parameter, std=self.config.initializer_range)

    def _check(self, images: Tensor, interpolate: bool) -> None:
        weight = self.patch_embed.proj.weight
        (height, width), (rows, columns) = self.config.image_pair, self.config.patch_pair
        channels = self.config.n_channels
        if images.ndim != 4 or images.shape[1] != channels or 0 in images.shape[2:]:
            raise bad_argument(
                "images",
                f"shape {tuple(images.shape)}",
                f"(batch, {channels}, height, width)",
                "add a batch dimension with images[None], or put the channels second with images.movedim(-1, 1)",
            )
        if images.shape[2:] != (height, width):
            if not interpolate:
                raise bad_argument(
                    "images",
                    f"shape {tuple(images.shape)}",
                    f"(batch, {channels}, {height}, {width}), the model's image_size",
                    "resize the images, or pass interpolate_positions=True",
                )
            if images.shape[2] % rows or images.shape[3] % columns:
                raise bad_argument(
                    "images",
                    f"shape {tuple(images.shape)}",
                    f"whole patches of {rows} x {columns}",
                    "crop, pad or resize the images",
                )
        if not images.is_floating_point():
            raise bad_argument(
                "images",
                images.dtype,
                f"normalised values in {weight.dtype}",
                "scale and normalise them as the model's image processor does",
            )
        if images.device != weight.device:
            raise bad_argument(
                "images",
                f"device {images.device}",
                f"the model's device {weight.device}",
                f"use images.to({str(weight.device)!r})",
            )
        if images.dtype != weight.dtype and not torch.is_autocast_enabled(weight.device.type):
            raise bad_argument(
                "images",
                images.dtype,
                f"the model's dtype {weight.dtype}",
                f"convert them with images.to({weight.dtype})",
            )

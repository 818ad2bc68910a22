"""Images to tokens: one linear layer over non-overlapping patches (Dosovitskiy et al. 2020, arXiv:2010.11929).

It is the convolution whose stride is its kernel, as a matrix product: patch (i, j) of an image, as a vector over
(channel, row, column), times the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from flash_attn_ops.arguments import bad_argument, check_floating, check_given

Size = int | tuple[int, int]


def patches_of(images: Tensor, patch_size: Size) -> Tensor:
    """(B, C, H, W) -> (B, H / P1, W / P2, C P1 P2): patches as vectors over (channel, row, column).

    Raises:
        ValueError: images that are not four-dimensional or do not consist of whole patches.
    """
    rows, columns = _pair("patch_size", patch_size)
    if images.dim() != 4 or images.shape[2] % rows or images.shape[3] % columns:
        raise bad_argument(
            "images",
            f"shape {tuple(images.shape)}",
            f"(batch, channels, height, width) in whole patches of {rows} x {columns}",
            "crop, pad or resize them",
        )
    grid = images.unflatten(3, (-1, columns)).unflatten(2, (-1, rows))  # B, C, h, P1, w, P2
    return grid.permute(0, 2, 4, 1, 3, 5).flatten(3)


def linear_weight_of_conv(weight: Tensor) -> Tensor:
    """The weight of ``Conv2d(C, E, P, stride=P)``, (E, C, P1, P2), as that of :class:`PatchEmbed`: (E, C P1 P2)."""
    if weight.dim() != 4:
        raise bad_argument(
            "weight", f"shape {tuple(weight.shape)}", "(embed_dim, channels, P1, P2)", "pass a Conv2d weight"
        )
    return weight.flatten(1)


def conv_weight_of_linear(weight: Tensor, patch_size: Size, in_chans: int = 3) -> Tensor:
    """The inverse of :func:`linear_weight_of_conv`."""
    rows, columns = _pair("patch_size", patch_size)
    if weight.dim() != 2 or weight.shape[1] != in_chans * rows * columns:
        raise bad_argument(
            "weight",
            f"shape {tuple(weight.shape)}",
            f"(embed_dim, {in_chans * rows * columns}), of {in_chans} channels and patches of {rows} x {columns}",
            "pass the patch size and channels that the weight was made for",
        )
    return weight.unflatten(1, (in_chans, rows, columns))


class PatchEmbed(nn.Module):
    """norm(patches W^T + b): images as tokens.

    Args:
        img_size: height and width, or one number for both; images of another size are refused.
        patch_size: height and width of a patch, likewise.
        in_chans: channels.
        embed_dim: features of a token.
        norm_layer: called with embed_dim, gives the module that is applied to the tokens; none by default.
        flatten: tokens in one dimension, instead of the grid of patches.
        bias: whether the projection has one.
        device, dtype: of the parameters; the norm's are up to ``norm_layer``.

    Raises:
        ValueError: an image that does not consist of whole patches.

    ``proj`` is a ``torch.nn.Linear``: :func:`linear_weight_of_conv` converts checkpoints of convolutions.
    """

    def __init__(
        self,
        img_size: Size = 224,
        patch_size: Size = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer: Callable[[int], nn.Module] | None = None,
        flatten: bool = True,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.img_size, self.patch_size = _pair("img_size", img_size), _pair("patch_size", patch_size)
        (height, width), (rows, columns) = self.img_size, self.patch_size
        if height % rows or width % columns:
            raise bad_argument(
                "img_size",
                self.img_size,
                f"whole patches of {rows} x {columns}",
                "choose a patch_size that divides it",
            )
        self.grid_size = (height // rows, width // columns)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.in_chans = in_chans
        self.flatten = flatten
        self.proj = nn.Linear(in_chans * rows * columns, embed_dim, bias=bias, device=device, dtype=dtype)
        self.norm = norm_layer(embed_dim) if norm_layer is not None else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, num_patches, embed_dim), or (B, H / P1, W / P2, embed_dim) without ``flatten``.

        Raises:
            ValueError: images of another size or number of channels.
        """
        check_given(images=images)
        check_floating(images=images)
        expected = (self.in_chans, *self.img_size)
        if images.dim() != 4 or images.shape[1:] != expected:
            raise bad_argument(
                "images",
                f"shape {tuple(images.shape)}",
                f"(batch, {', '.join(map(str, expected))})",
                "resize the images, or make the layer with their img_size and in_chans",
            )
        tokens = self.proj(patches_of(images, self.patch_size))
        return self.norm(tokens.flatten(1, 2) if self.flatten else tokens)


def _pair(name: str, size: Size) -> tuple[int, int]:
    pair = tuple(size) if isinstance(size, Sequence) else (size, size)
    if len(pair) != 2 or not all(isinstance(length, int) and length > 0 for length in pair):
        raise bad_argument(name, size, "a positive number, or (height, width)", "pass one of them")
    return pair[0], pair[1]

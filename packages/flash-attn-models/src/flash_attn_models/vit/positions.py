"""Position embeddings for images of another size."""

from __future__ import annotations

from torch import Tensor, cat
from torch.nn import functional as F

from flash_attn_models.errors import bad_argument


def interpolate_positions(
    positions: Tensor,
    grid: tuple[int, int],
    new_grid: tuple[int, int],
    *,
    n_prefix: int = 1,
    antialias: bool = False,
) -> Tensor:
    """Position embeddings of another grid of patches, by bicubic interpolation in float32 (float64 of float64).

    Args:
        positions: (1,S,N) with S = n_prefix + grid[0] grid[1]: of the tokens before the patches, then of the patches,
            row by row.
        grid: patches in a column and in a row, of ``positions``.
        new_grid: the same, of the result.
        n_prefix: tokens before the patches, whose positions stay as they are.
        antialias: filter before sampling fewer positions. timm does, transformers does not.

    Returns:
        (1, n_prefix + new_grid[0] new_grid[1], N) in the dtype of positions; differentiable.

    Raises:
        ValueError: positions of another shape than the grid says; grids without patches.
    """
    for name, pair in (("grid", grid), ("new_grid", new_grid)):
        if len(pair) != 2 or min(pair) < 1:
            raise bad_argument(
                name, pair, "(rows, columns) of at least one patch", "divide image by patch size"
            )
    expected = n_prefix + grid[0] * grid[1]
    if positions.ndim != 3 or positions.shape[0] != 1 or positions.shape[1] != expected:
        raise bad_argument(
            "positions",
            f"shape {tuple(positions.shape)}",
            f"(1, {expected}, d_model): {n_prefix} and {grid[0]} x {grid[1]} patches",
            "pass the grid and n_prefix that the positions were made for",
        )
    if tuple(grid) == tuple(new_grid):
        return positions
    prefix, patches = positions[:, :n_prefix], positions[:, n_prefix:]
    if patches.element_size() < 4:
        patches = patches.float()
    image = patches.transpose(1, 2).unflatten(2, tuple(grid))  # 1, N, rows, columns
    image = F.interpolate(image, size=tuple(new_grid), mode="bicubic", antialias=antialias)
    return cat([prefix, image.flatten(2).transpose(1, 2).to(positions.dtype)], dim=1)

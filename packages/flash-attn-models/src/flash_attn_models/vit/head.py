"""ViT with its head: classes of images."""

from __future__ import annotations

from typing import NamedTuple

import torch
from flash_attn_ops.cross_entropy import cross_entropy
from flash_attn_ops.distributed import GroupLike
from torch import Tensor, nn

from flash_attn_models.bert.model import initialize
from flash_attn_models.errors import bad_argument
from flash_attn_models.tensor_parallel.initial import count_parameters
from flash_attn_models.vit.config import ViTConfig
from flash_attn_models.vit.model import ViTModel


class ViTClassifierOutput(NamedTuple):
    """What ``ViTForImageClassification`` computes.

    Attributes:
        logits: (B,n_classes).
        loss: a float32 scalar if labels were given: the mean cross-entropy.
    """

    logits: Tensor
    loss: Tensor | None


class ViTForImageClassification(nn.Module):
    """head(dropout(features)). See ``ViTModel`` for the arguments and the initial weights.

    All ranks have the whole head, and compute it alike.

    Raises:
        ValueError: ``config.n_classes`` is 0.
    """

    def __init__(
        self,
        config: ViTConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        process_group: GroupLike = None,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__()
        if config.n_classes == 0:
            raise bad_argument("ViTConfig.n_classes", 0, "at least one class", "set it, or use ViTModel")
        self.config = config
        self.vit = ViTModel(
            config,
            device=device,
            dtype=dtype,
            process_group=process_group,
            sequence_parallel=sequence_parallel,
        )
        self.parallel = self.vit.parallel
        self.dropout = nn.Dropout(config.head_dropout)
        self.head = nn.Linear(config.d_model, config.n_classes, device=device, dtype=dtype)
        initialize(self.head, config.initializer_range)

    def forward(
        self, images: Tensor, labels: Tensor | None = None, *, interpolate_positions: bool = False
    ) -> ViTClassifierOutput:
        """Logits of the classes, and the loss if there are labels.

        Args:
            images, interpolate_positions: see ``ViTModel.forward``.
            labels: int64 (B,), each in [0, n_classes), or -100 for an image that does not count.

        Raises:
            ValueError: images or labels of the wrong shape, dtype or device; labels that are no classes.
        """
        features = self.vit.features(images, interpolate_positions=interpolate_positions)
        if labels is not None and labels.shape != features.shape[:1]:
            raise bad_argument(
                "labels",
                f"shape {tuple(labels.shape)}",
                f"({features.shape[0]},), one class for each image",
                "give the number of each image's class",
            )
        logits = self.head(self.dropout(features))
        return ViTClassifierOutput(logits, None if labels is None else cross_entropy(logits, labels))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new initial weights from torch's global random generator."""
        self.vit.reset_parameters()
        initialize(self.head, self.config.initializer_range)

    def num_parameters(self) -> int:
        """Number of parameters."""
        return count_parameters(self)

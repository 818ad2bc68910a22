"""The ViT encoder: embeddings, pre-norm blocks, last norm, pooling."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from flash_attn_ops.distributed import GroupLike
from flash_attn_ops.norm import LayerNorm
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flash_attn_models.bert.model import Pooler, initialize
from flash_attn_models.errors import bad_argument
from flash_attn_models.tensor_parallel.initial import count_parameters
from flash_attn_models.tensor_parallel.plan import TensorParallel
from flash_attn_models.vit.attention import ViTAttention
from flash_attn_models.vit.block import Branch, ViTBlock
from flash_attn_models.vit.config import ViTConfig
from flash_attn_models.vit.embeddings import ViTEmbeddings


class ViTOutput(NamedTuple):
    """What the encoder computes.

    Attributes:
        hidden: (B,S,d_model), the class token first, then the patches, row by row.
        pooled: (B,d_model), tanh(dense(class token)); None without a pooler.
    """

    hidden: Tensor
    pooled: Tensor | None


class ViTModel(nn.Module):
    """ViT's encoder.

    Weights start normal with standard deviation ``config.initializer_range``, positions and class token too; biases
    zero, norms one.

    Args:
        config: the architecture.
        with_pooler: whether there is a pooler over the class token.
        device, dtype: of the parameters; None is torch's default. On device "meta" nothing is allocated.
        process_group: the ranks over which heads and MLPs are cut: a ProcessGroup or a one-dimensional DeviceMesh; None
            is a single process. With one seed on all ranks, weights start as in a single process.
        sequence_parallel: in training mode, what is between layers is cut over the ranks too, along the images, which
            they must divide. After backward, ``flash_attn_models.tensor_parallel.reduce_gradients(model)`` must be
            called.

    Attributes:
        activation_checkpointing: if set to True, each layer is computed again in the backward pass instead of
            keeping what it computed. False after construction.

    Raises:
        ValueError: a pooler without a class token, or with a norm after pooling; heads or widths that the ranks cannot
            share.
    """

    def __init__(
        self,
        config: ViTConfig,
        *,
        with_pooler: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        process_group: GroupLike = None,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__()
        if with_pooler and (not config.class_token or config.norms_features):
            raise bad_argument(
                "with_pooler",
                f"True with class_token={config.class_token} and the last norm "
                f"{'after' if config.norms_features else 'before'} pooling",
                "a normalised class token",
                "leave the pooler out, and use features(images)",
            )
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.config = config
        self.parallel = parallel = TensorParallel.of(process_group, sequence_parallel)
        self.activation_checkpointing = False
        self.embeddings = ViTEmbeddings(config, parallel=parallel, **factory)
        self.layers = nn.ModuleList(
            _block(config, layer, parallel, factory) for layer in range(config.n_layer)
        )
        self.norm = LayerNorm(config.d_model, eps=config.norm_eps, **factory)
        parallel.mark(self.norm)
        self.pooler = Pooler(config.d_model, **factory) if with_pooler else None
        self.reset_parameters()

    def forward(self, images: Tensor, *, interpolate_positions: bool = False) -> ViTOutput:
        """Hidden states of all tokens.

        Args:
            images: (B,C,height,width), normalised, in the model's dtype (under autocast, any floating-point dtype).
            interpolate_positions: take images of any size in whole patches, with positions by bicubic interpolation.

        Returns:
            hidden (B,S,d_model): after the last norm, or before it where that belongs to the features
            (``config.norm_after_pooling``); and pooled (B,d_model).

        Raises:
            ValueError: images of the wrong shape, dtype or device.
        """
        with self._randomness():
            branch = self._encode(images, interpolate_positions)
            branch = self._run(self.layers[-1], branch)
            hidden = branch.sum() if self.config.norms_features else self._normed(branch)
        hidden = self.parallel.whole(hidden, self.training)
        return ViTOutput(hidden, None if self.pooler is None else self.pooler(hidden[:, 0]))

    def features(self, images: Tensor, *, interpolate_positions: bool = False) -> Tensor:
        """One vector for each image: (B,d_model), what the classification head takes.

        If the class token is what is pooled, the last layer computes nothing but keys and values for the others.
        Arguments and errors are those of ``forward``.
        """
        with self._randomness():
            features = self._features(images, interpolate_positions)
        return self.parallel.whole(features, self.training)

    def _features(self, images: Tensor, interpolate: bool) -> Tensor:
        branch = self._encode(images, interpolate)
        if self.config.pooling == "token":
            return self._normed(self._run(self.layers[-1], branch, only_first=True))[:, 0]
        branch = self._run(self.layers[-1], branch)
        if not self.config.norms_features:
            return self._normed(branch)[:, self.config.n_prefix :].mean(dim=1)
        return self.norm(branch.sum()[:, self.config.n_prefix :].mean(dim=1)).to(branch.x.dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new initial weights from torch's global random generator."""
        initialize(self, self.config.initializer_range)
        self.embeddings.reset_parameters()

    def num_parameters(self) -> int:
        """Number of parameters."""
        return count_parameters(self)

    def _randomness(self) -> AbstractContextManager[None]:
        config = self.config
        rates = (config.dropout, config.embedding_dropout_p, config.attn_dropout, config.drop_path)
        return self.parallel.randomness_of_tokens(self.training and max(rates) > 0.0)

    def _encode(self, images: Tensor, interpolate: bool) -> Branch:
        """All layers but the last."""
        self.parallel.check_mode(self.training, images.shape[0], "images")
        x = self.embeddings(images, interpolate)
        branch = Branch(x, dropout=self.config.embedding_dropout_p if self.training else 0.0)
        for layer in self.layers[:-1]:
            branch = self._run(layer, branch)
        return branch

    def _run(self, layer: nn.Module, branch: Branch, **what: Any) -> Branch:
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, branch, use_reentrant=False, **what)
        return layer(branch, **what)

    def _normed(self, branch: Branch) -> Tensor:
        return branch.norm(self.norm, self.config.residual_in_fp32)[0]


def _block(config: ViTConfig, layer: int, parallel: TensorParallel, factory: dict[str, Any]) -> ViTBlock:
    def norm() -> LayerNorm:
        return LayerNorm(config.d_model, eps=config.norm_eps, **factory)

    mixer = ViTAttention(
        config.d_model,
        config.n_head,
        qkv_bias=config.qkv_bias,
        dropout=config.attn_dropout,
        parallel=parallel,
        **factory,
    )
    block = ViTBlock(
        norm(),
        mixer,
        norm(),
        parallel.mlp(config.d_model, config.inner_dim, config.activation, **factory),
        dropout=config.dropout,
        drop_path=config.drop_path_of(layer),
        residual_in_fp32=config.residual_in_fp32,
    )
    parallel.mark(block.norm1, block.norm2)
    return block

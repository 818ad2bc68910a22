"""The shape of a vision transformer: one typed, validated dataclass."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flash_attn_models.errors import bad_argument, did_you_mean
from flash_attn_models.typed_config import config_of, is_int, is_number, preset_of

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")
POOLINGS = ("token", "avg")

Size = int | tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """Architecture of a vision transformer.

    Source: Dosovitskiy et al. 2020, arXiv:2010.11929.

    Sizes:
        image_size: height and width of images in pixels, one number for both or (height, width).
        patch_size: of a patch, likewise; images are whole patches.
        n_channels: of images.
        n_classes: of the classification head; 0 is no head.
        n_layer, n_head, d_model: depth, heads, width.
        d_inner: width inside the MLP; None is 4 d_model.

    Architecture:
        qkv_bias: whether the projection of queries, keys and values has a bias. All other layers have one.
        activation: "gelu", "gelu_tanh", "relu" or "silu", of the MLPs.
        norm_eps: of the norms.
        class_token: whether a learned token stands before the patches.
        pooling: what the features of an image are: "token", the class token's, or "avg", the mean of the patches'.
        norm_after_pooling: the last norm is that of the features, and not of the tokens. None: with "avg" alone.
        residual_in_fp32: keep the residual stream in float32 where the model is in 16 bits.

    Training:
        dropout: of the output of attention and MLP, and of the embedding.
        embedding_dropout: of the embedding, if it is another; None is the same.
        attn_dropout: of the attention probabilities.
        head_dropout: of the features that the head takes.
        drop_path: probability with which a sample skips a branch of the last layer; it grows linearly with depth, from
            0 in the first (stochastic depth: Huang et al. 2016, arXiv:1603.09382).
        initializer_range: standard deviation of the initial weights.

    Labels:
        class_names: of the classes, for people; None if they have none.

    Raises ValueError, naming the field, for values that do not make a model.
    """

    image_size: Size
    patch_size: Size
    n_layer: int
    n_head: int
    d_model: int
    d_inner: int | None = None
    n_channels: int = 3
    n_classes: int = 1000
    qkv_bias: bool = True
    activation: str = "gelu"
    norm_eps: float = 1e-6
    class_token: bool = True
    pooling: str = "token"
    norm_after_pooling: bool | None = None
    residual_in_fp32: bool = False
    dropout: float = 0.0
    embedding_dropout: float | None = None
    attn_dropout: float = 0.0
    head_dropout: float = 0.0
    drop_path: float = 0.0
    initializer_range: float = 0.02
    class_names: tuple[str, ...] | None = None

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_head

    @property
    def inner_dim(self) -> int:
        """Width inside the MLP."""
        return 4 * self.d_model if self.d_inner is None else self.d_inner

    @property
    def image_pair(self) -> tuple[int, int]:
        """Height and width of images."""
        return _pair(self.image_size)

    @property
    def patch_pair(self) -> tuple[int, int]:
        """Height and width of patches."""
        return _pair(self.patch_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches in a column and in a row of an image."""
        (height, width), (rows, columns) = self.image_pair, self.patch_pair
        return height // rows, width // columns

    @property
    def n_prefix(self) -> int:
        """Tokens before the patches."""
        return int(self.class_token)

    @property
    def n_tokens(self) -> int:
        """Tokens of an image."""
        return self.n_prefix + self.grid[0] * self.grid[1]

    @property
    def norms_features(self) -> bool:
        """Whether the last norm comes after pooling."""
        return self.pooling == "avg" if self.norm_after_pooling is None else self.norm_after_pooling

    @property
    def embedding_dropout_p(self) -> float:
        """Dropout of the embedding."""
        return self.dropout if self.embedding_dropout is None else self.embedding_dropout

    def drop_path_of(self, layer: int) -> float:
        """Probability with which a sample skips a branch of this layer, counted from 0."""
        return self.drop_path * layer / (self.n_layer - 1) if self.n_layer > 1 else 0.0

    def __post_init__(self) -> None:
        for name in ("n_layer", "n_head", "d_model", "n_channels"):
            self._check_size(name)
        if self.d_inner is not None:
            self._check_size("d_inner")
        if not is_int(self.n_classes) or self.n_classes < 0:
            raise self._reject("n_classes", "an integer of at least 0", "give the number of classes")
        self._check_images()
        if self.d_model % self.n_head != 0:
            raise self._reject("d_model", f"a multiple of n_head={self.n_head}", "change d_model or n_head")
        for name, values in (("activation", ACTIVATIONS), ("pooling", POOLINGS)):
            value = getattr(self, name)
            if value not in values:
                hint = did_you_mean(value, values) if isinstance(value, str) else ""
                raise self._reject(
                    name, f"one of {', '.join(map(repr, values))}{hint}", "choose one of these"
                )
        for name in ("qkv_bias", "class_token", "residual_in_fp32", "norm_after_pooling"):
            value = getattr(self, name)
            if not isinstance(value, bool) and not (name == "norm_after_pooling" and value is None):
                raise self._reject(name, "True or False", f"give {name} as a bool")
        if self.pooling == "token" and not self.class_token:
            raise self._reject("pooling", "'avg' without a class token", "set class_token, or pool by 'avg'")
        self._check_numbers()
        self._check_class_names()

    def _reject(self, name: str, expected: str, fix: str) -> ValueError:
        return bad_argument(f"ViTConfig.{name}", repr(getattr(self, name)), expected, fix)

    def _check_size(self, name: str) -> None:
        value = getattr(self, name)
        if not is_int(value) or value <= 0:
            raise self._reject(name, "a positive integer", f"give {name} as a whole number of at least 1")

    def _check_images(self) -> None:
        for name in ("image_size", "patch_size"):
            value = getattr(self, name)
            pair = tuple(value) if isinstance(value, (list, tuple)) else (value, value)
            if len(pair) != 2 or not all(is_int(size) and size > 0 for size in pair):
                raise self._reject(
                    name, "a positive integer, or (height, width)", f"give {name} in whole pixels"
                )
            # One way to write each size, so that equal models have equal configs.
            object.__setattr__(self, name, pair[0] if pair[0] == pair[1] else pair)
        (height, width), (rows, columns) = self.image_pair, self.patch_pair
        if height % rows or width % columns:
            raise self._reject(
                "image_size",
                f"whole patches of {rows} x {columns}",
                "change image_size or patch_size",
            )

    def _check_numbers(self) -> None:
        for name in ("dropout", "embedding_dropout", "attn_dropout", "head_dropout", "drop_path"):
            value = getattr(self, name)
            if name == "embedding_dropout" and value is None:
                continue
            if not is_number(value) or not 0.0 <= value < 1.0:
                raise self._reject(
                    name, "a probability in [0, 1)", f"give {name} as the share that is dropped, such as 0.1"
                )
        for name in ("norm_eps", "initializer_range"):
            value = getattr(self, name)
            if not is_number(value) or not 0.0 < value < math.inf:
                raise self._reject(name, "a positive, finite number", f"change {name}")

    def _check_class_names(self) -> None:
        # Lists come from JSON; a tuple keeps the config hashable.
        if isinstance(self.class_names, list):
            object.__setattr__(self, "class_names", tuple(self.class_names))
        names = self.class_names
        if names is None:
            return
        if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
            raise self._reject("class_names", "strings, or None", "give one name for each class")
        if len(names) != self.n_classes:
            raise bad_argument(
                "ViTConfig.class_names",
                f"{len(names)} names",
                f"one for each of n_classes={self.n_classes}",
                "change class_names or n_classes",
            )

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values that JSON can hold; ``from_dict`` restores an equal config."""
        fields = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ViTConfig:
        """The config with these fields. Unknown and missing names are refused, with the nearest valid one."""
        return config_of(cls, fields)

    @classmethod
    def vit(
        cls, size: str = "base", *, patch_size: Size = 16, image_size: Size = 224, **changes: Any
    ) -> ViTConfig:
        """ViT by size: "tiny" (5.7M), "small" (22M), "base" (86M), "large" (304M); ``changes`` replace fields.

        Patches are usually 16 or 32 pixels wide, images 224 or 384.
        Sources: arXiv:2010.11929 (base, large), Touvron et al. 2020, arXiv:2012.12877 (tiny, small).
        """
        n_layer, n_head, d_model = preset_of(_SIZES, size)
        images = {"patch_size": patch_size, "image_size": image_size}
        return cls.from_dict({**images, "n_layer": n_layer, "n_head": n_head, "d_model": d_model, **changes})


def _pair(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


# n_layer, n_head, d_model
_SIZES = {
    "tiny": (12, 3, 192),
    "small": (12, 6, 384),
    "base": (12, 12, 768),
    "large": (24, 16, 1024),
}
